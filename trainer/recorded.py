"""A step of training as its ledger has it: responses, and every number of every token as tensors again.

Legend: B samples of all ranks, T response tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from core import ledger_table, trajectory_table
from core.trajectory import Trajectory
from trainer.batch import TrainBatch


@dataclass(frozen=True, kw_only=True)
class RecordedStep:
    """What core/ledger_table.py keeps of one step, by (ordinal, k)."""

    said: dict[str, Any]  # `tokenppo.step` of the first rank
    trajectories: list[Trajectory]  # B, with raw rewards
    batch: TrainBatch  # of them, with nothing that the learner or the loop fills in
    numbers: dict[str, Tensor]  # column -> [B, T] float32; 0 where no number was recorded
    normalized: dict[str, Tensor]  # component -> [B, T] float32
    weighted: dict[str, Tensor]
    bootstrap_values: Tensor  # [B] float32

    @property
    def step(self) -> int:
        return self.said["step"]

    @property
    def uids(self) -> list[str]:
        return [t.request.sample_uid for t in self.trajectories]

    @classmethod
    def of(cls, table: pa.Table, said: list[dict[str, Any]], *, scored_reference: bool) -> "RecordedStep":
        """From what `ledger_table.read` gives.

        `scored_reference`: log-probs of the reference came with the rewards; else a learner computes them.
        """
        rows = trajectory_table.from_table(table.select(trajectory_table.SCHEMA.names))
        bare = rows if scored_reference else [replace(t, ref_logprobs=None) for t in rows]
        batch = TrainBatch.collate(bare)
        if batch.ref_logprobs is not None:  # what an environment wrote has none
            batch = replace(batch, ref_logprobs=torch.where(batch.response_mask, batch.ref_logprobs, 0.0))
        names = (*ledger_table.NUMBERS, "ref_logprobs", "clipped")
        parts = {column: _by_component(table[column], batch) for column in ledger_table.MAPS}
        return cls(
            said=min(said, key=lambda of_rank: of_rank["rank"]),
            trajectories=rows,
            batch=batch,
            numbers={name: _padded(_lists(table[name]).flatten(), batch) for name in names},
            bootstrap_values=torch.from_numpy(table["bootstrap_value"].to_numpy().copy()),
            **parts,
        )


def _lists(column: pa.ChunkedArray) -> pa.ListArray:
    return column.combine_chunks()


def _padded(values: pa.Array, batch: TrainBatch) -> Tensor:
    """[B, T] float32 from the entries of all rows, one after the other: as many as their responses have tokens."""
    mask = batch.response_mask.numpy()
    there = np.arange(mask.shape[1]) < batch.response_lengths.numpy()[:, None]
    out = np.zeros(mask.shape, dtype=np.float32)
    out[there] = values.cast(pa.float32()).to_numpy(zero_copy_only=False)
    return torch.from_numpy(np.where(mask, out, np.float32(0)))


def _by_component(column: pa.ChunkedArray, batch: TrainBatch) -> dict[str, Tensor]:
    """Component -> [B, T]. Every row has the same components."""
    maps = _lists(column)
    names, items = np.array(maps.keys.to_pylist(), dtype=object), maps.items
    return {
        name: _padded(items.take(pa.array(np.flatnonzero(names == name))).flatten(), batch)
        for name in dict.fromkeys(names.tolist())
    }
