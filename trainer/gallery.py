"""Gallery: what of a step a person looks at in a tracker: histograms of the whole batch, and a few responses with what
each of their tokens was worth.

    loop    record(step, ...)  every log.samples_every steps  -->  show(Exhibit)    launch/trackers.py, on rank 0

Legend: N values, T response tokens. Nothing here waits for a tracker: `show` puts what it is given into a queue.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.combine import Combined
from core.metrics import HISTOGRAMS
from core.schema import Config
from core.trajectory import Trajectory
from trainer.batch import TrainBatch
from trainer.ledger import decode, numbers_of
from trainer.ranks import Ranks

BINS = 64


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Of all ranks. Values that are not finite are in no bin."""

    edges: np.ndarray  # [bins + 1] float64, rising
    counts: np.ndarray  # [bins] int64
    total: float  # sum of the values
    squares: float  # sum of their squares


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A response and what each of its tokens was worth; 0 on tokens that an environment wrote."""

    ordinal: int
    k: int
    prompt: str
    text: str
    offsets: np.ndarray  # [T, 2], as Trajectory.token_offsets
    written: np.ndarray  # [T] bool, by the policy
    finish_reason: str
    weighted: dict[str, np.ndarray]  # component -> [T], after normaliser, clip and weight
    token_rewards: np.ndarray  # [T], the sum of those
    numbers: dict[str, np.ndarray]  # what else is known of each token: name -> [T]

    @property
    def total(self) -> float:
        return float(self.token_rewards.sum())


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    step: int
    histograms: dict[str, Histogram]  # by the names of core.metrics.HISTOGRAMS
    samples: list[Shown]  # of rank 0, from the lowest reward to the highest


class Gallery:
    """Of one learner rank; all ranks record the same steps, and rank 0 shows them."""

    def __init__(self, cfg: Config, tokenizer: Any, ranks: Ranks, show: Callable[[Exhibit], None] | None) -> None:
        """`show`: on rank 0, and only where a tracker is there to show anything; None elsewhere."""
        self._cfg, self._tokenizer, self._ranks, self._show = cfg, tokenizer, ranks, show

    def record(
        self,
        step: int,
        batch: TrainBatch,
        trajectories: list[Trajectory],
        combined: Combined,
        new_logprobs: Tensor | None,
    ) -> None:
        """Arguments as of `Ledger.record`. In a step that is shown, two collectives wait for every rank to call it."""
        if not self._cfg.log.looks or step % self._cfg.log.samples_every:
            return
        new = batch.old_logprobs if new_logprobs is None else new_logprobs.detach().float().cpu()
        ratio = numbers_of(batch, new, self._cfg)["ratio"]
        values = values_of(batch, ratio)
        histograms = histograms_of(values, self._ranks.gather)
        if self._show is None:
            return
        chosen = spread(values["histogram/reward_total"], self._cfg.log.samples)
        samples = [shown(i, batch, trajectories[i], combined, ratio, self._tokenizer) for i in chosen]
        self._show(Exhibit(step=step, histograms=histograms, samples=samples))


def values_of(batch: TrainBatch, ratio: Tensor) -> dict[str, np.ndarray]:
    """name of HISTOGRAMS -> [N] float64, over the responses or over the policy's tokens of this rank."""
    mask = batch.response_mask
    rewards = torch.where(mask, batch.token_rewards, 0.0).double()
    found = {
        "histogram/reward_total": rewards.sum(dim=1),
        "histogram/response_length": mask.sum(dim=1),
        "histogram/token_rewards": batch.token_rewards[mask],
        "histogram/advantages": batch.advantages[mask],
        "histogram/values": batch.values[mask],
        "histogram/ratio": ratio[mask],
    }
    assert found.keys() == HISTOGRAMS.keys()
    return {name: x.detach().double().cpu().numpy() for name, x in found.items()}


def histograms_of(
    values: dict[str, np.ndarray], gather: Callable[[Any], list[Any]], bins: int = BINS
) -> dict[str, Histogram]:
    """One histogram over the values of all ranks for each name; none of what has no finite value on any rank.

    `gather`: as `Ranks.gather`, called twice.
    """
    finite = {name: x[np.isfinite(x)] for name, x in values.items()}
    ends = gather({name: (float(x.min()), float(x.max())) for name, x in finite.items() if len(x)})
    edges: dict[str, np.ndarray] = {}
    for name in values:
        of_ranks = [each[name] for each in ends if name in each]
        if of_ranks:
            low, high = min(a for a, _ in of_ranks), max(b for _, b in of_ranks)
            # numpy widens what has no width in the same way; float64 has no 64 steps below 1e-12 of a number.
            if high - low <= 1e-12 * max(abs(low), abs(high), 1.0):
                low, high = low - 0.5, high + 0.5
            edges[name] = np.linspace(low, high, bins + 1)
    counted = gather(
        {
            name: (np.histogram(finite[name], at)[0], float(finite[name].sum()), float((finite[name] ** 2).sum()))
            for name, at in edges.items()
        }
    )
    return {
        name: Histogram(
            edges=at,
            counts=np.sum([each[name][0] for each in counted], axis=0),
            total=sum(each[name][1] for each in counted),
            squares=sum(each[name][2] for each in counted),
        )
        for name, at in edges.items()
    }


def spread(totals: np.ndarray, n: int) -> list[int]:
    """Indices of at most n rows, by rising total: the lowest, the highest, and those evenly between."""
    order = np.argsort(totals, kind="stable")
    return [
        int(order[i]) for i in dict.fromkeys(np.linspace(0, len(order) - 1, min(n, len(order))).round().astype(int))
    ]


def shown(
    row: int, batch: TrainBatch, trajectory: Trajectory, combined: Combined, ratio: Tensor, tokenizer: Any
) -> Shown:
    """Row `row` of the batch, which is `trajectory`."""
    n, mask = len(trajectory), batch.response_mask[row]

    def own(x: Tensor) -> np.ndarray:
        return torch.where(mask, x[row].detach().cpu(), 0.0)[:n].double().numpy()

    return Shown(
        ordinal=trajectory.request.ordinal,
        k=trajectory.request.k,
        prompt=decode(tokenizer, trajectory.request.prompt_ids, skip=False),
        text=decode(tokenizer, trajectory.response_ids, skip=True),
        offsets=trajectory.token_offsets,
        written=trajectory.action_mask,
        finish_reason=trajectory.finish_reason,
        weighted={name: own(x) for name, x in combined.weighted.items()},
        token_rewards=own(combined.token_rewards),
        numbers={
            "advantage": own(batch.advantages),
            "value": own(batch.values),
            "kl to reference": own(batch.old_logprobs - batch.ref_logprobs),
            "ratio - 1": own(ratio - 1.0),
        },
    )
