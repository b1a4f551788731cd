"""RolloutWorker: the Ray actor that writes responses. It waits for nothing but calls; its group unblocks it."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from core.trajectory import PromptRequest, Trajectory
from core.weights import Probe, WeightAck, WeightManifest
from rollout.engines.engine import Engine
from rollout.offsets import OffsetMapper
from rollout.weight_receiver import WeightReceiver


@dataclass(frozen=True)
class WorkerReady:
    """The answer of a worker that has loaded its model and got no weights yet."""

    pid: int


class RolloutWorker:
    def __init__(
        self,
        name: str,
        load_engine: Callable[[], Engine],
        load_tokenizer: Callable[[], Any],
        *,
        threads: int,
        deterministic: bool,
    ) -> None:
        """`load_engine` and `load_tokenizer` run in the actor's process: weights are read on the worker's host."""
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=True)  # a GPU has no deterministic cumsum
        self.name = name
        self._engine = load_engine()
        self._map_offsets = OffsetMapper(load_tokenizer())
        self._weights = WeightReceiver(self._engine.live_tensors())

    def hello(self) -> WorkerReady:
        """Answers once the model is loaded."""
        return WorkerReady(pid=os.getpid())

    def generate(self, requests: list[PromptRequest]) -> tuple[list[Trajectory], int]:
        """Write one response to each request. Returns the trajectories and, apart, the number of tokens written.

        Two return values (num_returns=2): the group reads the small one to learn that the call ended well; the
        trajectories go from here straight to the reward server.
        """
        generations = self._engine.generate(requests)
        trajectories = []
        for request, generation in zip(requests, generations, strict=True):
            n = len(generation.response_ids)
            trajectories.append(
                Trajectory(
                    request=request,
                    response_ids=generation.response_ids,
                    rollout_logprobs=generation.logprobs,
                    action_mask=np.ones(n, dtype=bool),
                    token_offsets=self._map_offsets(generation.response_ids.tolist())[1],
                    policy_version=np.full(n, self._weights.version, dtype=np.int64),
                    finish_reason=generation.finish_reason,
                    finished_at=time.time(),
                )
            )
        return trajectories, sum(len(t) for t in trajectories)

    def rest(self) -> None:
        """No chunk will come for a while: let others have what the engine can do without."""
        self._engine.rest()

    def begin_update(self, manifest: WeightManifest) -> None:
        self._weights.begin(manifest)

    def receive_bucket(self, index: int, bucket: np.ndarray) -> None:
        self._weights.receive(index, bucket)

    def commit_update(self, probe: Probe) -> WeightAck:
        """Put the staged weights to use and say what they compute."""
        digest = self._weights.commit()
        self._engine.use_weights()
        logprobs = self._engine.logprobs(probe.prompt_ids, probe.response_ids)
        return WeightAck(
            worker=self.name, version=self._weights.version, digest=digest, probe_logprobs=logprobs, pid=os.getpid()
        )
