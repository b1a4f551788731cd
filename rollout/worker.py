"""RolloutWorker: the Ray actor that writes responses. It waits for nothing but calls; its group unblocks it."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from core.faults import TransitFault
from core.trajectory import PromptRequest, Trajectory
from core.weights import Flat, Probe, WeightAck, WeightManifest, bucket_digest
from rollout.engines.engine import Begun, Engine
from rollout.environment import EnvironmentSpec
from rollout.turns import Turns
from rollout.weight_broadcast import BroadcastGroup, Rendezvous
from rollout.weight_receiver import WeightReceiver


@dataclass(frozen=True)
class WorkerReady:
    """The answer of a worker that has loaded its model and got no weights yet."""

    pid: int
    node: str  # whose object store it maps


@dataclass(frozen=True)
class Receipt:
    """Of a part of a chunk."""

    places: list[int]  # in the chunk, of all responses of this part
    unfinished: list[Trajectory]  # those of them that are to be gone on with


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
        self._weights = WeightReceiver(self._engine.live_tensors)
        self._group: BroadcastGroup | None = None
        self._no_group = "it was told of no group"  # why, where there is none
        self._digested: dict[int, Any] = {}  # buckets of `_digested_version` that this worker read for its node
        self._digested_version = -1

    def hello(self) -> WorkerReady:
        """Answers once model and environment are loaded. Raises EnvironmentFault where the latter cannot be."""
        self._turns.start()
        return WorkerReady(pid=os.getpid(), node=_node())

    def generate(
        self,
        requests: list[PromptRequest],
        begun: list[Trajectory | None] | None = None,
        most: int | None = None,
        at_least: int | None = None,
    ) -> Iterator[list[Trajectory] | Receipt]:
        """Write one response to each request. Yields, in turn, responses that are over, and the receipt of them; what
        `most` leaves unfinished is in the last receipt. Raises EnvironmentFault.

        `begun`: what each response holds already, as an earlier call returned it, or None; its tokens keep the version
        that wrote them. `most`: more tokens that each gets now; None: all, to its end. `at_least`: hand on what is over
        as soon as it is so many responses, to prompts all of whose samples here are over; None: all at the end. Which
        these are is decided by the responses, by no clock.

        Two values each time: the group reads the second, what is over goes from here straight to the reward server.
        """
        self._digested = {}  # all workers have committed: nobody waits for what this one keeps in its place
        starts = None if begun is None else [None if t is None else _begun(t) for t in begun]
        before = [() if t is None else t.policy_version for t in begun or [None] * len(requests)]
        missing = Counter(request.ordinal for request in requests)  # samples of each prompt that are not over
        over: dict[int, Trajectory] = {}  # by place, not handed on yet
        for place, written in self._turns.stream(requests, starts, most):
            over[place] = Trajectory(
                request=requests[place],
                response_ids=written.response_ids,
                rollout_logprobs=written.logprobs,
                action_mask=written.action_mask,
                token_offsets=written.token_offsets,
                policy_version=self._versions(before[place], len(written.response_ids)),
                finish_reason=written.finish_reason,
                finished_at=time.time(),
                kept=written.kept,
                rollout_values=written.values,
                rollout_bootstrap=written.bootstrap,
            )
            missing[requests[place].ordinal] -= 1
            whole = [i for i, t in over.items() if not missing[t.request.ordinal]]
            if at_least is not None and len(whole) >= at_least and missing.total():
                yield from _handed_on({i: over.pop(i) for i in sorted(whole)})
        yield from _handed_on(dict(sorted(over.items())))

    def _versions(self, before: Sequence[int], n: int) -> np.ndarray:
        """[n] of the weights that wrote each token: the first ones were there `before`."""
        versions = np.full(n, self._weights.version, dtype=np.int64)
        versions[: len(before)] = before
        return versions

    def rest(self) -> None:
        """No chunk will come for a while: let others have what the engine can do without."""
        self._digested = {}
        self._engine.rest()

    def begin_update(self, manifest: WeightManifest) -> None:
        """See WeightReceiver.begin. Then the buckets, one way or another, then commit_update."""
        self._weights.begin(manifest)

    def digest_bucket(self, version: int, index: int, pieces: list[np.ndarray]) -> str:
        """The digest of a bucket in the object store, for all workers of this node (rollout/host_digests.py).

        It stays mapped here: an object that nobody maps might be evicted from a node that has a copy of it, and what
        the others then map would be fetched anew, and read by nobody.
        """
        if version != self._digested_version:
            self._digested, self._digested_version = {}, version
        self._digested[index] = pieces
        return bucket_digest(pieces)

    def take_update(
        self,
        manifest: WeightManifest,
        probe: Probe,
        digests: tuple[str, ...],
        of_host: list[str | None],
        *buckets: list[np.ndarray],
    ) -> WeightAck:
        """A whole version out of the object store in one call: begin, receive all buckets, commit. Arrays are shared
        memory of this host, and stay there.

        `of_host`: the digest of each bucket as a worker of this node took it; None: this one takes it.
        """
        if manifest.version != self._digested_version:
            self._digested = {}
        self._weights.begin(manifest)
        for index, (bucket, digest) in enumerate(zip(buckets, of_host, strict=True)):
            self._weights.receive(index, bucket, digest)
        return self.commit_update(probe, digests)

    def join_broadcast(self, place: Rendezvous, rank: int) -> None:
        """Take part in a group for weights; leaves the one before. Waits for all members, `place.timeout_s`."""
        self._group = None
        try:
            self._group = BroadcastGroup(place, rank, self._device)
        except RuntimeError as error:
            self._no_group = _first_line(error)

    def receive_broadcast(self) -> None:
        """All buckets of the opened version from the group. Waits for the sender, its time-out for each.

        A group that breaks is left, and the commit of this version raises TransitFault.
        """
        manifest = self._weights.opened
        try:
            if self._group is None:
                raise RuntimeError(self._no_group)
            for index in range(len(manifest.buckets)):
                layout = Flat(manifest, index)
                flat = torch.empty(layout.n_bytes, dtype=torch.uint8, device=self._device)
                self._group.broadcast(flat)
                self._weights.receive(index, layout.cut(flat))
        except RuntimeError as error:
            self._group = None  # whoever waits for this one hears of it
            self._no_group = _first_line(error)
            self._weights.refuse(
                TransitFault(
                    f"weights of version {manifest.version} were broadcast, and {self.name} lost the sender or another"
                    f" worker: {self._no_group}"
                )
            )

    def receive_shared(self, index: int, rebuild: Callable[..., torch.Tensor], handle: tuple) -> None:
        """A flat bucket in memory of this GPU that the learner keeps until the commit (CUDA IPC)."""
        self._weights.receive(index, Flat(self._weights.opened, index).cut(rebuild(*handle)))

    def commit_update(self, probe: Probe, digests: tuple[str, ...]) -> WeightAck:
        """Put the staged weights to use and say what they compute."""
        digest = self._weights.commit(digests)
        self._engine.use_weights()
        logprobs = self._engine.logprobs(probe.prompt_ids, probe.response_ids)
        return WeightAck(
            worker=self.name,
            version=self._weights.version,
            digest=digest,
            probe_logprobs=logprobs,
            pid=os.getpid(),
            node=_node(),
        )

    @property
    def _device(self) -> torch.device:
        return next(iter(self._engine.live_tensors().values())).device


def _node() -> str:
    """Whose object store this process maps: that of its node in Ray. Outside Ray it shares memory with nobody."""
    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else f"process {os.getpid()}"


def _handed_on(part: dict[int, Trajectory]) -> Iterator[list[Trajectory] | Receipt]:
    """Both values of a part: responses by their places."""
    yield [t for t in part.values() if t.finish_reason is not None]
    yield Receipt([*part], [t for t in part.values() if t.finish_reason is None])


def _begun(t: Trajectory) -> Begun:
    return Begun(response_ids=t.response_ids, logprobs=t.rollout_logprobs, kept=t.kept)


def _first_line(error: RuntimeError) -> str:
    return (str(error).splitlines() or ["no words"])[0]
