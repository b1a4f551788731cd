"""What an evaluation found, from the answers of one policy or of two: all that `tokenppo eval` shows. Pure.

Of each prompt there are the same samples k of both policies, drawn with the same random numbers: they are pairs.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core.faults import UserError
from launch import diversity, paired
from launch.paired import AtEqualLength, Estimate, WinRate
from launch.requirement import nearest
from trainer.evaluate import EvaluationRow

MOST_SLICES = 20  # values of a column: with more, hardly a slice has enough prompts
SHARES = ("response/truncated_frac",)  # each response is a 0 or a 1
LENGTH = "response/length_mean"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One response of a policy."""

    row: EvaluationRow
    prompt: str
    text: str
    ids: list[int]  # its text, token by token: what the policy wrote, special tokens left out


@dataclass(frozen=True, kw_only=True)
class Metric:
    policy: Estimate
    against: Estimate | None = None
    difference: Estimate | None = None  # policy less against, in the prompts where both have a value


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Of all prompts, or of a slice. What compares two is None where there is one policy."""

    prompts: int
    metrics: dict[str, Metric]
    win_rate: WinRate | None
    length_controlled: AtEqualLength | None  # of the metric that decides who wins


@dataclass(frozen=True, kw_only=True)
class Slice:
    value: Any  # of the column; None where a row has none
    few: bool  # fewer prompts than an interval was ever tried with: shown all the same
    comparison: Comparison


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt with both answers. `which`: largest win, median, largest loss."""

    which: str
    prompt: str
    difference: float  # of the metric that decides
    policy: str
    against: str


@dataclass(frozen=True, kw_only=True)
class Report:
    policy: str
    against: str | None
    decides: str  # which metric says who wins; `-` before it: less is better
    samples: int  # of each prompt
    samples_dropped: dict[str, int]  # policy, against -> answers without a reward, which count nowhere
    whole: Comparison
    diversity: dict[str, dict[str, float | None]]  # policy, against -> name -> value
    by: str | None = None
    slices: list[Slice] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)


def slices_of(rows: dict[int, dict[str, Any]], column: str) -> dict[int, Any]:
    """The value of `column` of each prompt. `rows`: ordinal -> columns. Raises UserError where no row has it, or it has
    too many values."""
    values = {ordinal: row.get(column) for ordinal, row in rows.items()}
    names = sorted({name for row in rows.values() for name in row} - {"prompt"})
    if column not in names:
        raise UserError(f"--by {column}: the held-out prompts have no such column{nearest(column, names)}")
    n = len({_key(value) for value in values.values()})
    if n > MOST_SLICES:
        raise UserError(f"--by {column}: has {n} values in {len(rows)} prompts, at most {MOST_SLICES} make slices")
    return values


def report(
    policy: str,
    answers: list[Answer],
    against: str | None = None,
    others: list[Answer] | None = None,
    *,
    asked: int,
    decides: str,
    by: tuple[str, dict[int, Any]] | None = None,
) -> Report:
    """`others`: the answers of `against`. `asked`: how many of each policy. `by`: a column and the value of each prompt
    (`slices_of`). ValueError where nothing was answered."""
    if not answers:
        raise ValueError("no answers")
    others = None if against is None else others
    slices = []
    if by is not None:
        of_value: dict[str, list[int]] = {}
        for ordinal, value in sorted(by[1].items()):
            of_value.setdefault(_key(value), []).append(ordinal)
        for ordinals in of_value.values():
            mine, theirs = (None if x is None else _only(x, set(ordinals)) for x in (answers, others))
            if mine:  # else all of them were dropped, which is counted
                compared = compare(mine, theirs, decides)
                few = compared.prompts < paired.FEW
                slices.append(Slice(value=by[1][ordinals[0]], few=few, comparison=compared))
    sides = {"policy": answers} | ({} if others is None else {"against": others})
    return Report(
        policy=policy,
        against=against,
        decides=decides,
        samples=1 + max(a.row.k for a in answers),
        samples_dropped={side: asked - len(of) for side, of in sides.items()},
        whole=compare(answers, others, decides),
        diversity=_diversity(sides),
        by=None if by is None else by[0],
        slices=slices,
        examples=[] if others is None else _examples(answers, others, decides),
    )


def compare(answers: list[Answer], others: list[Answer] | None, decides: str) -> Comparison:
    """All numbers of these answers. A metric that applies to none of them is left out."""
    metrics = {}
    for name in answers[0].row.values:
        mine, theirs = _per_prompt(answers, name), _per_prompt(others or [], name)
        if not mine:
            continue
        both = sorted(mine.keys() & theirs.keys())
        estimate = paired.proportion if name in SHARES else paired.mean
        metrics[name] = Metric(
            policy=estimate(_array(mine, mine)),
            against=estimate(_array(theirs, theirs)) if theirs else None,
            difference=paired.mean(_array(mine, both) - _array(theirs, both)) if both else None,
        )
    won = None if others is None else _wins(answers, others, decides)
    return Comparison(
        prompts=len(_ordinals(answers)),
        metrics=metrics,
        win_rate=paired.win_rate(won) if won is not None and len(won) else None,
        length_controlled=None if others is None else _at_equal_length(answers, others, decides),
    )


def _at_equal_length(answers: list[Answer], others: list[Answer], decides: str) -> AtEqualLength | None:
    name = decides.removeprefix("-")
    if name == LENGTH:  # what would be left of it is nothing
        return None
    mine, theirs = _per_prompt(answers, name), _per_prompt(others, name)
    both = sorted(mine.keys() & theirs.keys())
    lengths = [_array(_per_prompt(side, LENGTH), both) for side in (answers, others)]
    return paired.length_adjusted(_array(mine, both) - _array(theirs, both), lengths[0] - lengths[1])


def _pairs(answers: list[Answer], others: list[Answer], decides: str) -> list[tuple[Answer, Answer, float, float]]:
    """Both answers to each sample, and what decides, more is better; those that it applies to, by (ordinal, k)."""
    name, sign = decides.removeprefix("-"), -1.0 if decides.startswith("-") else 1.0
    by_sample = {(b.row.ordinal, b.row.k): b for b in others}
    pairs = []
    for a in sorted(answers, key=lambda a: (a.row.ordinal, a.row.k)):
        b = by_sample.get((a.row.ordinal, a.row.k))
        if b is not None and None not in (x := (a.row.values[name], b.row.values[name])):
            pairs.append((a, b, sign * x[0], sign * x[1]))
    return pairs


def _wins(answers: list[Answer], others: list[Answer], decides: str) -> np.ndarray:
    """[n] of the prompts that have a pair: the mean outcome of their samples."""
    of_prompt: dict[int, list[float]] = {}
    for a, _, mine, theirs in _pairs(answers, others, decides):
        of_prompt.setdefault(a.row.ordinal, []).append(float(paired.outcomes(mine, theirs)))
    return np.array([np.mean(outcomes) for outcomes in of_prompt.values()])


def _examples(answers: list[Answer], others: list[Answer], decides: str) -> list[Example]:
    """The largest win, the one in the middle and the largest loss, where there are these."""
    pairs = sorted(_pairs(answers, others, decides), key=lambda pair: pair[2] - pair[3])
    chosen = {"largest win": pairs[-1:], "median": pairs[len(pairs) // 2 :][:1], "largest loss": pairs[:1]}
    wanted = {"largest win": 1.0, "largest loss": 0.0}
    sign = -1.0 if decides.startswith("-") else 1.0
    return [
        Example(which=which, prompt=a.prompt, difference=sign * (mine - theirs), policy=a.text, against=b.text)
        for which, of in chosen.items()
        for a, b, mine, theirs in of
        if which not in wanted or paired.outcomes(mine, theirs) == wanted[which]
    ]


def _diversity(sides: dict[str, list[Answer]]) -> dict[str, dict[str, float | None]]:
    """Of the first samples of all prompts; and of the samples of one prompt, where there are several, their mean."""
    firsts = {side: [a for a in answers if a.row.k == 0] for side, answers in sides.items()}
    found: dict[str, dict[str, float | None]] = {side: {} for side in sides}
    for n in (1, 2, 3):
        ids = {side: [a.ids for a in answers] for side, answers in firsts.items()}
        most = min(sum(max(0, len(x) - n + 1) for x in of) for of in ids.values())
        for side, of in ids.items():
            found[side][f"diversity/distinct_{n}"] = diversity.distinct(of, n, most)
    for side, answers in sides.items():
        found[side]["diversity/self_bleu"] = diversity.self_bleu([a.text for a in firsts[side]])
        of_prompt: dict[int, list[str]] = {}
        for a in answers:
            of_prompt.setdefault(a.row.ordinal, []).append(a.text)
        several = [texts for texts in of_prompt.values() if len(texts) > 1][: diversity.MOST]
        if several:
            within = [diversity.self_bleu(texts) for texts in several]
            found[side]["diversity/self_bleu_of_prompt"] = sum(within) / len(within)
    return found


def _per_prompt(answers: Iterable[Answer], name: str) -> dict[int, float]:
    """ordinal -> mean over the samples that the metric applies to; without the prompts where it applies to none."""
    of_prompt: dict[int, list[float]] = {}
    for a in answers:
        if (value := a.row.values[name]) is not None:
            of_prompt.setdefault(a.row.ordinal, []).append(value)
    return {ordinal: float(np.mean(values)) for ordinal, values in of_prompt.items()}


def _array(of_prompt: dict[int, float], ordinals: Iterable[int]) -> np.ndarray:
    return np.array([of_prompt[ordinal] for ordinal in ordinals], dtype=np.float64)


def _only(answers: list[Answer], ordinals: set[int]) -> list[Answer]:
    return [a for a in answers if a.row.ordinal in ordinals]


def _ordinals(answers: list[Answer]) -> set[int]:
    return {a.row.ordinal for a in answers}


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
