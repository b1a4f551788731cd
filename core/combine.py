"""Raw component rewards -> token rewards: normalise, clip, weight, sum. Pure; takes a whole batch sorted by ordinal.

    R(s_t, a_t) = sum_c  w_c * clip_c( r_c(s_t, a_t) / sigma_c )

Legend: B samples, T response tokens. The mean of dense rewards is never shifted: a non-zero mean per token would be a
bonus or a fine on length.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.config import RewardConfig


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


def combine(
    raw: dict[str, Tensor],
    applies: dict[str, Tensor],
    response_mask: Tensor,
    components: dict[str, RewardConfig],
    running: dict[str, RunningMoments],
    *,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> Combined:
    """The weighted sum of components for each token.

    Args:
        raw: name -> [B, T] float64, as the component answered.
        applies: name -> [B, T] bool, False where the component gave no answer (None): counts for nothing, not as 0.
        response_mask: [B, T] bool.
        components: weights, normalisers and clips by name; exactly the names of `raw`.
        running: state of the `running` normalisers by name; updated in place, saved with checkpoints.
        all_reduce: sums a 1-D float64 tensor over all ranks.
    """
    if raw.keys() != components.keys():
        raise ValueError(f"components {sorted(components)} are configured, {sorted(raw)} were scored")
    weighted = {}
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
        weighted[name] = spec.weight * value
    total = torch.stack(list(weighted.values())).sum(0)
    return Combined(token_rewards=total.float(), weighted={name: w.float() for name, w in weighted.items()})


def _moments(value: Tensor, valid: Tensor, all_reduce: Callable[[Tensor], Tensor] | None) -> tuple[float, float, float]:
    """Count, mean and sum of squared deviations over the valid tokens of all ranks. value is 0 where not valid."""
    reduce = all_reduce or (lambda sums: sums)
    total, count = reduce(torch.stack([value.sum(), valid.sum().double()]))
    mean = total / count.clamp(min=1)
    (squares,) = reduce(torch.where(valid, (value - mean).square(), 0.0).sum().reshape(1))
    return float(count), float(mean), float(squares)
