"""Ledger: what every number of every token was, a Parquet file per step, written while training goes on.

    loop    record(step, ...)  copies of the rows that are recorded  -->  a queue of ROOM steps
    thread  what follows from them, texts, table, file beside, rename  <--

The loop hands over what it has and waits for nothing: where the disk is slower than training for ROOM steps, a step is
left out, said once and counted. A file is whole or absent. core/ledger_table.py says what is in it.
"""

import hashlib
import json
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor

from core import ledger_table, trajectory_table
from core.combine import Combined
from core.schema import Config
from core.trajectory import Trajectory
from trainer import ppo
from trainer.batch import TrainBatch

ROOM = 2  # steps that may wait to be written
CLOSE_S = 60.0  # for what waits to be written at the end
MISSED = "ledger_missed"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What is recorded of one step, on the CPU and nobody else's. R rows, T tokens of the longest of them."""

    trajectories: list[Trajectory]  # R
    batch: TrainBatch  # of R rows
    new_logprobs: Tensor  # [R, T]
    normalized: dict[str, Tensor]  # name -> [R, T]
    weighted: dict[str, Tensor]
    said: dict[str, Any]  # `tokenppo.step` of core/ledger_table.py


class Ledger:
    """Of one learner rank. `record` belongs to the loop's thread; with `log.ledger: 0` it does nothing."""

    def __init__(
        self,
        cfg: Config,
        folder: Path,
        tokenizer: Any,
        note: Callable[[str], None],
        *,
        rank: int = 0,
        ranks: int = 1,
        device: str = "cpu",
    ) -> None:
        """`folder`: of the run. `note`: told once, in a line, of what could not be written. `device`: the learner's."""
        self._cfg, self._folder, self._tokenizer, self._note = cfg, folder, tokenizer, note
        self._of_run = {"rank": rank, "ranks": ranks, "fraction": cfg.log.ledger, "config": cfg.model_dump(mode="json")}
        self._of_run |= {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
        self._rank = rank
        self.counters: Counter[str] = Counter()
        self._queue: queue.Queue[Recorded | None] = queue.Queue(ROOM)
        self._thread: threading.Thread | None = None
        if cfg.log.ledger:
            self._thread = threading.Thread(target=self._work, name="ledger", daemon=True)
            self._thread.start()

    def record(
        self,
        step: int,
        batch: TrainBatch,
        trajectories: list[Trajectory],
        combined: Combined,
        new_logprobs: Tensor | None,
        weights: dict[str, float],
        before: dict[str, Any],
        credit: dict[str, float],
        policy_digest: str | None = None,
    ) -> None:
        """Hand over the rows of a step that are recorded.

        Args:
            batch: filled, with advantages and returns; its rows are `trajectories`, both by (ordinal, k).
            new_logprobs: [B, T] of the last pass over the batch; None where no pass was made: those before it.
            weights, before, credit, policy_digest: see `tokenppo.step` in core/ledger_table.py.
        """
        if self._thread is None:
            return
        rows = np.array([i for i, t in enumerate(trajectories) if is_recorded(self._cfg, t.request.ordinal)], dtype=int)
        if not len(rows):
            return
        assert [t.order for t in trajectories] == [tuple(order) for order in batch.order.tolist()]
        mine, at = batch.rows(rows), torch.from_numpy(rows)
        width = mine.response_mask.shape[1]

        def own(x: Tensor) -> Tensor:
            return x[at, :width].detach().float().cpu()

        said = {"step": step, "policy_digest": policy_digest, **self._of_run}
        recorded = Recorded(
            trajectories=[trajectories[i] for i in rows],
            batch=mine,
            new_logprobs=own(batch.old_logprobs if new_logprobs is None else new_logprobs),
            normalized={name: own(x) for name, x in combined.normalized.items()},
            weighted={name: own(x) for name, x in combined.weighted.items()},
            said=said | {"weights": weights, "before": before, "credit": credit},
        )
        try:
            self._queue.put_nowait(recorded)
        except queue.Full:
            self._miss(step, f"{ROOM} steps before it are not written yet; is the disk of {self._folder} slow?")

    def close(self) -> None:
        """Until what waits is written, CLOSE_S at most. May be called twice."""
        if self._thread is not None and self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                self._note(f"warning: the ledger was not written whole within {CLOSE_S:g} s")

    def _work(self) -> None:
        while (recorded := self._queue.get()) is not None:
            try:
                self._write(recorded)
            except Exception as error:  # of a disk or of what a dataset holds: none of it is worth a run
                self._miss(recorded.said["step"], f"{type(error).__name__}: {error}")

    def _write(self, recorded: Recorded) -> None:
        path = ledger_table.file_of(self._folder, recorded.said["step"], self._rank)
        fresh = path.with_name(f".{path.name}.new")
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table_of(recorded, self._cfg, self._tokenizer), fresh, compression="zstd")
        os.replace(fresh, path)

    def _miss(self, step: int, reason: str) -> None:
        self.counters[MISSED] += 1
        if self.counters[MISSED] == 1:
            self._note(f"warning: the ledger has nothing of step {step}, training goes on: {' '.join(reason.split())}")


def device_name(device: str) -> str:
    """`cpu AVX512`, `cuda NVIDIA H100`: where the same kernels give the same bits."""
    name = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"{device} {name}"


def is_recorded(cfg: Config, ordinal: int) -> bool:
    """Whether a prompt is, with all its samples: a function of (seed, ordinal), the same on every rank."""
    digest = hashlib.blake2b(f"{cfg.run.seed}/{ordinal}/ledger".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < cfg.log.ledger * 2**64


def table_of(recorded: Recorded, cfg: Config, tokenizer: Any) -> pa.Table:
    """The table of a step: core/ledger_table.py."""
    batch, rows = recorded.batch, recorded.trajectories
    lengths = batch.response_lengths.numpy()
    there = np.arange(batch.response_mask.shape[1]) < lengths[:, None]  # [R, T]
    untold = ~batch.response_mask.numpy()[there]  # tokens of an environment have no numbers
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))

    def lists(x: Tensor) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(x.numpy()[there], mask=untold))

    def maps(parts: dict[str, Tensor]) -> pa.Array:
        """Of R rows a list of every part, the parts of a row beside each other."""
        n, each = len(rows), np.repeat(lengths, len(parts))
        values = [x.numpy()[i, : lengths[i]] for i in range(n) for x in parts.values()]
        masks = [~batch.response_mask.numpy()[i, : lengths[i]] for i in range(n) for _ in parts]
        items = pa.ListArray.from_arrays(
            pa.array(np.concatenate([[0], np.cumsum(each)]).astype(np.int32)),
            pa.array(np.concatenate(values), mask=np.concatenate(masks)),
        )
        at = pa.array(np.arange(0, n * len(parts) + 1, len(parts), dtype=np.int32))
        return pa.MapArray.from_arrays(at, pa.array([*parts] * n), items)

    texts = [decode(tokenizer, t.response_ids, skip=True) for t in rows]
    columns: dict[str, Any] = {name: lists(x) for name, x in numbers_of(batch, recorded.new_logprobs, cfg).items()}
    columns |= {
        "bootstrap_value": batch.bootstrap_values.float().numpy(),
        "normalized": maps(recorded.normalized),
        "weighted": maps(recorded.weighted),
        "prompt_text": [decode(tokenizer, t.request.prompt_ids, skip=False) for t in rows],
        "response_text": texts,
        "tokens": [[s[a:b] for a, b in t.token_offsets.tolist()] for s, t in zip(texts, rows, strict=True)],
    }
    plain = trajectory_table.to_table([_plain(t) for t in rows])
    arrays = [_of_type(columns[f.name], f.type) if f.name in columns else plain[f.name] for f in ledger_table.SCHEMA]
    metadata = ledger_table.SCHEMA.metadata | {ledger_table.STEP_KEY: json.dumps(recorded.said).encode()}
    return pa.table(arrays, schema=ledger_table.SCHEMA.with_metadata(metadata))


def numbers_of(batch: TrainBatch, new_logprobs: Tensor, cfg: Config) -> dict[str, Tensor]:
    """The columns that follow from a filled batch: name -> [R, T]."""
    mask, old = batch.response_mask, batch.old_logprobs
    written_by = batch.writers_logprobs(cfg.rollout.off_policy)
    _, clipped, log_ratio = ppo.surrogate(
        new_logprobs,
        old if cfg.ppo.importance_cap else written_by,
        batch.advantages,
        mask,
        cliprange=cfg.ppo.cliprange,
        cliprange_high=cfg.ppo.cliprange_high,
        dual_clip=cfg.ppo.dual_clip,
    )
    importance = torch.ones_like(old)
    if cfg.ppo.importance_cap is not None:
        importance = ppo.importance_weights(old, batch.rollout_logprobs, mask, cfg.ppo.importance_cap)
    return {
        "old_logprobs": old,
        "new_logprobs": new_logprobs,
        "ref_logprobs": batch.ref_logprobs,
        "values": batch.values,
        "kl": written_by - batch.ref_logprobs,
        "token_rewards": batch.token_rewards,
        "rewards": batch.rewards,
        "advantages": batch.advantages,
        "returns": batch.returns,
        "ratio": log_ratio.exp(),
        "importance": importance,
        "clipped": clipped.bool(),
    }


def _of_type(values: Any, kind: pa.DataType) -> pa.Array:
    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, type=kind)


def _plain(t: Trajectory) -> Trajectory:
    """With columns that JSON text can hold: in a record a date may be its text."""
    return replace(t, request=replace(t.request, columns=json.loads(json.dumps(t.request.columns, default=str))))


def decode(tokenizer: Any, ids: np.ndarray, *, skip: bool) -> str:
    """The text of token ids, as offsets count it. `skip`: without special tokens."""
    return tokenizer.decode(ids.tolist(), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
