"""What `tokenppo check-reward` finds out about a component before a GPU hour is spent on it.

A component is sound if its answers fit, are finite, are the same when asked again, and do not depend on the company in
which a completion is scored. Whether the reward of a token looks into the future, and whether it pays for length, are
worth knowing and not wrong: those are warnings.
"""

import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from core.faults import RewardFault
from reward_server.components import PASSED, Component, Placed, ScoreRequest, score_components
from reward_server.texts import text_of

TOLERANCE = 1e-5  # of the largest reward: models may round otherwise in another batch
LENGTH_CORR = 0.8  # of the sum with the number of tokens, above which a warning is due
REPEATS = 3
_LISTS = (*PASSED, "prompt_ids", "uids")  # of a ScoreRequest, besides its columns


@dataclass(frozen=True)
class Finding:
    """One property. `ok` None: it could not be looked at, `says` tells why."""

    name: str
    ok: bool | None
    says: str
    must: bool = True  # a component without it is unsound; else a warning


@dataclass(frozen=True)
class Report:
    findings: list[Finding]
    rewards: list[Placed | RewardFault]  # of each sample
    tokens_per_s: float | None = None
    numbers: dict[str, float] = field(default_factory=dict)  # least, largest, mean_per_token, nonzero_share, ...

    @property
    def sound(self) -> bool:
        return not any(finding.must and finding.ok is False for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        rewards = [
            {"fault": str(r)} if isinstance(r, RewardFault) else {"tokens": r[0].tolist(), "applies": bool(r[1].all())}
            for r in self.rewards
        ]
        return {
            "sound": self.sound,
            "findings": [asdict(finding) for finding in self.findings],
            "tokens_per_s": self.tokens_per_s,
            "numbers": self.numbers,
            "rewards": rewards,
        }


def check(component: Component, request: ScoreRequest) -> Report:
    """Score the samples of `request` whole, again, alone, in another order, beside a long one, and with other ends."""
    started = time.perf_counter()
    first = _score(component, request)
    seconds = [time.perf_counter() - started]
    faults = [answer for answer in first if isinstance(answer, RewardFault)]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return Report([Finding("shape and numbers", False, f"{faults[0]}{more}")], first)
    again = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        again.append(_score(component, request))
        seconds.append(time.perf_counter() - started)
    alone = [_score(component, take(request, [i]))[0] for i in range(len(request))]
    backwards = _score(component, take(request, range(len(request))[::-1]))[::-1]
    padded = _score(component, beside_a_long_one(request))[: len(request)]
    findings = [
        Finding("shape and numbers", True, f"{len(first)} answers, one finite number for each token"),
        _same("deterministic", again, first, "asked again it answers the same", exactly=True),
        _same("independent of the batch", [alone], first, "a completion alone gets what it gets among others"),
        _same("independent of order", [backwards], first, "in reverse order each gets the same"),
        _same("independent of padding", [padded], first, "beside a completion eight times as long each gets the same"),
        causality(component, request, first),
    ]
    totals, lengths = [math.fsum(r[0].tolist()) for r in first], [len(r[0]) for r in first]
    applies = [i for i, r in enumerate(first) if r[1].all()]
    findings.append(_length([totals[i] for i in applies], [lengths[i] for i in applies]))
    values = np.concatenate([first[i][0] for i in applies]) if applies else np.zeros(0)
    if not len(values):
        findings.append(Finding("applies", None, "it applies to none of these samples: give some with --data", False))
        return Report(findings, first, sum(lengths) / statistics.median(seconds))
    numbers = {
        "least": float(values.min()),
        "largest": float(values.max()),
        "mean_per_token": float(values.mean()),
        "nonzero_share": float((values != 0).mean()),
        "applies_share": len(applies) / len(first),
    }
    return Report(findings, first, sum(lengths) / statistics.median(seconds), numbers)


def causality(component: Component, request: ScoreRequest, first: list[Placed | RewardFault]) -> Finding:
    """Whether tokens keep their reward when those after them become others: the second half of each text changes."""
    name, changed, seen = "causal", 0, 0
    examples: list[str] = []
    for i in range(len(request)):
        cut, other = with_another_end(request, i)
        if other is None:
            continue
        (answer,) = _score(component, other)
        if isinstance(answer, RewardFault):
            return Finding(name, None, f"with another second half it fails: {answer}", must=False)
        before, after = first[i][0][:cut], answer[0][:cut]
        moved = np.flatnonzero(
            ~np.isclose(before, after, rtol=0, atol=TOLERANCE * max(1.0, float(np.abs(before).max())))
        )
        changed, seen = changed + len(moved), seen + cut
        if len(moved):
            t = int(moved[0])
            examples.append(f"token {t} of sample {i} has {before[t]:.4g}, with another end {after[t]:.4g}")
    if not seen:
        return Finding(name, None, "no sample has tokens enough to change its second half", must=False)
    if changed:
        share = f"{changed} of {seen} tokens look into the future"
        return Finding(
            name, False, f"{share}: {examples[0]}; the policy is paid for what it has not yet done", must=False
        )
    return Finding(name, True, f"{seen} tokens keep their reward when later ones change", must=False)


def take(request: ScoreRequest, rows: Iterable[int]) -> ScoreRequest:
    """The samples `rows` of a request, in that order."""
    rows = list(rows)
    chosen = {name: [getattr(request, name)[i] for i in rows] for name in _LISTS}
    return ScoreRequest(**chosen, columns={name: [values[i] for i in rows] for name, values in request.columns.items()})


def _with_text(completion: Any, text: str) -> Any:
    return text if isinstance(completion, str) else [{**completion[0], "content": text}]


def beside_a_long_one(request: ScoreRequest) -> ScoreRequest:
    """The same samples and after them the longest, eight times over in one text: others are padded to it."""
    i = max(range(len(request)), key=lambda i: len(request.completion_ids[i]))
    text, ids, offsets = text_of(request.completions[i]), request.completion_ids[i], request.offsets[i]
    row = take(request, [i])
    long = replace(
        row,
        completions=[_with_text(row.completions[0], text * 8)],
        completion_ids=[np.tile(ids, 8)],
        offsets=[np.concatenate([offsets + k * len(text) for k in range(8)])],
        action_masks=[np.tile(row.action_masks[0], 8)],
        uids=["long"],
    )
    return joined(request, long)


def joined(a: ScoreRequest, b: ScoreRequest) -> ScoreRequest:
    both = {name: [*getattr(a, name), *getattr(b, name)] for name in _LISTS}
    return ScoreRequest(**both, columns={name: [*a.columns[name], *b.columns[name]] for name in a.columns})


def with_another_end(request: ScoreRequest, i: int) -> tuple[int, ScoreRequest | None]:
    """Sample i with the end of another one in the place of its second half, and how many tokens are as they were.

    Cut between characters; None where there is no such place.
    """
    offsets, ids, text = request.offsets[i], request.completion_ids[i], text_of(request.completions[i])
    j = (i + 1) % len(request)
    other, other_ids, other_offsets = text_of(request.completions[j]), request.completion_ids[j], request.offsets[j]
    # A token that starts where the one before it stops: no character is on both sides, and something is on either.
    starts = [t for t in range(1, len(ids)) if offsets[t, 0] == offsets[t - 1, 1] and 0 < offsets[t, 0] < len(text)]
    ends = [t for t in range(1, len(other_ids)) if other_offsets[t, 0] == other_offsets[t - 1, 1]]
    if not starts or not ends:
        return 0, None
    cut = min(starts, key=lambda t: abs(t - len(ids) // 2))
    cut_other = min(ends, key=lambda t: abs(t - len(other_ids) // 2))
    at, at_other = int(offsets[cut, 0]), int(other_offsets[cut_other, 0])
    row = take(request, [i])
    return cut, replace(
        row,
        completions=[_with_text(row.completions[0], text[:at] + other[at_other:])],
        completion_ids=[np.concatenate([ids[:cut], other_ids[cut_other:]])],
        offsets=[np.concatenate([offsets[:cut], other_offsets[cut_other:] - at_other + at])],
        action_masks=[np.concatenate([request.action_masks[i][:cut], request.action_masks[j][cut_other:]])],
        finish_reasons=[request.finish_reasons[j]],
    )


def _score(component: Component, request: ScoreRequest) -> list[Placed | RewardFault]:
    return score_components([component], request)[component.name]


def _same(
    name: str, others: list[list[Placed | RewardFault]], first: list[Placed], says: str, *, exactly: bool = False
) -> Finding:
    worst, where = 0.0, 0
    largest = max((float(np.abs(r[0]).max()) for r in first), default=0.0)
    for other in others:
        for i, (a, b) in enumerate(zip(first, other, strict=True)):
            if isinstance(b, RewardFault):
                return Finding(name, False, f"then it fails: {b}")
            if (a[1] != b[1]).any():
                return Finding(name, False, f"sample {i}: once it applies (is no None), once it does not")
            off = float(np.abs(a[0] - b[0]).max())
            if off > worst:
                worst, where = off, i
    if worst > (0.0 if exactly else TOLERANCE * largest):
        return Finding(name, False, f"sample {where}: its rewards differ by {worst:.4g}")
    return Finding(name, True, says if not worst else f"{says} (but for {worst:.1g})")


def _length(totals: list[float], lengths: list[int]) -> Finding:
    name = "pays no length"
    if len(set(totals)) < 2 or len(set(lengths)) < 2:
        return Finding(name, None, "these samples differ too little in reward or length to tell", must=False)
    corr = float(np.corrcoef(totals, lengths)[0, 1])
    says = f"correlation of the sum with the number of tokens {corr:+.2f} over {len(totals)} samples"
    return Finding(name, abs(corr) <= LENGTH_CORR, says, must=False)
