"""Estimators: rewards of tokens -> advantages and returns of a whole batch, with a critic or without one.

    gae            policy and critic each with a gamma and a lambda        arXiv 1506.02438, 2503.01491, 2504.05118
    reinforce_pp   returns-to-go, whitened over the batch                  REINFORCE++, arXiv 2501.03262
    rloo           returns-to-go minus those of the prompt's other samples RLOO, arXiv 2402.14740
    grpo           the same minus the mean of all, in units of their spread GRPO, arXiv 2402.03300

Legend: B samples of this rank, T response tokens, K groups (prompts) of all ranks. Samples of one prompt are a group;
chunks are dealt to ranks without regard to groups, so a group may lie on several ranks and its sums are made of all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.combine import RunningMoments
from core.schema import PPOConfig
from trainer import ppo
from trainer.ppo import AllReduce

Gather = Callable[[Any], list[Any]]  # one small object of every rank, by rank, on every rank

RETURNS = "ppo/returns"  # among the running moments of a run; no component can be called so


@dataclass(frozen=True, kw_only=True)
class Estimate:
    advantages: Tensor  # [B, T] before whitening, 0 where masked
    returns: Tensor  # [B, T] what the critic learns; returns-to-go where there is none
    lone_frac: float = 0.0  # share of the responses of all ranks that had no other of their prompt: advantage 0


def estimate(
    cfg: PPOConfig,
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    bootstrap_values: Tensor | None = None,
    groups: Tensor,
    all_reduce: AllReduce | None = None,
    gather: Gather | None = None,
) -> Estimate:
    """Advantages by `cfg.estimator`.

    Args:
        rewards, values, response_mask: [B, T], rewards after KL; without a critic the values are not read.
        bootstrap_values: [B], as `ppo.compute_gae` takes them.
        groups: [B] int64, the ordinal of each sample's prompt.
        all_reduce, gather: over ranks; None for one process. Every rank must call, empty ones too.
    """
    if cfg.estimator == "gae":
        advantages, returns = policy_and_critic(cfg, rewards, values, response_mask, bootstrap_values=bootstrap_values)
        return Estimate(advantages=advantages, returns=returns)
    to_go = returns_to_go(rewards, response_mask, gamma=cfg.gamma)
    if cfg.estimator == "reinforce_pp":
        return Estimate(advantages=to_go, returns=to_go)
    advantages, lone_frac = against_group(
        to_go, response_mask, groups, kind=cfg.estimator, all_reduce=all_reduce, gather=gather
    )
    return Estimate(advantages=advantages, returns=to_go, lone_frac=lone_frac)


def policy_and_critic(
    cfg: PPOConfig, rewards: Tensor, values: Tensor, response_mask: Tensor, *, bootstrap_values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Advantages by the policy's gamma and lambda, returns by the critic's (decoupled GAE, arXiv 2503.01491).

    A critic with lambda 1 learns the plain sum of what followed, without the bias of its own values; the policy keeps a
    smaller lambda for its variance. `lambda_alpha` replaces the policy's lambda only (arXiv 2504.05118).
    """
    adaptive = cfg.lambda_alpha is not None
    policy = (cfg.gamma, ppo.adaptive_lambda(response_mask, cfg.lambda_alpha) if adaptive else cfg.gae_lambda)
    critic = (
        cfg.gamma if cfg.value_gamma is None else cfg.value_gamma,
        cfg.gae_lambda if cfg.value_lambda is None else cfg.value_lambda,
    )

    def gae(gamma: float, gae_lambda: float | Tensor) -> tuple[Tensor, Tensor]:
        return ppo.compute_gae(
            rewards, values, response_mask, gamma=gamma, gae_lambda=gae_lambda, bootstrap_values=bootstrap_values
        )

    advantages, returns = gae(*policy)
    return advantages, returns if not adaptive and critic == policy else gae(*critic)[1]


def returns_to_go(rewards: Tensor, response_mask: Tensor, *, gamma: float) -> Tensor:
    """G_k = r_k + gamma * G_(k+1) over the valid tokens of each row. [B, T] -> [B, T]."""
    return ppo.compute_gae(rewards, torch.zeros_like(rewards), response_mask, gamma=gamma, gae_lambda=1.0)[0]


def against_group(
    to_go: Tensor,
    response_mask: Tensor,
    groups: Tensor,
    *,
    kind: str,
    all_reduce: AllReduce | None = None,
    gather: Gather | None = None,
) -> tuple[Tensor, float]:
    """Returns-to-go of each token, compared with those of the samples of the same prompt at the same place.

        H_j(t) = G_j(min(t, last token of j))            n samples of the prompt; t counts valid tokens
        rloo   A_i(t) = G_i(t) - sum_(j != i) H_j(t) / (n - 1)
        grpo   A_i(t) = (G_i(t) - b(t)) / s              b(t) = sum_j H_j(t) / n
               s^2 = 1 / (n - 1) * sum_j mean_t (G_j(t) - b(t))^2

    With a reward on the last token only and gamma 1, G_j(t) is the reward of response j at every t: these are then the
    published formulas on whole responses, A_i = R_i - mean of the others' R, and (R_i - mean) / std with n - 1, the
    same for all tokens of a response.

    Why the place t. Rewards of tokens are spent as the response goes on, and G_i(t) falls with t. Minus the others'
    total every late token would seem bad; the mean over samples would still be right, but its variance would be that
    trend. Any baseline that does not depend on the action is allowed, and rloo's is made of other samples only. A
    response that has ended is held at its last token, not at 0: where the last token carries the reward of the whole,
    0 would pay for being longer than the others, and the published formula would be lost.

    Why s over tokens, each response counting once. Two responses may have the same total and earn it at different
    places: divided by the deviation of the totals, 0, those differences would be without bound. So divided, the mean
    square of A over a group is (n - 1) / n, whatever the rewards. The process supervision of arXiv 2402.03300 (section
    4.1.3) subtracts the mean of all step rewards from each instead: with a reward on every token that pays for length.

    A sample that is alone, because none was asked for beside it or the others were dropped, has advantage 0.

    Args:
        to_go, response_mask: [B, T]; groups: [B] int64.
        kind: rloo or grpo.
    Returns:
        advantages [B, T], and the share of the responses of all ranks that were alone.
    """
    if kind not in ("rloo", "grpo"):
        raise ValueError(f"estimator {kind!r} compares no groups: use rloo or grpo")
    reduce, gather = all_reduce or (lambda sums: sums), gather or (lambda item: [item])
    mask = response_mask.bool()
    place = ppo.left_places(mask)
    g = ppo.move_left(torch.where(mask, to_go, 0).double(), place)  # [B, T]
    lengths = mask.sum(dim=1)
    longest = int(lengths.max()) if len(lengths) else 0
    known = gather((sorted(set(groups.tolist())), longest))
    names = {name: k for k, name in enumerate(sorted({name for ordinals, _ in known for name in ordinals}))}
    n_groups, width = len(names), max((length for _, length in known), default=0)
    of = torch.tensor([names[name] for name in groups.tolist()], dtype=torch.int64)  # [B] -> K

    def by_group(x: Tensor) -> Tensor:
        """Sums over the samples of each group, of all ranks: [B, ...] -> [K, ...] float64."""
        mine = torch.zeros(n_groups, *x.shape[1:], dtype=torch.float64).index_add_(0, of, x.double())
        return reduce(mine.flatten()).reshape(mine.shape)

    counts = by_group(lengths > 0)  # [K]
    column = torch.arange(width)
    held = g.gather(1, column.minimum((lengths[:, None] - 1).clamp(min=0)))  # [B, width]
    held = torch.where(lengths[:, None] > 0, held, 0.0)
    sums = by_group(held)[of]  # [B, width]
    n = counts[of][:, None]  # [B, 1]
    inside = column < lengths[:, None]
    if kind == "rloo":
        advantages = held - (sums - held) / (n - 1).clamp(min=1)
    else:
        off = torch.where(inside, held - sums / n.clamp(min=1), 0.0)
        mean_squares = off.square().sum(dim=1) / lengths.clamp(min=1)
        advantages = off * torch.rsqrt(by_group(mean_squares)[of][:, None] / (n - 1).clamp(min=1) + 1e-8)
    advantages = torch.where(inside & (n > 1), advantages, 0.0)
    advantages = torch.nn.functional.pad(advantages[:, : mask.shape[1]], (0, max(0, mask.shape[1] - width)))
    lone = float((counts == 1).sum()) / max(1.0, float(counts.sum()))
    return torch.where(mask, ppo.move_back(advantages, place), 0.0).to(to_go.dtype), lone


def scale_rewards(
    token_rewards: Tensor, response_mask: Tensor, how: str, *, all_reduce: AllReduce | None = None
) -> tuple[Tensor, float]:
    """Token rewards divided by their standard deviation over the valid tokens of all ranks (`batch`); none: as given.

    The mean is not taken off: with a reward on every token its mean is a bonus or a fine on length, and taking it off
    would add one (a reward of 1 for each token would become nothing, and a reward of 0 a fine). It is a division alone,
    unlike `whiten(center=False)`, which adds the mean back and so gives unrewarded tokens something.

    Returns:
        [B, T], and what was divided by: 1 where the rewards do not vary.
    """
    if how == "none":
        return token_rewards, 1.0
    count, mean, squares = (float(x) for x in ppo.moments(token_rewards, response_mask, all_reduce=all_reduce))
    varies = squares > 1e-12 * (squares + count * mean**2)  # rounding alone is no variance
    scale = (squares / (count - 1)) ** 0.5 if varies else 1.0
    return token_rewards / scale, scale


def value_scale(running: dict[str, RunningMoments], key: str = RETURNS) -> float:
    """sigma: the critic predicts returns / sigma. The root mean square of all returns so far; 1 before the first.

    About 0, not about their mean: the error of a critic that starts at 0 is the return itself, and dividing by a
    deviation would leave returns that are all near -100 as large as they are. So the value loss begins at 1/2 for any
    size of the rewards, and as much of the gradient in a trunk that critic and policy share (see docs/benchmarks.md).
    """
    seen = running.get(key)
    mean_square = seen.mean**2 + seen.squares / seen.count if seen is not None and seen.count else 0.0
    return mean_square**0.5 or 1.0


def scale_returns(
    returns: Tensor,
    response_mask: Tensor,
    running: dict[str, RunningMoments],
    *,
    key: str = RETURNS,
    all_reduce: AllReduce | None = None,
) -> tuple[Tensor, float]:
    """Returns / sigma, what the critic shall learn, with the returns of this batch among the moments; and that sigma.

    The scaling of PopArt (arXiv 1602.07714) without its shift, and without rewriting the last layer when sigma moves:
    the values of the next batch are read with the sigma that their critic was trained under, so advantages are right
    whatever sigma did, and the critic follows a sigma that moves less and less, as 1 / batches. `cliprange_value` and
    `loss/value` are then in units of sigma; the explained variance has none.

    `running[key]` is updated in place and saved with checkpoints. Every rank must call.
    """
    seen = running.setdefault(key, RunningMoments())
    seen.merge(*(float(x) for x in ppo.moments(returns, response_mask, all_reduce=all_reduce)))
    sigma = value_scale(running, key)
    return returns / sigma, sigma
