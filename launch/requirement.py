"""`--require EXPR`: what an evaluation must show, as a gate for scripts.

    NAME OP NUMBER          slot_error < 0.05
    NAME OP base            reward/total > base
    NAME OP against         response/length_mean <= against

OP is one of > >= < <=. It is the 95 % interval that must satisfy it, whole, not the mean: that of NAME, or that of the
difference to the other policy, which is then compared with 0. So `>` asks for proof that it is more, and a mean that
is more by chance does not pass.
"""

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from core.faults import UserError

OPS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
OTHERS = ("base", "against")
_WORDS = {">": "above", ">=": "at or above", "<": "below", "<=": "at or below"}
_SHAPE = re.compile(r"\s*([^\s<>=]+)\s*(>=|<=|>|<)\s*([^\s<>=]+)\s*")


class Interval(Protocol):
    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class Requirement:
    text: str
    name: str
    op: str  # of OPS
    bound: float | str  # a number, or one of OTHERS

    def judge(self, estimate: Interval | None) -> tuple[bool, str]:
        """Whether it is met, and in words why (not). `estimate`: of NAME, or of the difference where `bound` is a
        policy; None where no prompt gave one."""
        other = isinstance(self.bound, str)
        what = f"the difference of {self.name} to {self.bound}" if other else self.name
        bound = 0.0 if other else self.bound
        if estimate is None:
            return False, f"{what} has no value: it applies to no prompt"
        if estimate.low is None:
            return False, f"{what} is {estimate.value:+.4g} on one prompt, which has no interval"
        # The end that is worst for the claim: all the others follow.
        end = estimate.low if self.op in (">", ">=") else estimate.high
        met = OPS[self.op](end, bound)
        sign = "+" if other else ""
        interval = f"{format(estimate.low, f'{sign}.4g')} to {format(estimate.high, f'{sign}.4g')}"
        words = "lies" if met else "does not lie"
        return met, (
            f"{what} is {format(estimate.value, f'{sign}.4g')}, and its 95 % interval ({interval}, {estimate.n}"
            f" prompts) {words} {_WORDS[self.op]} {bound:g}"
        )


def parse(text: str, names: Iterable[str], *, alone: Iterable[str] = ()) -> Requirement:
    """One EXPR. `names`: what an evaluation has; `alone`: those that are no number of one policy, so that only a NUMBER
    can be asked of them. Raises UserError with the nearest name."""
    names, alone = list(names), list(alone)
    here = f"--require {text!r}"
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise UserError(f"{here}: wants NAME OP NUMBER, or NAME OP base; e.g. 'reward/total > base' (OP: > >= < <=)")
    name, op, word = found.groups()
    if name not in [*names, *alone]:
        raise UserError(f"{here}: there is no number {name}{nearest(name, [*names, *alone])}")
    if word in OTHERS:
        if name in alone:
            raise UserError(f"{here}: {name} compares the two already; ask for a number, e.g. '{name} {op} 0.5'")
        return Requirement(text=text, name=name, op=op, bound=word)
    try:
        bound = float(word)
    except ValueError:
        raise UserError(
            f"{here}: {word} is neither a number nor one of {' and '.join(OTHERS)}{nearest(word, OTHERS)}"
        ) from None
    if not math.isfinite(bound):
        raise UserError(f"{here}: {word} is no number that anything can be compared with")
    return Requirement(text=text, name=name, op=op, bound=bound)


def nearest(word: str, names: Iterable[str]) -> str:
    """`; did you mean X?`, or what there is where nothing is near."""
    names = list(names)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    # `total` of `reward/total`: a part that somebody took for the whole.
    close = close or [name for name in names if word in name.split("/")][:1]
    return f"; did you mean {close[0]}?" if close else f"; there is {', '.join(names)}"
