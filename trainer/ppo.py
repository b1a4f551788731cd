"""PPO on token rewards: pure functions, tensors and numbers in, tensors out.

Legend: B samples, T response tokens. Every [B, T] tensor is indexed by the response token it belongs to. A masked
position may hold any number, NaN included: nothing depends on it, and every masked output is exactly 0. We select
with `torch.where` and never multiply by the mask, because 0 * inf is NaN.

Sources: GAE, Schulman et al. 2016 (arXiv 1506.02438), with a lambda for each response, Yue et al. 2025 (arXiv
2504.05118); PPO, Schulman et al. 2017 (arXiv 1707.06347); dual clip, Ye et al. 2020 (arXiv 1912.09729); truncated
importance weights, Espeholt et al. 2018 (arXiv 1802.01561) and Yao et al. 2025 (fengyao.notion.site/off-policy-rl); KL
estimators, Schulman 2020 (joschu.net/blog/kl-approx.html), their gradients, Tang and Munos 2025 (arXiv 2506.09477); KL
in the reward and the adaptive coefficient, Ziegler et al. 2019 (arXiv 1909.08593).
"""

from collections.abc import Callable

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]  # sums a 1-D float64 tensor over all ranks

BLOCK = 64  # tokens that `compute_gae` walks one by one; a constant, so that no bit depends on the width of a batch


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


def moments(x: Tensor, mask: Tensor, *, all_reduce: AllReduce | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations from it over the valid tokens of all ranks: three float64 scalars.

    x and mask are [B, T]. Two passes, because a difference of squares cancels. Every rank must call, empty ones too.
    """
    _same_shape(x=x, mask=mask)
    mask = mask.bool()
    reduce = all_reduce or (lambda sums: sums)
    wide = _select(x, mask).double()
    total, count = reduce(torch.stack([wide.sum(), mask.sum().double()]))
    mean = total / count.clamp(min=1)
    (squares,) = reduce(_select((wide - mean).square(), mask).sum().reshape(1))
    return count, mean, squares


def whitening(x: Tensor, mask: Tensor, *, all_reduce: AllReduce | None = None) -> tuple[Tensor, Tensor]:
    """The mean over the valid tokens of all ranks, and 1 / sqrt(var + 1e-8): two float64 scalars.

    The variance is unbiased (n - 1) and taken about the mean in float64. One valid token has variance 0.

    Args:
        x, mask: [B, T].
        all_reduce: sums a float64 vector over ranks; None for one process. Every rank must call, empty ones too.
    """
    count, mean, squares = moments(x, mask, all_reduce=all_reduce)
    return mean, torch.rsqrt(squares / (count - 1).clamp(min=1) + 1e-8)


def whiten(x: Tensor, mask: Tensor, by: tuple[Tensor, Tensor] | None = None, *, center: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the valid tokens; `center=False` adds the mean back.

    Args:
        x, mask: [B, T].
        by: of `whitening`, where all ranks have made it; None: of these rows alone.
    Returns:
        [B, T] in the dtype of x, float32 at least.
    """
    mean, factor = whitening(x, mask) if by is None else by
    mask = mask.bool()
    y = (_select(x, mask).double() - mean) * factor
    return _select(y if center else y + mean, mask).to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def compute_gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float,
    gae_lambda: float | Tensor,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, equation 16 of arXiv 1506.02438, over the valid tokens of each row.

        delta_k = r_k + gamma * V_(k+1) - V_k        A_k = delta_k + gamma * gae_lambda * A_(k+1)

    "Next" is the next valid position: masked tokens in between are no time steps. Computed in float64.

    Args:
        rewards, values, response_mask: [B, T].
        gae_lambda: a number, or one for each row, [B].
        bootstrap_values: [B], V of the state after the last valid token, for responses that were cut; None is 0.
    Returns:
        advantages, returns (= advantages + values, before whitening), [B, T], in the dtype of the arguments, float32
        at least.
    """
    _same_shape(rewards=rewards, values=values, response_mask=response_mask)
    for name, x in (("bootstrap_values", bootstrap_values), ("gae_lambda", gae_lambda)):
        if isinstance(x, Tensor) and x.shape != values.shape[:1]:
            raise ValueError(f"{name} {tuple(x.shape)} is not one per row of {tuple(values.shape)}")
    mask = response_mask.bool()
    rewards, values = _select(rewards, mask), _select(values, mask)
    place = left_places(mask)
    r, v = move_left(rewards.double(), place), move_left(values.double(), place)
    next_value = torch.nn.functional.pad(v[:, 1:], (0, 1))
    if bootstrap_values is not None:
        n = mask.sum(dim=1, keepdim=True)  # [B, 1]
        at_end = torch.arange(mask.shape[1], device=mask.device) == n - 1
        next_value = torch.where(at_end, bootstrap_values.double()[:, None], next_value)
    delta = r + gamma * next_value - v  # 0 behind the last token, where all three are
    carry = gamma * (gae_lambda.double() if isinstance(gae_lambda, Tensor) else gae_lambda)
    advantages = _select(move_back(_reverse_scan(delta, carry), place), mask).to(values.dtype)
    return advantages, advantages + values


def _reverse_scan(delta: Tensor, carry: float | Tensor) -> Tensor:
    """A_t = delta_t + carry * A_(t+1) along the last axis of [B, T]; `carry` is a number or [B].

    Blocks of BLOCK tokens are walked side by side, then what follows each block is added to its tokens with
    carry^(tokens to the end of the block): 2 sqrt(T) short steps where a plain loop has T. Blocks begin at the first
    token and products are never fused with sums, so zeros on the right change no bit of what stands before them.
    """
    rows, width = delta.shape
    size = min(BLOCK, max(width, 1))
    n = -(-width // size)
    x = torch.nn.functional.pad(delta, (0, n * size - width)).view(rows * n, size).t().contiguous()
    x = x.view(size, rows, n)  # token t of all blocks lies together
    power = torch.as_tensor(carry, dtype=x.dtype, device=x.device).expand(rows)[:, None]  # [B, 1]
    powers = [power]  # carry^1 for the last token of a block, carry^size for the first
    for t in reversed(range(size - 1)):
        x[t] += x[t + 1] * power
        powers.append(powers[-1] * power)
    first = x[0].t().contiguous()  # [n, B]
    after = torch.zeros_like(first)  # the advantage of the first token behind each block
    for i in reversed(range(n - 1)):
        after[i] = first[i + 1] + powers[-1][:, 0] * after[i + 1]
    after = after.t().contiguous()
    for t, to_the_end in enumerate(reversed(powers)):
        x[t] += to_the_end * after
    return x.view(size, rows * n).t().reshape(rows, n * size)[:, :width]


def left_places(mask: Tensor) -> Tensor | None:
    """[B, T] the column of each valid token when its row is moved to the left without holes, T where masked.

    None where every row stands there already.
    """
    if not bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        return None
    return torch.where(mask, mask.long().cumsum(dim=1) - 1, mask.shape[1])


def move_left(x: Tensor, place: Tensor | None) -> Tensor:
    """[B, T] with the valid tokens of each row first, in their order, and 0 behind them."""
    if place is None:
        return x
    wide = torch.zeros(x.shape[0], x.shape[1] + 1, dtype=x.dtype, device=x.device)
    return wide.scatter_(1, place, x)[:, :-1]


def move_back(x: Tensor, place: Tensor | None) -> Tensor:
    """What `move_left` moved, [B, T], where it stood; 0 where masked."""
    return x if place is None else torch.nn.functional.pad(x, (0, 1)).gather(1, place)


def adaptive_lambda(response_mask: Tensor, alpha: float) -> Tensor:
    """lambda = 1 - 1 / (alpha * l), not below 0: length-adaptive GAE of VAPO, arXiv 2504.05118. [B, T] -> [B] float64.

    l is the number of valid tokens. The weights of the TD errors then add up to 1 / (1 - lambda) = alpha * l: they
    reach as far as the response is long, and a reward at the end of a long one still comes to its beginning.
    """
    lengths = response_mask.bool().sum(dim=1).double()
    return (1 - 1 / (alpha * lengths.clamp(min=1))).clamp(min=0)


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


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) of each token as a loss: the value of k2 or k3, the gradient of k2. 0 where masked.

        d/dtheta = (logprobs - ref_logprobs) * d logprobs / dtheta

    Over samples of the policy its mean is the gradient of the KL at the states that were visited, since the mean of
    d logprobs is 0. That of k3 is not: differentiated as it stands, k3 = exp(d) - 1 - d gives sum_a (p - q) d logprobs,
    the gradient of KL(reference || policy) (arXiv 2506.09477). So k3 is reported, being unbiased as a number, and k2
    is differentiated. After the first optimizer step the samples are those of an older policy, as everywhere in PPO.
    That the states depend on the policy too is left out here; a KL in the reward (`kl_coef`) has it.

    Args:
        logprobs, ref_logprobs, response_mask: any one shape; differentiable in `logprobs`.
        estimator: k2 or k3.
    """
    if estimator not in ("k2", "k3"):
        raise ValueError(f"kl loss {estimator!r} is unknown: use k2 or k3")
    _same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, response_mask=response_mask)
    mask = response_mask.bool()
    logprobs, ref_logprobs = _select(logprobs, mask), _select(ref_logprobs, mask)
    k2 = kl_estimate(logprobs, ref_logprobs, "k2")
    value = kl_estimate(logprobs, ref_logprobs, estimator)
    return k2 + (value - k2).detach()


def importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor, cap: float) -> Tensor:
    """min(exp(old_logprobs - rollout_logprobs), cap), without gradient; 0 where masked. Any one shape.

    What the engine samples from is not to the last bit what the learner computes. Each token's loss is multiplied by
    the ratio of the two, which makes its mean that of the learner's policy; the cap bounds the variance (IMPALA's rho,
    arXiv 1802.01561; between engine and learner of an LLM: Yao et al. 2025, fengyao.notion.site/off-policy-rl).
    """
    _same_shape(old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs, response_mask=response_mask)
    mask = response_mask.bool()
    log_weight = (_select(old_logprobs, mask) - _select(rollout_logprobs, mask)).detach()
    return _select(log_weight.exp().clamp(max=cap), mask)


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


def surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    cliprange: float,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each token in `policy_loss`, before it is summed. Any one shape.

    Returns:
        loss (0 where masked), clipped (bool: the clipped side counts, before dual clip), log_ratio (0 where masked).
    """
    _same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, response_mask=response_mask)
    mask = response_mask.bool()
    log_ratio = _select(logprobs, mask) - _select(old_logprobs, mask)
    ratio = log_ratio.exp()
    minus_a = -_select(advantages, mask)
    high = cliprange if cliprange_high is None else cliprange_high
    unclipped, clipped = minus_a * ratio, minus_a * ratio.clamp(1 - cliprange, 1 + high)
    loss = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        loss = torch.where(minus_a > 0, torch.minimum(loss, dual_clip * minus_a), loss)
    return _select(loss, mask), clipped > unclipped, log_ratio


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
    loss, clipped, log_ratio = surrogate(
        logprobs,
        old_logprobs,
        advantages,
        response_mask,
        cliprange=cliprange,
        cliprange_high=cliprange_high,
        dual_clip=dual_clip,
    )
    mask = response_mask.bool()
    stats = {
        "pg_clipfrac": masked_mean(clipped.to(loss.dtype), mask),
        "approx_kl": masked_mean(-log_ratio, mask).detach(),
        "ratio_mean": masked_mean(log_ratio.exp(), mask).detach(),
    }
    return loss.sum() / (mask.sum().clamp(min=1) if normalizer is None else normalizer), stats


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
