"""What scored trajectories are worth: means by component, for evaluations and for the rows of training."""

from core.metrics import Sums
from core.schema import RewardConfig
from core.trajectory import Trajectory


def evaluation_sums(trajectories: list[Trajectory], components: dict[str, RewardConfig]) -> Sums:
    """Sums over the responses of an evaluation, under names of core/metrics.py with `eval/` before them.

    A component of weight 0 is a metric of its own (`eval/slot_error`); the others are `eval/reward/<name>/raw`, and
    `eval/reward/total` is their weighted sum without normalisers, by the weights that a schedule ends with and that a
    multiplier begins with: one yardstick for the whole run.
    A component that does not apply to a response (None) does not count in its own mean.
    """
    sums, n = Sums(), len(trajectories)
    total = 0.0
    for name, spec in components.items():
        raw = [float(t.component_rewards[name][t.action_mask].sum()) for t in trajectories]
        total += spec.last_weight * sum(raw)
        applied = sum(bool(t.component_mask[name].any()) for t in trajectories)
        sums.add(f"eval/reward/{name}/raw" if spec.paid else f"eval/{name}", sum(raw), applied)
    sums.add("eval/reward/total", total, n)
    sums.add("eval/response/length_mean", sum(int(t.action_mask.sum()) for t in trajectories), n)
    sums.add("eval/response/truncated_frac", sum(t.finish_reason == "length" for t in trajectories), n)
    return sums


def summary_of(means: dict[str, float]) -> dict[str, float]:
    """The same numbers as summary.json holds them: `slot_error`, `reward/total`, `reward/consistency/raw`, ..."""
    return {name.removeprefix("eval/"): value for name, value in means.items()}
