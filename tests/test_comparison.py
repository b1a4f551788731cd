"""The report of an evaluation, from answers that can be counted by hand."""

import json

import numpy as np
import pytest

import conformance
from core.faults import UserError
from launch import comparison, diversity
from launch.comparison import Answer, slices_of
from launch.evaluation_text import to_json, to_text
from launch.requirement import parse
from trainer.evaluate import EvaluationRow, evaluation_rows, evaluation_sums


def answer(ordinal: int, total: float, *, k: int = 0, text: str = "a b", length: float = 2.0, **more) -> Answer:
    values = {"reward/total": total, "response/length_mean": length, "response/truncated_frac": 0.0, **more}
    row = EvaluationRow(ordinal=ordinal, k=k, values=values)
    return Answer(row=row, prompt=f"prompt {ordinal}", text=text, ids=[ord(c) for c in text])


def reported(answers, others=None, **more):
    given = {"asked": len(answers), "decides": "reward/total"} | more
    return comparison.report("new", answers, *((None, None) if others is None else ("old", others)), **given)


def test_pairs_are_the_same_sample_of_the_same_prompt_whatever_the_order():
    mine = [answer(0, 1.0), answer(1, 5.0), answer(2, 2.0)]
    theirs = [answer(2, 2.0), answer(0, 3.0), answer(1, 1.0)]
    got = reported(mine, theirs)
    won = got.whole.win_rate
    assert (won.wins, won.ties, won.losses, won.rate.value) == (1, 1, 1, 0.5)
    total = got.whole.metrics["reward/total"]
    assert (total.policy.value, total.against.value, total.difference.value) == pytest.approx((8 / 3, 2, 2 / 3))
    assert [(e.which, e.prompt, e.difference) for e in got.examples] == [
        ("largest win", "prompt 1", 4.0),
        ("median", "prompt 2", 0.0),
        ("largest loss", "prompt 0", -2.0),
    ]
    fewer = reported(mine, theirs, decides="-reward/total")
    assert (fewer.whole.win_rate.wins, fewer.examples[0].prompt, fewer.examples[0].difference) == (1, "prompt 0", -2.0)


def test_a_constant_gain_in_noise_is_found_by_pairs_alone():
    """Prompts differ by 10, policies by 0.5: the intervals of the means overlap, that of the difference is sharp."""
    hard = np.random.default_rng(0).normal(0, 10, 40)
    got = reported([answer(i, x + 0.5) for i, x in enumerate(hard)], [answer(i, x) for i, x in enumerate(hard)])
    total = got.whole.metrics["reward/total"]
    assert total.policy.low < total.against.high
    assert total.difference.low == pytest.approx(0.5) and total.difference.high == pytest.approx(0.5)
    assert got.whole.win_rate.wins == 40 and got.whole.win_rate.rate.low > 0.9


def test_samples_of_a_prompt_are_one_number():
    mine = [answer(i, float(k == 0), k=k) for i in range(3) for k in range(2)]
    got = reported(mine, [answer(i, 0.0, k=k) for i in range(3) for k in range(2)])
    assert got.samples == 2 and got.whole.prompts == 3 and got.whole.metrics["reward/total"].policy.n == 3
    assert got.whole.win_rate.rate.value == 0.75 and got.whole.win_rate.wins == 3
    assert got.diversity["policy"]["diversity/self_bleu_of_prompt"] == pytest.approx(100)


def test_what_applies_to_some_prompts_is_compared_in_those_and_what_was_dropped_is_counted():
    mine = [answer(0, 1.0, polite=1.0), answer(1, 1.0, polite=None), answer(2, 1.0, polite=0.0)]
    theirs = [answer(2, 1.0, polite=0.75), answer(1, 1.0, polite=1.0)]
    got = reported(mine, theirs)
    polite = got.whole.metrics["polite"]  # prompt 2 has it of both, 0 and 1 of one alone
    assert (polite.policy.n, polite.against.n, polite.difference.n, polite.difference.value) == (2, 2, 1, -0.75)
    assert got.samples_dropped == {"policy": 0, "against": 1}
    assert "1 samples of old have no reward" in to_text(got, [])
    assert "polite" not in reported([answer(0, 1.0, polite=None)]).whole.metrics


def test_slices_show_themselves_with_their_size():
    kinds = {i: "long" if i < 40 else None for i in range(43)}
    mine, theirs = [answer(i, i % 3) for i in range(43)], [answer(i, 1.0) for i in range(43)]
    got = reported(mine, theirs, by=("kind", kinds))
    assert [(s.value, s.few, s.comparison.prompts) for s in got.slices] == [("long", False, 40), (None, True, 3)]
    assert sum(s.comparison.win_rate.wins for s in got.slices) == got.whole.win_rate.wins
    page = to_text(got, [])
    assert "by kind" in page and "null  (few: under 30 prompts" in page


def test_a_column_that_is_none_or_has_too_many_values_is_refused():
    rows = {i: {"prompt": "p", "kind": i % 2, "id": i} for i in range(40)}
    assert slices_of(rows, "kind") == {i: i % 2 for i in range(40)}
    with pytest.raises(UserError, match="--by knd: .* no such column; did you mean kind"):
        slices_of(rows, "knd")
    with pytest.raises(UserError, match="--by id: has 40 values in 40 prompts"):
        slices_of(rows, "id")


def test_distinct_n_is_compared_over_as_many_ngrams():
    """a b a b has 2 of 3 distinct pairs; over the first pair of it, 1 of 1."""
    assert diversity.distinct([[1, 2, 1, 2]], 1) == 0.5 and diversity.distinct([[1, 2, 1, 2]], 2) == pytest.approx(
        2 / 3
    )
    assert diversity.distinct([[1, 2], [2, 1]], 2) == 1 and diversity.distinct([[1]], 2) is None
    long, short = [answer(0, 0.0, text="abab")], [answer(0, 0.0, text="ab")]
    got = reported(long, short).diversity
    assert got["policy"]["diversity/distinct_2"] == got["against"]["diversity/distinct_2"] == 1.0


def test_self_bleu_is_100_where_all_say_the_same_and_0_where_no_word_is_shared():
    same, other = "the cat sat on the mat", "she goes home by bus now"
    assert diversity.self_bleu([same] * 3) == pytest.approx(100)
    assert diversity.self_bleu([same, other]) < 1
    # Alike: BLEU of each against the other is (5/6 * 3/5 * 2/4 * 1/3)^(1/4) = 0.537 by hand.
    assert diversity.self_bleu(["a b c d e f", "a x c d e f"]) == pytest.approx(53.7, abs=0.05)
    assert diversity.self_bleu([same]) is None and diversity.self_bleu(["hi"] * 2) == pytest.approx(100)


def test_the_json_is_plain_and_the_page_says_what_the_gate_found():
    made = reported([answer(i, 1.0 + i % 2) for i in range(40)], [answer(i, 1.0) for i in range(40)])
    r = parse("reward/total > base", ["reward/total"])
    judged = [(r, *r.judge(made.whole.metrics["reward/total"].difference))]
    got = json.loads(to_json(made, judged))
    assert got["metrics"]["reward/total"]["difference"]["value"] == 0.5 and got["requirements"][0]["met"] is True
    assert got["win_rate"]["wins"] == 20 and got["prompts"] == 40 and got["policy"] == "new"
    page = to_text(made, judged)
    assert "met: reward/total > base" in page and "20 prompts won, 20 tied, 0 lost" in page
    alone = json.loads(to_json(reported([answer(0, 1.0)]), []))
    assert alone["win_rate"] is None and alone["against"] is None and alone["examples"] == []
    assert alone["metrics"]["reward/total"]["policy"] == {"value": 1.0, "low": None, "high": None, "n": 1}


def test_text_of_a_policy_cannot_move_the_cursor():
    page = to_text(reported([answer(0, 1.0, text="x\x1b[2J\ny")], [answer(0, 0.0)]), [])
    assert "\x1b" not in page


def test_the_row_of_a_response_by_hand_and_the_means_of_training_from_it():
    """By the weights that a schedule ends with: 0.5 * 3 - 0.4 * 1 = 1.1 and 0.5 * 2 = 1. c applies to one alone."""
    cfg = conformance.configured(**{"rewards.a.weight": {0: 1.0, 10: 0.5}})
    first = conformance.trajectory(
        0, [1], [5, 6, 0], rewards={"a": [1, 2, 0], "b": [0, 0, 1]}, applies={"c": [False] * 3}
    )
    cut = conformance.trajectory(1, [1], [5, 6], cut=True, actions=[True, False], rewards={"a": [2, 0], "c": [0.5, 0]})
    one, other = evaluation_rows([first, cut], cfg.rewards)
    names = ["reward/total", "reward/a/raw", "reward/b/raw", "c", "response/length_mean", "response/truncated_frac"]
    assert names == list(one.values) and set(names) == set(cfg.evaluation_means)
    assert list(one.values.values()) == [pytest.approx(1.1), 3, 1, None, 3, 0]
    assert list(other.values.values()) == [1, 2, 0, 0.5, 1, 1] and (other.ordinal, other.k) == (1, 0)
    means = evaluation_sums([one, other], cfg.rewards).means()
    want = [1.05, 2.5, 0.5, 0.5, 2, 0.5]
    assert means == pytest.approx({f"eval/{name}": x for name, x in zip(names, want, strict=True)})
