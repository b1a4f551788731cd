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
from rollout.environment import EnvironmentSpec
from rollout.turns import Turns
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
        environment: EnvironmentSpec | None = None,
    ) -> None:
        """`load_engine` and `load_tokenizer` run in the actor's process: weights are read on the worker's host.
        `environment` is started in the first call: what a constructor raises would arrive as text."""
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=True)  # a GPU has no deterministic cumsum
        self.name = name
        self._engine = load_engine()
        self._turns = Turns(self._engine, load_tokenizer(), environment)
        self._weights = WeightReceiver(self._engine.live_tensors())

    def hello(self) -> WorkerReady:
        """Answers once model and environment are loaded. Raises EnvironmentFault where the latter cannot be."""
        self._turns.start()
        return WorkerReady(pid=os.getpid())

    def generate(self, requests: list[PromptRequest]) -> tuple[list[Trajectory], int]:
        """Write one response to each request. Returns the trajectories and, apart, the number of tokens that the
        policy wrote. Raises EnvironmentFault.

        Two return values (num_returns=2): the group reads the small one to learn that the call ended well; the
        trajectories go from here straight to the reward server.
        """
        trajectories = [
            Trajectory(
                request=request,
                response_ids=written.response_ids,
                rollout_logprobs=written.logprobs,
                action_mask=written.action_mask,
                token_offsets=written.token_offsets,
                policy_version=np.full(len(written.response_ids), self._weights.version, dtype=np.int64),
                finish_reason=written.finish_reason,
                finished_at=time.time(),
            )
            for request, written in zip(requests, self._turns.write(requests), strict=True)
        ]
        return trajectories, sum(int(t.action_mask.sum()) for t in trajectories)

    def begin_update(self, manifest: WeightManifest) -> None:
        self._weights.begin(manifest)

    def receive_bucket(self, index: int, bucket: np.ndarray) -> None:
        self._weights.receive(index, bucket)

    def commit_update(self, probe: Probe) -> WeightAck:
        """Put the staged weights to use and say what they compute."""
        digest = self._weights.commit()
        logprobs = self._engine.logprobs(probe.prompt_ids, probe.response_ids)
        return WeightAck(
            worker=self.name, version=self._weights.version, digest=digest, probe_logprobs=logprobs, pid=os.getpid()
        )
