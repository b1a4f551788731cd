"""What scored trajectories are worth: means by component, for evaluations and for the rows of training."""

from core.config import RewardConfig
from core.metrics import Sums
from core.trajectory import Trajectory


def evaluation_means(trajectories: list[Trajectory], components: dict[str, RewardConfig]) -> dict[str, float]:
    """Means per response over an evaluation, under names of core/metrics.py with `eval/` before them.

    A component of weight 0 is a metric of its own (`eval/slot_error`); the others are `eval/reward/<name>/raw`, and
    `eval/reward/total` is their weighted sum as configured, without normalisers: one yardstick for the whole run.
    A component that does not apply to a response (None) does not count in its own mean.
    """
    sums = Sums()
    for t in trajectories:
        total = 0.0
        for name, spec in components.items():
            raw = float(t.component_rewards[name].sum())
            total += spec.weight * raw
            applies = bool(t.component_mask[name].any())
            key = f"eval/reward/{name}/raw" if spec.weight else f"eval/{name}"
            sums.add(key, raw, 1.0 if applies else 0.0)
        sums.add("eval/reward/total", total, 1)
        sums.add("eval/response/length_mean", len(t), 1)
        sums.add("eval/response/truncated_frac", float(t.finish_reason == "length"), 1)
    return sums.means()


def summary_of(means: dict[str, float]) -> dict[str, float]:
    """The same numbers as summary.json holds them: `slot_error`, `reward/total`, `reward/consistency/raw`, ..."""
    return {name.removeprefix("eval/"): value for name, value in means.items()}
