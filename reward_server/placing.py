"""One entry of a component's answer -> one raw reward per token. Nothing is lost on the way, or it is an error.

Legend: T response tokens.
"""

import math
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from core.faults import RewardFault


class Span(NamedTuple):
    """A score for the characters [start, end) of the completion, in code points; its tokens share it evenly."""

    start: int
    end: int
    score: float


LARGEST = 1e9  # of a raw reward; what is larger is a mistake, and a float32 would no longer hold its sums
Spans = Literal["spread", "last"]  # where the score of a span goes: evenly to its tokens, or to the last of them
Observations = Literal["refuse", "drop"]  # what becomes of a score on nothing but tokens of an environment


def place(
    answer: Any,
    offsets: np.ndarray,
    *,
    component: str,
    uid: str,
    spans: Spans = "spread",
    action_mask: np.ndarray | None = None,
    observations: Observations = "refuse",
) -> tuple[np.ndarray, np.ndarray]:
    """One entry of a component's answer as raw rewards [T] float64 and mask [T] bool (False: does not apply).

    `offsets` [T, 2] are the code points of each token, covering the text, starts in ascending order. A span goes to
    the tokens it overlaps, where a character shared by several tokens counts for its last one; they share the score
    evenly (or the last gets all), and where spans meet on a token their parts add up. `math.fsum` of what is placed is
    that of the scores, exactly: the last token takes the remainder.

    Rewards are the policy's: where `action_mask` [T] bool is False an environment wrote, and nothing is placed. A float
    goes to the last token of the policy, a span to those of the policy that it overlaps, with its whole score. A span
    that overlaps none, and a number other than 0 in a list of T, are errors (`refuse`) or left out (`drop`).

    Raises RewardFault, naming component and sample, for anything else, and for an entry that is a RewardFault itself,
    as a component that asks another server has for the samples that failed there.
    """

    def fault(reason: str) -> RewardFault:
        return RewardFault(f"sample {uid}: component {component!r}: {reason}")

    tokens = len(offsets)
    if tokens == 0:
        raise fault("the response has no tokens, so there is nothing to reward; aborted responses are not scored")
    own = np.ones(tokens, dtype=bool) if action_mask is None else action_mask
    if not own.any():
        raise fault("the policy wrote no token of the response, so there is nothing to reward")
    if isinstance(answer, RewardFault):
        raise fault(str(answer))
    rewards = np.zeros(tokens)
    if answer is None:
        return rewards, np.zeros(tokens, dtype=bool)
    if isinstance(answer, list) and all(isinstance(entry, Span) for entry in answer):
        if answer:
            _place_spans(answer, np.asarray(offsets), own, rewards, fault, spans, observations)
        return rewards, np.ones(tokens, dtype=bool)
    allowed = (
        f"allowed: a finite float (at most {LARGEST:g}), a list of {tokens} finite floats, a list of"
        " Span(start, end, score), or None"
    )
    # Arrays, tensors and their scalars; rows of numbers are checked as they are, without a Python object for each.
    is_row = isinstance(answer, np.ndarray) and answer.dtype.kind == "f" and answer.ndim == 1
    plain = answer if is_row or not hasattr(answer, "tolist") else answer.tolist()
    if not is_row and not isinstance(plain, list):
        last = np.flatnonzero(own)[-1]
        rewards[last] = _number(plain)
        if not abs(rewards[last]) <= LARGEST:
            raise fault(f"got {shown(answer)}; {allowed}")
    else:
        if len(plain) != tokens:
            raise fault(f"got a list of {len(plain)} entries for {tokens} tokens; {allowed}")
        rewards[:] = plain if is_row else [_number(entry) for entry in plain]
        if not (np.abs(rewards) <= LARGEST).all():
            wrong = np.flatnonzero(~(np.abs(rewards) <= LARGEST))
            raise fault(f"got {shown(plain[wrong[0]])} for token {wrong[0]}; {allowed}")
        foreign = np.flatnonzero((rewards != 0) & ~own)
        if len(foreign) and observations == "refuse":
            at = int(foreign[0])
            raise fault(f"got {shown(plain[at])} for token {at}, {_FOREIGN}")
        rewards[foreign] = 0.0
    return rewards, np.ones(tokens, dtype=bool)


_FOREIGN = (
    "which the environment wrote: rewards are the policy's (`action_masks` says whose a token is; observations: drop in"
    " the configuration of the component leaves such scores out)"
)


def _place_spans(
    answer: list[Span],
    offsets: np.ndarray,
    own: np.ndarray,
    rewards: np.ndarray,
    fault: Callable[[str], RewardFault],
    how: Spans,
    observations: Observations,
) -> None:
    """Adds the parts of each span to `rewards` [T]; `offsets` [T, 2], `own` [T] bool."""
    starts, stops = offsets[:, 0], offsets[:, 1]
    length = int(stops.max())
    # A token owns its characters up to the start of the next token that has any: a shared one is its last token's.
    nowhere = length + 1
    from_here = np.minimum.accumulate(np.where(stops > starts, starts, nowhere)[::-1])[::-1]
    owned_stops = np.minimum(stops, np.append(from_here[1:], nowhere))
    scores, last = [], 0
    for span in answer:
        start, end, score = _index(span.start), _index(span.end), _number(span.score)
        if start is None or end is None:
            raise fault(f"{shown(span)}: start and end are whole numbers of characters")
        if not abs(score) <= LARGEST:
            raise fault(f"{shown(span)}: the score must be a finite float, at most {LARGEST:g}")
        if not 0 <= start < end <= length:
            raise fault(f"{shown(span)}: allowed is 0 <= start < end <= {length}, the characters of the completion")
        reached = np.flatnonzero((starts < end) & (owned_stops > start) & (owned_stops > starts))
        if len(reached) == 0:
            raise fault(f"{shown(span)} meets no token")
        reached = reached[own[reached]]
        if len(reached) == 0:
            if observations == "refuse":
                raise fault(f"{shown(span)} meets nothing but tokens {_FOREIGN}")
            continue
        reached = reached[-1:] if how == "last" else reached
        part = score / len(reached)
        parts = [part] * (len(reached) - 1)
        parts.append(math.fsum([score, *(-part for part in parts)]))
        rewards[reached] += parts
        scores.append(score)
        last = max(last, int(reached[-1]))
    if not (np.abs(rewards) <= LARGEST).all():
        raise fault(f"the scores of its spans add up to more than {LARGEST:g} on one token")
    if scores:
        _conserve(rewards, own, last, scores, fault)


def _conserve(
    rewards: np.ndarray, own: np.ndarray, last: int, scores: list[float], fault: Callable[[str], RewardFault]
) -> None:
    """What adding parts where spans meet has rounded away goes to token `last`, the last one that got any.

    Where large scores cancel, its float64 may be too coarse for that: then to the token with the smallest reward that
    takes it. It is less than the last binary digit of the largest score. Only tokens of the policy (`own`) take any.
    """
    emitted = math.fsum(scores)
    missing = math.fsum([emitted, *(-x for x in rewards.tolist())])
    smallest = np.argsort(np.abs(rewards), kind="stable")
    for token in [last, *smallest[own[smallest]].tolist()]:
        if math.fsum(rewards.tolist()) == emitted:
            return
        before = rewards[token]
        rewards[token] += missing
        if math.fsum(rewards.tolist()) != emitted:
            rewards[token] = before
    if math.fsum(rewards.tolist()) != emitted:
        raise fault(f"its spans add up to {emitted!r}, which no float64 of its tokens can hold beside the others")


def _number(value: Any) -> float:
    """`value` as a float; NaN for anything that is no number, bool included, which the caller refuses."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an int that no float holds
        return math.inf


def _index(value: Any) -> int | None:
    """`value` as an int, numpy's included; None for anything else, bool included."""
    try:
        return None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        return None


def shown(value: Any) -> str:
    """A value in a message: short, one line, with its type where that is not obvious."""
    text = " ".join(repr(value).split())
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return text if isinstance(value, Span) or value is None else f"{text} ({type(value).__name__})"
