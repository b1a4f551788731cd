"""What scored trajectories are worth, one by one, and the means of that: in training and in `tokenppo eval`."""

from dataclasses import dataclass

from core.metrics import Sums
from core.schema import RewardConfig
from core.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One held-out response in numbers, under the names of summary.json.

        EvaluationRow(ordinal=3, k=0, values={"reward/total": 4.5, "slot_error": None, "response/length_mean": 21.0})

    None: the component does not apply to this response.
    """

    ordinal: int
    k: int
    values: dict[str, float | None]


def name_of(component: str, spec: RewardConfig) -> str:
    """A component of weight 0 is a metric of its own (`slot_error`); the others are `reward/<name>/raw`."""
    return f"reward/{component}/raw" if spec.paid else component


def evaluation_rows(trajectories: list[Trajectory], components: dict[str, RewardConfig]) -> list[EvaluationRow]:
    """The numbers of each response, in the order of `trajectories`; by which weights, says `evaluation_sums`."""
    rows = []
    for t in trajectories:
        raw = {name: float(t.component_rewards[name][t.action_mask].sum()) for name in components}
        total = sum(spec.last_weight * raw[name] for name, spec in components.items())
        values: dict[str, float | None] = {"reward/total": total}
        for name, spec in components.items():
            values[name_of(name, spec)] = raw[name] if t.component_mask[name].any() else None
        values["response/length_mean"] = float(t.action_mask.sum())
        values["response/truncated_frac"] = float(t.finish_reason == "length")
        rows.append(EvaluationRow(ordinal=t.request.ordinal, k=t.request.k, values=values))
    return rows


def evaluation_sums(rows: list[EvaluationRow], components: dict[str, RewardConfig]) -> Sums:
    """Sums over the responses of an evaluation, under names of core/metrics.py with `eval/` before them.

    `eval/reward/total` is the weighted sum of components without normalisers, by the weights that a schedule ends with
    and that a multiplier begins with: one yardstick for the whole run.
    A component that does not apply to a response (None) does not count in its own mean.
    """
    sums, n = Sums(), len(rows)
    total = 0.0
    for component, spec in components.items():
        name = name_of(component, spec)
        raw = [x for row in rows if (x := row.values[name]) is not None]
        total += spec.last_weight * sum(raw)  # over the rows' totals it would be this but for the last bits
        sums.add(f"eval/{name}", sum(raw), len(raw))
    sums.add("eval/reward/total", total, n)
    for name in ("response/length_mean", "response/truncated_frac"):
        sums.add(f"eval/{name}", sum(row.values[name] for row in rows), n)
    return sums


def summary_of(means: dict[str, float]) -> dict[str, float]:
    """The same numbers as summary.json holds them: `slot_error`, `reward/total`, `reward/consistency/raw`, ..."""
    return {name.removeprefix("eval/"): value for name, value in means.items()}
