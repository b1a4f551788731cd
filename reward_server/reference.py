"""Log-probs of the frozen reference, computed where the rewards are: while workers still write, and where a component
reads the same model, in the same forward.

The learner then holds no reference and spends no time on one (`model.reference: reward_server`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.faults import RewardFault
from core.logprobs import logprobs_from_logits
from core.trajectory import KeptTokens, Trajectory
from reward_server.components import ScoreRequest
from reward_server.library.models import Fluency


@dataclass(frozen=True, kw_only=True)
class ReferenceSpec:
    """Which model, and how its numbers must be computed to be compared with the policy's."""

    model: str  # a folder or hub id: `model.path` of the run
    dtype: str
    temperature: float
    batch_size: int  # responses that it reads together


class Reference:
    def __init__(self, spec: ReferenceSpec) -> None:
        self._spec = spec
        self._logprobs: dict[str, np.ndarray] = {}  # uid -> [T] float32, of the last batch
        self._kept: dict[str, KeptTokens] = {}  # by uid too: what they were drawn from
        self._own: Fluency | None = None

    def setup(self, device: str, parts: Iterable[Any]) -> None:
        """Load the model, unless one of `parts`, which are set up, reads it already. Raises ValueError."""
        for part in parts:
            if isinstance(part, Fluency) and part.reads(self._spec.model, self._spec.dtype):
                part.show_logits(self._read)
                return
        self._own = Fluency(self._spec.model, batch_size=self._spec.batch_size, center=0.0, dtype=self._spec.dtype)
        self._own.setup(device)
        self._own.show_logits(self._read)

    def begin(self, trajectories: Sequence[Trajectory]) -> None:
        """Before the components' turn: these responses come next."""
        self._logprobs = {}
        self._kept = {t.request.sample_uid: t.kept for t in trajectories if t.kept is not None}

    def _read(self, uid: str, logits: Tensor, ids: Tensor) -> None:
        """Logits [T, V] and ids [T] of one response."""
        kept = self._kept.get(uid)
        keep = None if kept is None else torch.from_numpy(kept.dense(logits.shape[-1])).to(logits.device)
        logprobs = logprobs_from_logits(logits, ids, self._spec.temperature, keep)
        self._logprobs[uid] = logprobs.float().cpu().numpy()

    def of(self, batch: ScoreRequest) -> list[np.ndarray | RewardFault]:
        """[T] float32 nats for each sample, after temperature and over the tokens that the policy's engine kept, so
        that KL compares two distributions over the same tokens; or why there is none. After the components' turn."""
        faults = {}
        if self._own is not None:
            try:
                entries = self._own.score(batch)
            except Exception as error:  # of the model: memory, a kernel
                entries = [RewardFault(f"{type(error).__name__}: {error}")] * len(batch)
            faults = {uid: e for uid, e in zip(batch.uids, entries, strict=True) if isinstance(e, RewardFault)}
        missing = RewardFault("the component that reads the same model had no number for it")
        return [
            self._logprobs[uid]
            if uid in self._logprobs and uid not in faults
            else RewardFault(f"reference, sample {uid}: {faults.get(uid, missing)}")
            for uid in batch.uids
        ]

    def close(self) -> None:
        if self._own is not None:
            self._own.close()
