"""What a check says, and what it is told."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from core.faults import ProcessFault, UserError
from core.schema import Config
from launch.memory import Sharding

Status = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line. `FAIL`: a run would stop; `warn`: it would go on, slower or with less than one thinks."""

    status: Status
    seen: str
    remedy: str = ""
    exit_code: int = ProcessFault.exit_code  # of a FAIL


def ok(seen: str) -> Finding:
    return Finding(status="ok", seen=seen)


def warn(seen: str, remedy: str) -> Finding:
    return Finding(status="warn", seen=seen, remedy=remedy)


def fail(seen: str, remedy: str) -> Finding:
    """Of this machine."""
    return Finding(status="FAIL", seen=seen, remedy=remedy)


def fail_of_config(seen: str, remedy: str) -> Finding:
    return Finding(status="FAIL", seen=seen, remedy=remedy, exit_code=UserError.exit_code)


@dataclass(frozen=True, kw_only=True)
class Situation:
    """For which run the machine is looked at."""

    cfg: Config
    whole: bool  # False: only its sections `run` and `resources` count, the rest stands in for what was not given
    sharding: Sharding


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    looks_at: str  # for docs/doctor.md
    says: str  # what is a warning and what a FAIL, for docs/doctor.md
    look: Callable[[Situation], list[Finding]]  # at least one
    deadline_s: float = 20.0
    of_config: bool = False  # only where there is a whole configuration
    imports_torch: bool = False  # into this process: those are done one after the other
