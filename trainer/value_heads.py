"""A value head for each reward component (`model.value_heads: components`): what each learns, what they say together.

    r_t = sum_k w_k r_(k,t)    k: the components, after normaliser and clip, and the KL penalty: r = -KL_t, w = kl_coef
    V   = sum_k w_k V_k        V_k learns the returns of r_k alone, without its weight

GAE is linear in rewards and values, so the advantages under V are the weighted sum of those of each component under its
own head, and a weight that moves (a schedule, a multiplier, kl_coef) moves the baseline with it: no head has anything
to learn anew. The same decomposition: Hybrid Reward Architecture, van Seijen et al. 2017 (arXiv 1706.04208).

Legend: B samples, T response tokens, K heads, in the order of `Config.value_heads`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.combine import RunningMoments
from core.schema import KL_HEAD, PPOConfig
from trainer import estimators, ppo
from trainer.ppo import AllReduce


@dataclass(frozen=True, kw_only=True)
class Heads:
    """All by name of the head."""

    values: dict[str, Tensor]  # [B, T] in units of its returns
    bootstraps: dict[str, Tensor]  # [B] V of the state after the last token, where a response was cut
    rewards: dict[str, Tensor]  # [B, T] r_k
    weights: dict[str, float]  # w_k

    def baseline(self) -> tuple[Tensor, Tensor]:
        """V of each token [B, T], and of the state behind each cut response [B]."""
        values, bootstraps = (
            sum(self.weights[name] * x for name, x in of.items()) for of in (self.values, self.bootstraps)
        )
        return values, bootstraps


def heads_of(
    predicted: dict[str, Tensor],
    bootstraps: dict[str, Tensor],
    normalized: dict[str, Tensor],
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    weights: dict[str, float],
    kl_coef: float,
    running: dict[str, RunningMoments],
) -> Heads:
    """What the heads predict, beside what they were to predict.

    Args:
        predicted, bootstraps: name -> [B, T] and [B], as the heads say it: in units of `estimators.value_scale`.
        normalized: name -> [B, T] of each component, before its weight.
        old_logprobs, ref_logprobs, response_mask: [B, T].
        weights: of the components in the sum that the policy is trained on.
        running: where `ppo.scale_values` keeps the units.
    """
    units = {name: estimators.value_scale(running, _key(name)) for name in predicted}
    penalty = ppo.shape_rewards(torch.zeros_like(old_logprobs), old_logprobs, ref_logprobs, response_mask, kl_coef=1.0)
    rewards, weights = {**normalized, KL_HEAD: penalty}, {**weights, KL_HEAD: kl_coef}
    return Heads(
        values={name: x * units[name] for name, x in predicted.items()},
        bootstraps={name: x * units[name] for name, x in bootstraps.items()},
        rewards={name: rewards[name].to(x.dtype) for name, x in predicted.items()},
        weights={name: weights[name] for name in predicted},
    )


def returns_of(
    cfg: PPOConfig,
    heads: Heads,
    response_mask: Tensor,
    running: dict[str, RunningMoments],
    report: dict[str, float],
    *,
    all_reduce: AllReduce | None = None,
) -> dict[str, Tensor]:
    """Name -> [B, T] what each head shall learn, in its own unit. Explained variances go into `report`.

    `running` as in `estimators.scale_returns`. Every rank must call.
    """
    learnt = {}
    for name, values in heads.values.items():
        _, returns = estimators.policy_and_critic(
            cfg, heads.rewards[name], values, response_mask, bootstrap_values=heads.bootstraps[name]
        )
        metric = "objective/kl_explained_variance" if name == KL_HEAD else f"reward/{name}/explained_variance"
        report[metric] = ppo.explained_variance(values, returns, response_mask, all_reduce=all_reduce)
        if cfg.scale_values != "none":
            returns, _ = estimators.scale_returns(
                returns, response_mask, running, key=_key(name), all_reduce=all_reduce
            )
        learnt[name] = returns
    return learnt


def _key(name: str) -> str:
    """Among the running moments of a run."""
    return f"{estimators.RETURNS}/{name}"
