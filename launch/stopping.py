"""Which evaluation of a run was the best, and when a run ends before `run.steps`. Its state is in the checkpoint."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from core.schema import RunSection

PATIENCE, MAX_KL = "patience", "max_kl"  # also the keys of `run` that hold the limits


@dataclass
class Stopping:
    """Counts evaluations since the best one. Fed with means over all ranks, so it says the same on each.

    The evaluation of the first policy is no candidate: `best/` holds trained weights.
    """

    metric: str  # of an evaluation, as summary.json names it; `-` before it: lower is better
    patience: int | None
    max_kl: float | None
    best: float | None = None
    since: int = 0  # evaluations after the best one

    @classmethod
    def of(cls, run: RunSection) -> "Stopping":
        return cls(metric=run.best_metric, patience=run.patience, max_kl=run.max_kl)

    def is_best(self, means: dict[str, float]) -> bool:
        """Take an evaluation of a trained policy into account; whether it is better than all before it.

        NaN (no response had the metric) is never better, and anything is better than NaN.
        """
        name = self.metric.removeprefix("-")
        value = means.get(name, math.nan)
        score = -value if self.metric.startswith("-") else value
        if self.best is None or score > self.best or (math.isnan(self.best) and not math.isnan(score)):
            self.best, self.since = score, 0
            return True
        self.since += 1
        return False

    def reason(self, means: dict[str, float]) -> str | None:
        """Why the run ends after the step with these means, as summary.json has it; None: it goes on."""
        if self.max_kl is not None and means.get("objective/kl", 0.0) > self.max_kl:
            return MAX_KL
        return PATIENCE if self.patience is not None and self.since >= self.patience else None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name in ("best", "since")}

    def restore(self, saved: dict[str, Any]) -> None:
        self.best, self.since = saved["best"], saved["since"]
