"""`--require`: what it accepts, what it says, and that an interval must show it, not a mean."""

import pytest

from core.faults import UserError
from launch.paired import Estimate
from launch.requirement import parse

NAMES = ["reward/total", "reward/quality/raw", "slot_error", "response/length_mean"]


def parsed(text: str):
    return parse(text, NAMES, alone=["win_rate"])


def estimate(low: float, high: float) -> Estimate:
    return Estimate(value=(low + high) / 2, low=low, high=high, n=60)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("reward/total > base", ("reward/total", ">", "base")),
        ("  slot_error<0.05 ", ("slot_error", "<", 0.05)),
        ("slot_error <= -1e-3", ("slot_error", "<=", -0.001)),
        ("win_rate>=.5", ("win_rate", ">=", 0.5)),
        ("response/length_mean <= against", ("response/length_mean", "<=", "against")),
    ],
)
def test_the_grammar(text, want):
    got = parsed(text)
    assert (got.name, got.op, got.bound) == want and got.text == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("reward/totl > base", "there is no number reward/totl; did you mean reward/total"),
        ("total > base", "did you mean reward/total"),
        ("zzzz > 1", "there is reward/total, reward/quality/raw, slot_error"),
        ("reward/total > bse", "bse is neither a number nor one of base and against; did you mean base"),
        ("win_rate > base", "compares the two already; ask for a number"),
        ("reward/total = 3", "wants NAME OP NUMBER"),
        ("reward/total > ", "wants NAME OP NUMBER"),
        ("reward/total > 1 > 2", "wants NAME OP NUMBER"),
        ("reward/total > nan", "nan is no number"),
        ("__import__('os') > 1", "there is no number"),
        ("", "wants NAME OP NUMBER"),
    ],
)
def test_what_is_no_requirement_is_one_line_with_the_nearest_name(text, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as caught:
        parsed(text)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"--require {text!r}: ")


@pytest.mark.parametrize(
    ("text", "low", "high", "met"),
    [
        ("reward/total > base", 0.01, 0.5, True),
        ("reward/total > base", 0.0, 0.5, False),  # the mean is more, and it is no proof
        ("reward/total >= base", 0.0, 0.5, True),
        ("reward/total < base", -0.5, -0.01, True),
        ("reward/total < base", -0.5, 0.01, False),
        ("reward/total <= base", -0.5, 0.0, True),
        ("slot_error < 0.1", 0.02, 0.09, True),
        ("slot_error < 0.1", 0.02, 0.11, False),
        ("slot_error > 0.1", 0.11, 0.2, True),
    ],
)
def test_the_whole_interval_must_show_it(text, low, high, met):
    assert parsed(text).judge(estimate(low, high))[0] is met


def test_it_says_why_in_words():
    _, why = parsed("reward/total > base").judge(estimate(-0.05, 0.29))
    assert why == (
        "the difference of reward/total to base is +0.12, and its 95 % interval (-0.05 to +0.29, 60 prompts) does not"
        " lie above 0"
    )
    _, why = parsed("slot_error < 0.1").judge(estimate(0.02, 0.06))
    assert why == "slot_error is 0.04, and its 95 % interval (0.02 to 0.06, 60 prompts) lies below 0.1"


def test_what_has_no_interval_is_never_met():
    met, why = parsed("slot_error < 0.1").judge(Estimate(value=0.0, low=None, high=None, n=1))
    assert not met and "no interval" in why
    met, why = parsed("slot_error < base").judge(None)
    assert not met and "applies to no prompt" in why
