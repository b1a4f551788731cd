"""Credit: which rewards made the advantage of a token, and which later tokens they were paid on.

    steps, said = ledger_table.read(folder, 12)
    for credit in split(steps, said[0], cfg):
        credit.parts["quality"][t]       # what the component `quality` adds to the advantage of token t
        credit.paid("quality", t)[k]     # of that, what token k earned; 0 for k < t

An advantage is linear in the rewards, so it splits exactly. With delta_k = r_k + gamma V_(k+1) - V_k and
c = gamma lambda, equation 16 of arXiv 1506.02438 is

    A_t = sum_(k >= t) c^(k - t) r_k  +  sum_(k >= t) c^(k - t) (gamma V_(k+1) - V_k)

and r_k is itself a sum: the weighted components over the scale of the rewards, minus kl_coef KL_k. Whitening subtracts
one number from all and divides by another. The parts of an advantage as the losses read it are therefore

    <component>   one for each that has a weight
    kl            the penalty for leaving the reference
    critic        what the critic expected there: gae alone
    others        what the prompt's other samples earned: rloo and grpo alone
    mean          minus the mean of all advantages, where they are whitened

Legend: R responses, T response tokens. k - t counts tokens of the policy; those of an environment are no time steps.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from core.schema import Config
from trainer import estimators, ppo

KL, CRITIC, OTHERS, MEAN = "kl", "critic", "others", "mean"


@dataclass(frozen=True, kw_only=True)
class Credit:
    """Of one response. Its advantages are the sum of `parts`, 0 on tokens of an environment. Example, gamma lambda 1/2:

    rewards  {"quality": [0, 4], "kl": [-1, 0]}        what each token was paid, in the unit of the advantage
    parts    {"quality": [2, 4], "kl": [-1, 0], ...}   paid("quality", 0) is [0, 2]
    """

    uid: str
    mask: np.ndarray  # [T] bool, tokens of the policy
    parts: dict[str, np.ndarray]  # name -> [T] float64
    rewards: dict[str, np.ndarray]  # name -> [T] float64, of components and kl
    carry: float  # gamma lambda

    @property
    def advantages(self) -> np.ndarray:
        """[T] float64."""
        return np.sum(list(self.parts.values()), axis=0)

    def paid(self, name: str, t: int) -> np.ndarray:
        """[T]: what the reward `name` of each token adds to the advantage of token t. Its sum is parts[name][t]."""
        place = np.cumsum(self.mask) - 1
        later = self.mask & self.mask[t] & (np.arange(len(self.mask)) >= t)
        return np.where(later, self.carry ** np.where(later, place - place[t], 0) * self.rewards[name], 0.0)


def split(rows: pa.Table, said: dict[str, Any], cfg: Config) -> list[Credit]:
    """The credit of every response of a step, in the order of the rows.

    Args:
        rows, said: of core/ledger_table.read; `said` of any rank.
        cfg: of the run that wrote them. With rloo and grpo all samples of a prompt must be among the rows, which they
            are in a ledger.
    """
    p, mask = cfg.ppo, padded(rows, "action_mask").bool()  # [R, T]
    lengths = [len(x) for x in rows["action_mask"].to_pylist()]
    rewards = shaped(rows, said)  # name -> [R, T]
    gae_lambda: float | Tensor = p.gae_lambda if p.has_critic else 1.0
    if p.has_critic and p.lambda_alpha is not None:
        gae_lambda = ppo.adaptive_lambda(mask, p.lambda_alpha)
    zeros = torch.zeros(mask.shape, dtype=torch.float64)

    def follow(paid: Tensor, values: Tensor = zeros, bootstrap: Tensor | None = None) -> Tensor:
        how = {"gamma": p.gamma, "gae_lambda": gae_lambda, "bootstrap_values": bootstrap}
        return ppo.compute_gae(paid, values, mask, **how)[0]

    parts = {name: follow(paid) for name, paid in rewards.items()}
    if p.has_critic:
        unit = value_unit(said)
        bootstrap = torch.tensor(rows["bootstrap_value"].to_pylist(), dtype=torch.float64)
        parts[CRITIC] = follow(zeros, padded(rows, "values") * unit, bootstrap * unit)
    if p.compares_samples:
        factor = _against_others(parts, mask, torch.tensor(rows["ordinal"].to_pylist()), p.estimator)
        rewards = {name: paid * factor for name, paid in rewards.items()}
    if p.whitens:
        mean, std = said["credit"]["credit/advantage_mean"], said["credit"]["credit/advantage_std"]
        parts[MEAN] = torch.where(mask, -mean, zeros)
        parts, rewards = ({name: x / std for name, x in d.items()} for d in (parts, rewards))
    carry = (p.gamma * gae_lambda).tolist() if isinstance(gae_lambda, Tensor) else [p.gamma * gae_lambda] * len(mask)
    return [
        Credit(
            uid=uid,
            mask=mask[i, :n].numpy(),
            parts={name: x[i, :n].numpy() for name, x in parts.items()},
            rewards={name: x[i, :n].numpy() for name, x in rewards.items()},
            carry=carry[i],
        )
        for i, (uid, n) in enumerate(zip(rows["sample_uid"].to_pylist(), lengths, strict=True))
    ]


def shaped(rows: pa.Table, said: dict[str, Any]) -> dict[str, Tensor]:
    """What each token was paid, by source: name -> [R, T] float64, components with a weight and `kl`. Their sum is what
    GAE read."""
    scale = said["credit"].get("credit/reward_scale", 1.0)
    names = [name for name, weight in said["weights"].items() if weight]
    paid = {name: padded(rows, "weighted", name) / scale for name in names}
    return paid | {KL: -said["before"]["kl_coef"] * padded(rows, "kl")}


def value_unit(said: dict[str, Any]) -> float:
    """What the values of a step are multiplied with where GAE reads them: 1 unless `ppo.scale_values`."""
    running = {name: estimators.RunningMoments(**x) for name, x in said["before"].get("running", {}).items()}
    return estimators.value_scale(running)


def padded(rows: pa.Table, column: str, name: str | None = None) -> Tensor:
    """A column of lists, or of one name of a map, padded with 0 on the right: [R, T] float64. null is 0."""
    lists = rows[column].to_pylist()
    if name is not None:
        lists = [dict(row)[name] for row in lists]
    out = torch.zeros(len(lists), max(map(len, lists), default=0), dtype=torch.float64)
    for i, row in enumerate(lists):
        out[i, : len(row)] = torch.tensor([0.0 if x is None else float(x) for x in row], dtype=torch.float64)
    return out


def _against_others(parts: dict[str, Tensor], mask: Tensor, groups: Tensor, kind: str) -> Tensor:
    """Put what the others earned into `parts`, all in the unit of the advantage; returns the factor of each row [R, 1].

    grpo divides by a spread s that a group shares. With n samples its numerator is (n - 1) / n of rloo's advantage, so
    that s is one over the other.
    """
    to_go = torch.stack(list(parts.values())).sum(dim=0)
    advantages, _ = estimators.against_group(to_go, mask, groups, kind=kind)
    factor = torch.ones(len(mask), 1, dtype=torch.float64)
    if kind == "grpo":
        plain, _ = estimators.against_group(to_go, mask, groups, kind="rloo")
        for group in groups.unique():
            of = groups == group
            n, size = int(of.sum()), advantages[of].norm()
            # A group without a spread, or of one sample, has advantage 0 everywhere: nobody was paid for anything.
            factor[of] = size / ((n - 1) / n * plain[of].norm()) if n > 1 and size else 0.0
    for name in parts:
        parts[name] = parts[name] * factor
    parts[OTHERS] = torch.where(mask, advantages - to_go * factor, 0.0)
    return factor
