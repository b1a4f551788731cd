"""The policy's side of the loss: a sum over tokens, whatever pieces they come in.

    loss = sum_t [ w_t l_t + kl_loss_coef KL_t - entropy_coef H_t ] / normalizer

l the clipped surrogate, w the importance weight of `importance_cap`, KL the loss of `kl_loss_coef` (trainer/ppo.py has
all three), H the entropy. Nothing here is a mean: the loss and the sums of any cut of the tokens add up to those of
all. So a fused head may ask for them chunk by chunk and differentiate by log-probs and entropies alone. Nothing waits
for the device.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from core.schema import PPOConfig
from trainer import ppo

RATIO_ERROR = "ratio_error"  # max |ratio - 1|: no metric
# Maxima too: distances of this forward from what workers that emit values said of the same tokens (trainer/learner.py).
LOGPROB_ERROR, VALUE_ERROR = "logprob_error", "value_error"
LARGEST = (RATIO_ERROR, LOGPROB_ERROR, VALUE_ERROR)


@dataclass(frozen=True, kw_only=True)
class TokenFields:
    """What is known of tokens besides the policy that is trained, all of one shape: [B, T], or [c] tokens."""

    mask: Tensor  # bool: nothing depends on what stands where it is False
    old_logprobs: Tensor
    ref_logprobs: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor

    def __getitem__(self, tokens: slice | Tensor) -> "TokenFields":
        """Some of the tokens."""
        return TokenFields(**{f.name: getattr(self, f.name)[tokens] for f in fields(self)})


def policy_objective(
    logprobs: Tensor, entropy: Tensor | None, given: TokenFields, cfg: PPOConfig, normalizer: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of these tokens, and what is to be known of them.

    Args:
        logprobs, entropy: of the shape of the fields; the loss is differentiable in both. entropy may be None where
            `cfg.entropy_coef` is 0.
        normalizer: valid tokens of the whole optimizer step, over all micro-batches and ranks.
    Returns:
        loss (scalar), sums: name of a metric -> its numerator over the valid tokens (float64 scalars without graph; the
        denominator is the number of valid tokens), and RATIO_ERROR. `add_up` puts the sums of several calls together.
    """
    mask = given.mask.bool()
    loss, clipped, log_ratio = ppo.surrogate(
        logprobs,
        given.old_logprobs,
        given.advantages,
        mask,
        cliprange=cfg.cliprange,
        cliprange_high=cfg.cliprange_high,
        dual_clip=cfg.dual_clip,
    )
    sums: dict[str, Tensor] = {}
    if cfg.importance_cap is not None:
        weights = ppo.importance_weights(given.old_logprobs, given.rollout_logprobs, mask, cfg.importance_cap)
        loss = weights * loss
        sums["ppo/importance_mean"] = weights
        sums["ppo/importance_capped_frac"] = weights >= cfg.importance_cap
    ratio = log_ratio.detach().exp()
    sums |= {
        "loss/policy": loss,
        "ppo/pg_clipfrac": clipped,
        "ppo/approx_kl": -log_ratio,
        "ppo/ratio_mean": torch.where(mask, ratio, 0.0),
    }
    if cfg.kl_loss_coef:
        kl = ppo.kl_loss(logprobs, given.ref_logprobs, mask, cfg.kl_loss)
        loss = loss + cfg.kl_loss_coef * kl
        sums["loss/kl"] = kl
    if cfg.entropy_coef:
        if entropy is None:
            raise ValueError(f"entropy_coef {cfg.entropy_coef} wants the entropy of each token; got None")
        entropy = torch.where(mask, entropy, torch.zeros((), dtype=entropy.dtype, device=entropy.device))
        loss = loss - cfg.entropy_coef * entropy
        sums["loss/entropy"] = entropy
    numbers = {name: x.detach().double().sum() for name, x in sums.items()}
    off = (ratio - 1).abs()  # a masked token has ratio 1
    numbers[RATIO_ERROR] = (off.max() if off.numel() else off.sum()).double()
    return loss.sum() / normalizer, numbers


def add_up(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sums of all tokens from those of their parts: added, but for those of LARGEST, which are maxima."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, x in part.items():
            if name not in total:
                total[name] = x
            else:
                total[name] = torch.maximum(total[name], x) if name in LARGEST else total[name] + x
    return total
