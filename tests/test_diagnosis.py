"""Streams of metrics that go wrong in one way each bring the verdict that is meant and no other; a healthy one none."""

import json
import math
from pathlib import Path

import pytest

from core import config, diagnosis, metrics
from core.diagnosis import RULES, Diagnosis, Facts, Verdict

N = 40
FACTS = Facts(components=2)


def healthy(step: int) -> dict[str, float]:
    """A run that learns: noise of a fixed pattern over slow trends, two components of about the same weight."""
    t, wave = step / N, math.sin(7 * step)
    return {
        "reward/total": 1 + 3 * t + 0.2 * wave,
        "reward/quality/raw": 0.6 + 2 * t,
        "reward/quality/variance_share": 0.6 + 0.1 * wave,
        "reward/quality/length_corr": 0.3 * wave,
        "reward/style/raw": 0.4 + t,
        "reward/style/variance_share": 0.4 - 0.1 * wave,
        "reward/style/length_corr": -0.9,  # of the task: lengths do not follow
        "response/length_mean": 40 + 2 * wave,
        "response/truncated_frac": 0.02 + 0.01 * wave,
        "response/reward_std": 0.7 + 0.1 * wave,
        "data/no_signal_frac": 0.3 + 0.2 * wave,
        "objective/kl": 4 * t + 0.1 * abs(wave),
        "objective/entropy": 2.0 - 1.95 * t,  # a task that is solved: few choices are left, and the reward is high
        "ppo/pg_clipfrac": 0.1 + 0.05 * wave,
        "ppo/first_ratio_error": 2e-6,
        "value/explained_variance": 0.9 * t - (0.3 if step < 5 else 0.0),
        "logprob_diff/mean": 3e-7,
        "logprob_diff/max": 2e-5,
        "staleness/mean": 0.0,
        "optim/grad_norm": 0.5 + 0.2 * wave,
    }


def run(change, facts: Facts = FACTS, n: int = N) -> list[Verdict]:
    doctor = Diagnosis(facts)
    for step in range(1, n + 1):
        doctor.add(step, healthy(step) | change(step))
    return doctor.verdicts


def late(**values: float):
    """From step 20 on; names with `__` for `/`."""
    return lambda step: {name.replace("__", "/"): x for name, x in values.items()} if step >= 20 else {}


BAD = {
    "first-ratio": late(ppo__first_ratio_error=3e-4),
    "clipping": late(ppo__pg_clipfrac=0.42),
    "entropy-collapse": lambda s: {"objective/entropy": 0.01, "reward/total": 0.3} if s >= 20 else {},
    "critic": late(value__explained_variance=-0.6),
    "length-pinned": late(response__truncated_frac=0.8),
    "length-vanished": lambda s: {"response/length_mean": 1.1} if s >= 20 else {},
    "no-spread": late(response__reward_std=0.0),
    "kl-jump": lambda s: {"objective/kl": 60.0} if s >= 20 else {},
    "one-component": late(reward__quality__variance_share=0.99),
    "paid-for-length": lambda s: {"reward/quality/length_corr": 0.9, "response/length_mean": 40 + 2 * s},
    "mismatch": late(logprob_diff__max=0.2),
    "staleness": late(staleness__mean=1.0),
    "gradient": late(optim__grad_norm=30.0),
}


def test_a_healthy_stream_has_no_verdict():
    assert run(lambda step: {}) == []


def test_every_rule_has_a_bad_stream():
    assert set(BAD) == {rule.name for rule in RULES}


@pytest.mark.parametrize("rule", BAD)
def test_a_bad_stream_brings_its_verdict_once_and_no_other(rule):
    (verdict,) = run(BAD[rule])
    (of_rule,) = [r for r in RULES if r.name == rule]
    assert verdict.rule == rule
    if rule != "paid-for-length":  # which is bad from the start, and says so when lengths have moved
        assert verdict.step == 20 + of_rule.steps - 1
    assert f"step {verdict.step}: {of_rule.title}: {verdict.metric} is " in verdict.text
    assert of_rule.remedy in verdict.text and verdict.text.endswith(f"(docs/diagnosis.md#{rule})")
    metrics.lookup(verdict.metric)  # it is in the table


@pytest.mark.parametrize("rule", BAD)
def test_less_steps_in_a_row_than_a_rule_asks_bring_nothing(rule):
    steps = next(r.steps for r in RULES if r.name == rule)
    if steps == 1 or rule == "paid-for-length":
        return
    assert run(lambda s: BAD[rule](s) if s % steps else {}) == []


def test_it_is_said_again_only_after_it_was_gone_for_as_long():
    def clipped(*steps: range):
        return lambda s: {"ppo/pg_clipfrac": 0.5} if any(s in r for r in steps) else {}

    assert [v.step for v in run(clipped(range(10, 15), range(16, 22)))] == [12]  # one quiet step is no end
    assert [v.step for v in run(clipped(range(10, 15), range(18, 22)))] == [12, 20]
    doctor = Diagnosis(FACTS)
    for step in range(1, 13):
        doctor.add(step, healthy(step) | clipped(range(10, 15))(step))
    assert [v.rule for v in doctor.active] == ["clipping"]
    for step in range(15, 18):
        doctor.add(step, healthy(step))
    assert doctor.active == []


def test_a_run_that_goes_on_comes_to_the_same_verdicts_as_one_that_was_not_left():
    rows = [healthy(s) | BAD["kl-jump"](s) | BAD["critic"](s) for s in range(1, N + 1)]
    whole, again = Diagnosis(FACTS), Diagnosis(FACTS)
    for step, row in enumerate(rows, 1):
        whole.add(step, row)
    for step, row in enumerate(rows, 1):
        again.add(step, {k: math.nan if x is None else x for k, x in json.loads(json.dumps(row)).items()})
    assert whole.verdicts == again.verdicts and len(whole.verdicts) == 2


def test_numbers_that_are_missing_or_none_bring_nothing():
    doctor = Diagnosis(FACTS)
    for step in range(1, 30):
        assert doctor.add(step, {} if step % 2 else dict.fromkeys(healthy(step), math.nan)) == []


def test_bounds_follow_the_configuration():
    assert run(late(logprob_diff__max=0.2, logprob_diff__mean=0.01), Facts("bfloat16", components=2)) == []
    assert run(late(staleness__mean=1.0), Facts(oldest=1.0, components=2)) == []
    assert run(BAD["one-component"], Facts(components=1)) == []  # the only one: it always decides alone
    cfg = config.load(Path("configs/cards.yaml"), {"rollout.max_staleness": 2})
    assert Facts.of(cfg) == Facts("float32", 2.0, 3)  # of four components one is a metric alone
    cfg = config.load(Path("configs/cards.yaml"), {"rollout.round_tokens": 20})
    assert Facts.of(cfg).oldest == 4  # 48 tokens are three rounds


def test_entropy_may_fall_while_the_reward_is_high():
    low = {"objective/entropy": 0.001}
    assert run(lambda s: low if s >= 20 else {}) == []
    (verdict,) = run(lambda s: low | {"reward/total": 1.0} if s >= 20 else {"reward/total": 1.0})  # it never rose
    assert verdict.rule == "entropy-collapse"


def test_a_model_that_is_sure_of_what_it_does_well_is_no_collapse():
    """It begins near the top and gets there: little rise, but most of the spread that there was."""
    spread, sure = {"response/reward_std": 0.3}, {"objective/entropy": 0.001, "response/reward_std": 0.01}
    assert run(lambda s: {"reward/total": min(1.0, 0.8 + 0.01 * s)} | (sure if s >= 20 else spread)) == []


def test_a_kl_that_grows_steadily_is_no_jump():
    assert run(lambda s: {"objective/kl": 0.05 * s**1.5}) == []


def test_a_leap_in_the_first_steps_is_one_too():
    (verdict,) = run(lambda s: {"objective/kl": 335.0 if s >= 2 else 0.0})
    assert (verdict.rule, verdict.step) == ("kl-jump", 2)
    assert run(lambda s: {"objective/kl": 0.0 if s == 1 else 9.0}) == []


def test_the_page_is_generated():
    with open("docs/diagnosis.md", encoding="utf-8") as page:
        assert page.read() == diagnosis.markdown()
    for rule in RULES:
        assert f"\n## {rule.name}\n" in diagnosis.markdown()
