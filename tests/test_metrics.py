import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import metrics
from core.faults import InvariantFault
from core.metrics import COUNTERS, HISTOGRAMS, METRICS, PHASES, RESERVED_COMPONENTS, Sums, lookup

ROOT = Path(__file__).parents[1]


def names_of(component: str) -> list[str]:
    """Every name that a run with this one component may log."""
    names = []
    for row in METRICS:
        if "<phase>" in row:
            names += [row.replace("<phase>", phase) for phase in PHASES]
        elif "<counter>" in row:
            names += [row.replace("<counter>", counter) for counter in COUNTERS]
        else:
            names.append(row.replace("<component>", component))
    return names


def accepted(name: str) -> bool:
    try:
        lookup(name)
    except KeyError:
        return False
    return True


@pytest.mark.parametrize(
    "name",
    """reward/total reward/quality/raw reward/quality/weighted objective/kl objective/entropy objective/kl_coef
    loss/policy loss/value ppo/approx_kl ppo/pg_clipfrac ppo/vf_clipfrac ppo/ratio_mean value/explained_variance
    response/length_mean response/truncated_frac staleness/mean logprob_diff/mean logprob_diff/max
    time/rollout time/reward time/annotate time/update time/sync time/evaluate time/log time/other time/total
    perf/rollout_tokens_per_s perf/learner_tokens_per_s perf/samples_per_s optim/lr optim/grad_norm
    faults/worker_lost faults/prompts_redispatched faults/duplicates_dropped faults/scores_retried
    faults/samples_dropped faults/weights_resent
    eval/slot_error eval/reward/total eval/reward/quality/raw eval/response/length_mean
    eval/response/truncated_frac""".split(),
)
def test_every_name_of_the_design_has_a_row(name):
    row = lookup(name)
    assert row.name == name
    assert row.meaning and row.unit and row.denominator and row.healthy
    assert not any(hole in f"{row.name} {row.meaning}" for hole in ("<component>", "<phase>", "<counter>"))


@given(st.text(min_size=1, max_size=12) | st.sampled_from(["total", "raw", "weighted", "reward", "response", "mean"]))
def test_no_name_is_a_prefix_of_another(component):
    names = [name for name in names_of(component) if accepted(name)]
    for a, b in itertools.permutations(set(names), 2):
        assert not b.startswith(f"{a}/")
    assert "reward/total" in names
    # Where the component's own name would make a prefix, or two segments, nothing of it is accepted.
    assert (f"reward/{component}/raw" in names) == ("/" not in component and component not in RESERVED_COMPONENTS)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("reward/quality/rwa", "reward/quality/raw"),
        ("rewards/total", "reward/total"),
        ("objective/kls", "objective/kl"),
        ("time/rolout", "time/rollout"),
        ("fault/worker_lost", "faults/worker_lost"),
        ("eval/reward", "eval/reward/total"),
        ("faults/workers_lost", "faults/worker_lost"),
        ("evals/slot_error", "eval/slot_error"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(wrong, nearest):
    with pytest.raises(KeyError, match=f"'{wrong}'.*nearest is '{nearest}'"):
        lookup(wrong)


@pytest.mark.parametrize("wrong", ["", "/", "kl", "reward//raw", "reward/a/b/raw", "reward/total/raw", "eval/response"])
def test_what_is_no_name_is_refused(wrong):
    with pytest.raises(KeyError):
        lookup(wrong)


def test_component_names_tell_shares():
    assert lookup("eval/slot_error").unit == "share"
    assert lookup("reward/slot_error/raw").unit == "share"
    assert lookup("reward/slot_error/weighted").unit == "reward"
    assert lookup("eval/coverage").unit == "the component's own"


def test_the_page_is_generated_and_every_table_cell_is_whole():
    page = metrics.markdown()
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == page, (
        "python -m core.metrics > docs/metrics.md"
    )
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    heads = 2 + len(HISTOGRAMS)  # of the tables of phases and counters
    assert len(rows) == len(METRICS) + len(PHASES) + len(COUNTERS) + heads
    assert {line.count("|") for line in rows} == {6, 3}


def test_importing_metrics_imports_no_torch():
    code = "import sys, core.metrics; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def all_reduce_over(ranks: list[Sums]) -> list[Sums]:
    """`merge` on every rank, with the collectives of a job whose ranks run one after the other."""
    sent: list[list[list[float]]] = []

    def record(rank_sent):
        def all_reduce(vector):
            rank_sent.append(vector)
            return vector

        return all_reduce

    for rank in ranks:
        sent.append([])
        rank.merge(record(sent[-1]))
    merged = []
    for rank in ranks:
        calls = iter(zip(*sent, strict=True))
        merged.append(rank.merge(lambda _, calls=calls: [sum(column) for column in zip(*next(calls), strict=True)]))
    return merged


def test_means_divide_once_over_all_ranks():
    one, two, empty = Sums(), Sums(), Sums()
    one.add("reward/total", 2.0, 1)  # a mean of 2 over one response
    two.add("reward/total", 3.0, 2)  # two calls: 4 over three responses
    two.add("reward/total", 1.0, 1)
    empty.add("reward/total", 0.0, 0)
    assert two.means() == {"reward/total": 4 / 3}
    for merged in all_reduce_over([one, two, empty]):
        assert merged.means() == {"reward/total": 6 / 4}  # the mean of means would be (2 + 4/3) / 2
    assert one.means() == {"reward/total": 2.0}


def test_the_order_in_which_names_were_added_is_no_matter():
    one, two = Sums(), Sums()
    one.add("loss/policy", 1.0, 4)
    one.add("loss/value", 10.0, 4)
    two.add("loss/value", 20.0, 6)
    two.add("loss/policy", 2.0, 6)
    for merged in all_reduce_over([one, two]):
        assert merged.means() == {"loss/policy": 0.3, "loss/value": 3.0}


def test_ranks_with_different_names_are_stopped_before_their_numbers_mix():
    one, two = Sums(), Sums()
    one.add("loss/policy", 1.0, 4)
    two.add("loss/value", 20.0, 6)
    with pytest.raises(InvariantFault, match="different metrics; this one has loss/policy"):
        all_reduce_over([one, two])


@pytest.mark.parametrize("ranks", [1, 2, 7, 8192])
def test_equal_names_pass_on_any_number_of_ranks(ranks):
    sums = Sums()
    sums.add("ppo/approx_kl", 0.5, 2)
    merged = sums.merge(lambda vector: [ranks * x for x in vector])
    assert merged.means() == {"ppo/approx_kl": 0.25}


def test_the_mean_of_nothing_is_not_a_number():
    sums = Sums()
    sums.add("reward/coverage/raw", 0.0, 0)
    assert math.isnan(sums.means()["reward/coverage/raw"])


def test_sums_refuse_unknown_names():
    with pytest.raises(KeyError, match="loss/policy"):
        Sums().add("loss/polciy", 1.0, 1)
