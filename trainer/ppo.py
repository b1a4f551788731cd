"""PPO on token rewards: pure functions, tensors and numbers in, tensors out.

Legend: B samples, T response tokens. Every [B, T] tensor is indexed by the response token it belongs to. A masked
position may hold any number, NaN included: nothing depends on it, and every masked output is exactly 0. We select
with `torch.where` and never multiply by the mask, because 0 * inf is NaN.

Sources: GAE, Schulman et al. 2016 (arXiv 1506.02438); PPO, Schulman et al. 2017 (arXiv 1707.06347); dual clip, Ye et
al. 2020 (arXiv 1912.09729); KL estimators, Schulman 2020 (joschu.net/blog/kl-approx.html); KL in the reward and the
adaptive coefficient, Ziegler et al. 2019 (arXiv 1909.08593).
"""

from collections.abc import Callable

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]  # sums a 1-D float64 tensor over all ranks


def _same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def _select(x: Tensor, mask: Tensor) -> Tensor:
    """x where valid, 0 elsewhere, in float32 at least; where masked the gradient is 0, whatever stood there."""
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over valid / number of valid; 0 if none is valid. Shapes [B, T] -> scalar."""
    _same_shape(x=x, mask=mask)
    mask = mask.bool()
    return _select(x, mask).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, *, center: bool = True, all_reduce: AllReduce | None = None) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the valid tokens of all ranks; `center=False` adds the mean back.

    The variance is unbiased (n - 1) and taken about the mean in float64. One valid token has variance 0.

    Args:
        x, mask: [B, T].
        all_reduce: sums a float64 vector over ranks; None for one process. Every rank must call, empty ones too.
    Returns:
        [B, T] in the dtype of x, float32 at least.
    """
    _same_shape(x=x, mask=mask)
    mask = mask.bool()
    reduce = all_reduce or (lambda sums: sums)
    wide = _select(x, mask).double()
    total, count = reduce(torch.stack([wide.sum(), mask.sum().double()]))
    mean = total / count.clamp(min=1)
    (squares,) = reduce(_select((wide - mean).square(), mask).sum().reshape(1))
    y = (wide - mean) * torch.rsqrt(squares / (count - 1).clamp(min=1) + 1e-8)
    return _select(y if center else y + mean, mask).to(torch.promote_types(x.dtype, torch.float32))


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, equation 16 of arXiv 1506.02438, over the valid tokens of each row.

        delta_k = r_k + gamma * V_(k+1) - V_k        A_k = delta_k + gamma * gae_lambda * A_(k+1)

    "Next" is the next valid position: masked tokens in between are no time steps.

    Args:
        rewards, values, response_mask: [B, T].
        bootstrap_values: [B], V of the state after the last valid token, for responses that were cut; None is 0.
    Returns:
        advantages, returns (= advantages + values, before whitening), [B, T].
    """
    _same_shape(rewards=rewards, values=values, response_mask=response_mask)
    if bootstrap_values is not None and bootstrap_values.shape != values.shape[:1]:
        raise ValueError(
            f"bootstrap_values {tuple(bootstrap_values.shape)} is not one per row of {tuple(values.shape)}"
        )
    mask = response_mask.bool()
    rewards, values = _select(rewards, mask), _select(values, mask)
    next_value = torch.zeros_like(values[:, 0]) if bootstrap_values is None else bootstrap_values.to(values.dtype)
    advantage = torch.zeros_like(next_value)
    columns = []
    for t in reversed(range(values.shape[1])):
        valid = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(valid, delta + gamma * gae_lambda * advantage, advantage)
        next_value = torch.where(valid, values[:, t], next_value)
        columns.append(advantage)
    advantages = _select(torch.stack(columns[::-1], dim=1), mask)
    return advantages, advantages + values


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from sampled tokens, in nats: k1, k2 or k3. Nothing is clamped.

    With d = ref_logprobs - logprobs: k1 = -d (unbiased, may be negative), k2 = d^2 / 2, k3 = exp(d) - 1 - d.
    """
    _same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    d = ref_logprobs - logprobs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.expm1(d) - d
    raise ValueError(f"kl estimator {estimator!r} is unknown: use k1, k2 or k3")


def shape_rewards(
    token_rewards: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
) -> Tensor:
    """r_t = R_t - kl_coef * KL_t where valid, 0 elsewhere. All [B, T]."""
    _same_shape(
        token_rewards=token_rewards, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, response_mask=response_mask
    )
    mask = response_mask.bool()
    kl = kl_estimate(_select(old_logprobs, mask), _select(ref_logprobs, mask), estimator)
    return _select(_select(token_rewards, mask) - kl_coef * kl, mask)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    cliprange: float,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate, equation 7 of arXiv 1707.06347, as a sum over valid tokens / normalizer.

        l = max(-A ratio, -A clip(ratio, 1 - cliprange, 1 + cliprange_high))      ratio = exp(logprobs - old_logprobs)

    Args:
        logprobs, old_logprobs, advantages, response_mask: [B, T]; the loss is differentiable in `logprobs`.
        cliprange_high: upper clip, `cliprange` if None.
        dual_clip: c > 1 bounds the loss of tokens with A < 0 at -c A (arXiv 1912.09729, equation 5).
        normalizer: valid tokens of the whole optimizer step over all micro-batches and ranks; those of this call if
            None.
    Returns:
        loss (scalar), stats: means over the valid tokens of this call of `pg_clipfrac`, `approx_kl` (k1: old - new)
        and `ratio_mean`.
    """
    _same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, response_mask=response_mask)
    mask = response_mask.bool()
    count = mask.sum().clamp(min=1)
    log_ratio = _select(logprobs, mask) - _select(old_logprobs, mask)
    ratio = log_ratio.exp()
    minus_a = -_select(advantages, mask)
    high = cliprange if cliprange_high is None else cliprange_high
    unclipped, clipped = minus_a * ratio, minus_a * ratio.clamp(1 - cliprange, 1 + high)
    loss = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        loss = torch.where(minus_a > 0, torch.minimum(loss, dual_clip * minus_a), loss)
    stats = {
        "pg_clipfrac": masked_mean((clipped > unclipped).to(ratio.dtype), mask),
        "approx_kl": masked_mean(-log_ratio, mask).detach(),
        "ratio_mean": masked_mean(ratio, mask).detach(),
    }
    return _select(loss, mask).sum() / (count if normalizer is None else normalizer), stats


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    cliprange_value: float,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """0.5 * sum max((V - ret)^2, (clip(V, old - c, old + c) - ret)^2) / normalizer, over valid tokens.

    Args:
        values, old_values, returns, response_mask: [B, T]; differentiable in `values`.
        normalizer: as in `policy_loss`.
    Returns:
        loss (scalar), stats: `vf_clipfrac`, the share of valid tokens whose clipped square is strictly larger.
    """
    _same_shape(values=values, old_values=old_values, returns=returns, response_mask=response_mask)
    mask = response_mask.bool()
    values, old_values, returns = (_select(x, mask) for x in (values, old_values, returns))
    clipped = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    plain_sq, clipped_sq = (values - returns).square(), (clipped - returns).square()
    stats = {"vf_clipfrac": masked_mean((clipped_sq > plain_sq).to(values.dtype), mask)}
    loss = _select(0.5 * torch.maximum(plain_sq, clipped_sq), mask).sum()
    return loss / (mask.sum().clamp(min=1) if normalizer is None else normalizer), stats


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, *, all_reduce: AllReduce | None = None) -> float:
    """1 - Var(returns - values) / Var(returns) over the valid tokens of all ranks; 0 if the returns do not vary.

    1 is a perfect critic, 0 no better than the mean, negative worse than it.
    """
    _same_shape(values=values, returns=returns, mask=mask)
    mask = mask.bool()
    ret, err = _select(returns, mask).double(), _select(returns - values, mask).double()
    reduce = all_reduce or (lambda sums: sums)
    n, ret_sum, err_sum = reduce(torch.stack([mask.sum().double(), ret.sum(), err.sum()]))
    n = n.clamp(min=1)
    squares = [_select((x - x_sum / n).square(), mask).sum() for x, x_sum in ((ret, ret_sum), (err, err_sum))]
    ret_sq, err_sq = reduce(torch.stack(squares))
    varies = ret_sq > 1e-12 * (ret_sq + n * (ret_sum / n).square())  # rounding alone is no variance
    return float(1 - err_sq / ret_sq) if varies else 0.0


class KLController:
    """kl_coef, fixed or steered towards a target: section 2.2 of arXiv 1909.08593.

        e = clip(kl / target - 1, -0.2, 0.2)        coef <- coef * (1 + e * n / horizon)

    `target_kl` and the kl given to `update` are nats per response (summed over its tokens), n is responses.
    """

    def __init__(self, kl_coef: float, *, target_kl: float | None = None, horizon: int = 10_000) -> None:
        self.coef, self.target_kl, self.horizon = kl_coef, target_kl, horizon

    def update(self, kl_per_response: float, n_responses: int) -> None:
        if self.target_kl is not None:
            error = min(max(kl_per_response / self.target_kl - 1, -0.2), 0.2)
            self.coef *= 1 + error * n_responses / self.horizon
