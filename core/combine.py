"""Raw component rewards -> token rewards: normalise, clip, weight, sum. Pure; takes a whole batch sorted by ordinal.

    R(s_t, a_t) = sum_c  w_c * clip_c( r_c(s_t, a_t) / sigma_c )

The weights of a step are a schedule's, or multipliers: to maximise the other components subject to mean(r_c) >= b, the
weight of c follows the subgradient of the Lagrangian, w <- max(0, w + lr * (b - mean(r_c))) (RCPO, arXiv 1805.11074).

Legend: B samples, T response tokens. The mean of dense rewards is never shifted: a non-zero mean per token would be a
bonus or a fine on length.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.schema import RewardConfig


@dataclass
class RunningMoments:
    """Count, mean and sum of squared deviations of all values seen, merged batch by batch (Chan et al. 1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def merge(self, count: float, mean: float, squares: float) -> None:
        if count:
            delta, total = mean - self.mean, self.count + count
            self.squares += squares + delta * delta * self.count * count / total
            self.mean += delta * count / total
            self.count = total

    @property
    def std(self) -> float:
        """Unbiased deviation; 0 while fewer than two values were seen."""
        return (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 else 0.0


@dataclass(frozen=True)
class Combined:
    token_rewards: Tensor  # [B, T] float32, 0 where masked: the tensor that GAE reads, before KL
    weighted: dict[str, Tensor] = field(default_factory=dict)  # name -> [B, T], what each component adds to the sum
    normalized: dict[str, Tensor] = field(default_factory=dict)  # name -> [B, T], after normaliser and clip


def weights_at(step: int, components: dict[str, RewardConfig], multipliers: dict[str, float]) -> dict[str, float]:
    """The weight of each component in `step` (from 1): of its schedule, or its multiplier once that has moved."""
    return {name: multipliers.get(name, spec.weight_at(step)) for name, spec in components.items()}


def next_multipliers(
    means: dict[str, float], components: dict[str, RewardConfig], multipliers: dict[str, float]
) -> dict[str, float]:
    """The multipliers of the next step; `means` are those of the raw sums per response, of all ranks, by component.

    A component without a mean, because it applied to no response, keeps its own.
    """
    moved = dict(multipliers)
    for name, spec in components.items():
        if spec.at_least is not None and name in means:
            now = multipliers.get(name, spec.weight_at(0))
            moved[name] = max(0.0, now + spec.multiplier_lr * (spec.at_least - means[name]))
    return moved


def combine(
    raw: dict[str, Tensor],
    applies: dict[str, Tensor],
    response_mask: Tensor,
    components: dict[str, RewardConfig],
    running: dict[str, RunningMoments],
    *,
    weights: dict[str, float] | None = None,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> Combined:
    """The weighted sum of components for each token.

    Args:
        raw: name -> [B, T] float64, as the component answered.
        applies: name -> [B, T] bool, False where the component gave no answer (None): counts for nothing, not as 0.
        response_mask: [B, T] bool.
        components: weights, normalisers and clips by name; exactly the names of `raw`.
        running: state of the `running` normalisers by name; updated in place, saved with checkpoints.
        weights: of this step (`weights_at`); those that a run begins with if None.
        all_reduce: sums a 1-D float64 tensor over all ranks.
    """
    weights = weights_at(0, components, {}) if weights is None else weights
    if raw.keys() != components.keys():
        raise ValueError(f"components {sorted(components)} are configured, {sorted(raw)} were scored")
    weighted, normalized = {}, {}
    for name, spec in components.items():
        valid = response_mask & applies[name]
        value = torch.where(valid, raw[name].double(), 0.0)
        if spec.normalize != "none":
            count, mean, squares = _moments(value, valid, all_reduce)
            if spec.normalize == "running":
                moments = running.setdefault(name, RunningMoments())
            else:
                moments = RunningMoments()
            moments.merge(count, mean, squares)
            if moments.std > 0:
                value = value / moments.std
        if spec.clip is not None:
            value = value.clamp(-spec.clip, spec.clip)
        normalized[name] = value.float()
        weighted[name] = weights[name] * value
    total = torch.stack(list(weighted.values())).sum(0)
    return Combined(
        token_rewards=total.float(),
        weighted={name: w.float() for name, w in weighted.items()},
        normalized=normalized,
    )


def attribution(
    combined: Combined, lengths: Tensor, *, all_reduce: Callable[[Tensor], Tensor] | None = None
) -> dict[str, dict[str, float]]:
    """Where the reward of the responses of a batch, all ranks together, comes from.

    Args:
        lengths: [B] tokens of the policy in each response.
    Returns:
        `variance_share`: name -> cov(what the component adds, total) / var(total) over the sums of responses; the
        shares sum to 1. `length_corr`: name -> Pearson correlation of what it adds with the length. A name is left out
        where a variance is 0.
    """
    reduce = all_reduce or (lambda sums: sums)
    parts = {name: w.double().sum(dim=1) for name, w in combined.weighted.items()}
    columns = torch.stack([*parts.values(), sum(parts.values()), lengths.double()])  # [C + 2, B]
    count = reduce(torch.tensor([float(len(lengths))], dtype=torch.float64)).clamp(min=1)
    off = columns - (reduce(columns.sum(dim=1)) / count)[:, None]
    square = reduce((off @ off.T).flatten()).reshape(len(columns), len(columns))
    *of_parts, total, length = range(len(columns))
    share, corr = {}, {}
    for name, i in zip(parts, of_parts, strict=True):
        if square[total, total] > 0:
            share[name] = float(square[i, total] / square[total, total])
        spread = float(square[i, i] * square[length, length])
        if spread > 0:
            corr[name] = float(square[i, length]) / spread**0.5
    return {"variance_share": share, "length_corr": corr}


def total_std(combined: Combined, *, all_reduce: Callable[[Tensor], Tensor] | None = None) -> float:
    """Standard deviation of the total reward between the responses of a batch, all ranks together. NaN without any."""
    reduce = all_reduce or (lambda sums: sums)
    totals = combined.token_rewards.double().sum(dim=1)
    count, total = reduce(torch.stack([torch.tensor(float(len(totals)), dtype=torch.float64), totals.sum()]))
    (squares,) = reduce((totals - total / count.clamp(min=1)).square().sum().reshape(1))
    return float(torch.sqrt(squares / count)) if count > 0 else float("nan")


def _moments(value: Tensor, valid: Tensor, all_reduce: Callable[[Tensor], Tensor] | None) -> tuple[float, float, float]:
    """Count, mean and sum of squared deviations over the valid tokens of all ranks. value is 0 where not valid."""
    reduce = all_reduce or (lambda sums: sums)
    total, count = reduce(torch.stack([value.sum(), valid.sum().double()]))
    mean = total / count.clamp(min=1)
    (squares,) = reduce(torch.where(valid, (value - mean).square(), 0.0).sum().reshape(1))
    return float(count), float(mean), float(squares)
