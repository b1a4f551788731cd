"""How weights travel from learner rank 0 to the workers of all ranks: three ways, one kind of safety behind each.

    object_store   ray.put of each bucket; the workers of a host read one copy of it, where it lies
    collective     a broadcast of each bucket, flat, in a process group of its own (rollout/weight_broadcast.py)
    cuda_ipc       a handle of each bucket, flat, in memory of the GPU that learner and workers share

Whichever it is, each bucket is in the object store too, on rank 0's host: a worker that starts later, or whose delivery
broke, gets it from there, by the same code. The other ranks get references; data stays where it is until it is wanted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from core.schema import SyncConfig
from core.weights import Flat, Probe, WeightAck, WeightManifest
from rollout.group import WeightUpdate
from rollout.shares import Exchange, Rollouts
from rollout.weight_broadcast import BroadcastGroup, Rendezvous, open_store
from trainer.ranks import Ranks


class ObjectStoreTransport:
    """Implements trainer.weight_sender.WeightTransport over the rollouts of one rank."""

    def __init__(
        self, rollouts: Rollouts, timeout_s: float, exchange: Exchange | None = None, followers: tuple[int, ...] = ()
    ) -> None:
        """`followers`: on rank 0, the other ranks that drive workers; they get references of the same buckets."""
        self._rollouts, self._timeout_s, self._exchange, self._followers = rollouts, timeout_s, exchange, followers
        self._manifest: WeightManifest | None = None
        self._buckets: list[Any] = []
        self._digests: tuple[str, ...] = ()

    def open(self, manifest: WeightManifest) -> None:
        self._manifest, self._buckets = manifest, [None] * len(manifest.buckets)
        self._rollouts.open_deal(manifest)

    def send(self, index: int, tensors: list[Tensor], raw: list[np.ndarray]) -> None:
        self._keep(index, raw)
        self._rollouts.deal(index, self._buckets[index])

    def offer(self, digests: tuple[str, ...]) -> None:
        assert None not in self._buckets, "an offer before every bucket was sent"
        self._digests = digests
        for rank in self._followers:
            self._exchange.post(("weights", rank), [digests, *self._buckets])

    def receive(self, rank: int) -> tuple[str, ...]:
        self._digests, *self._buckets = self._exchange.take(("weights", rank))
        self._hand_on()
        return self._digests

    def commit(self, probe: Probe, verify: Callable[[WeightAck], None]) -> int:
        assert self._manifest is not None and None not in self._buckets, "commit before every bucket was sent"
        update = WeightUpdate(self._manifest, self._buckets, self._digests, probe, verify)
        return self._rollouts.update_weights(update, self._timeout_s)

    def _keep(self, index: int, raw: list[np.ndarray]) -> None:
        self._buckets[index] = ray.put(raw)

    def _hand_on(self) -> None:
        """On another rank than 0, whose workers have none of the buckets yet."""
        for index, bucket in enumerate(self._buckets):
            self._rollouts.deal(index, bucket)


class CollectiveTransport(ObjectStoreTransport):
    """Buckets by broadcast. The group lasts as long as its members do: one that lost a worker is made anew at the next
    version, with the successor. What a broken broadcast did not bring comes from the object store.

    Joining and each bucket have half the deadline, so that a member that hangs costs less than twice the whole of it
    until the commit says which it was.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        timeout_s: float,
        exchange: Exchange | None = None,
        followers: tuple[int, ...] = (),
        *,
        ranks: Ranks,
        device: torch.device,
        note: Callable[[str], None],
    ) -> None:
        super().__init__(rollouts, timeout_s, exchange, followers)
        self._ranks, self._device, self._note = ranks, device, note
        self._store: Any = None  # rank 0's
        self._group: BroadcastGroup | None = None  # rank 0's end
        self._members: list[str] = []  # in the order of their ranks in the group, from 1
        self._number = 0
        self._all_got_it = True  # the workers of this rank, by the last broadcast

    def open(self, manifest: WeightManifest) -> None:
        """All ranks meet here: who is to take part, was the last broadcast whole, and where is the next group."""
        self._manifest, self._buckets = manifest, [None] * len(manifest.buckets)
        mine = self._rollouts.open_update(manifest)
        whole = self._all_got_it and (self._group is not None or not self._ranks.is_main)
        of_ranks = self._ranks.gather((mine, whole))
        members = [name for names, _ in of_ranks for name in names]
        if members != self._members or not all(whole for _, whole in of_ranks):
            self._members, self._number, self._group = members, self._number + 1, None
            with self._ranks.together():
                place = self._place() if self._ranks.is_main else None
            place = self._ranks.from_main(place)
            numbers = {name: (place, 1 + i) for i, name in enumerate(members) if name in mine}
            self._rollouts.stage("join_broadcast", first=numbers)
            if self._ranks.is_main and members:
                with self._may_break("connect"):
                    self._group = BroadcastGroup(place, 0, self._device, self._store)
        self._rollouts.stage("receive_broadcast")

    def send(self, index: int, tensors: list[Tensor], raw: list[np.ndarray]) -> None:
        if self._group is not None:
            flat = Flat(self._manifest, index).pack(tensors)
            with self._may_break(f"bucket {index}"):
                self._group.broadcast(flat)
        self._keep(index, raw)

    def commit(self, probe: Probe, verify: Callable[[WeightAck], None]) -> int:
        resent = self._rollouts.counters["weights_resent"]
        verified = super().commit(probe, verify)
        self._all_got_it = resent == self._rollouts.counters["weights_resent"]
        return verified

    def _hand_on(self) -> None:
        """Nothing: the buckets came by the broadcast, and the commit says where they did not."""

    def _place(self) -> Rendezvous:
        host = ray.util.get_node_ip_address()
        self._store = self._store or open_store(host, self._timeout_s)
        return Rendezvous(
            host=host,
            port=self._store.port,
            number=self._number,
            size=1 + len(self._members),
            timeout_s=self._timeout_s / 2,
        )

    @contextmanager
    def _may_break(self, what: str) -> Iterator[None]:
        """A broken group is no fault yet: each worker's answer to the commit says which one is gone, or got nothing."""
        try:
            yield
        except RuntimeError as error:
            self._group = None
            words = (str(error).splitlines() or ["no words"])[0]
            self._note(
                f"weights of version {self._manifest.version} did not reach all of {', '.join(self._members)} by"
                f" broadcast ({what}: {words}); they come through the object store"
            )


class CudaIpcTransport(ObjectStoreTransport):
    """Handles of memory on the one GPU that the learner shares with its workers; it is kept until they committed."""

    def open(self, manifest: WeightManifest) -> None:
        self._kept: list[Tensor] = []
        self._manifest, self._buckets = manifest, [None] * len(manifest.buckets)
        self._told = self._rollouts.open_update(manifest)

    def send(self, index: int, tensors: list[Tensor], raw: list[np.ndarray]) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        flat = Flat(self._manifest, index).pack(tensors)
        torch.cuda.synchronize(flat.device)  # another process reads it, on a stream that knows nothing of this one
        self._kept.append(flat)
        # A handle for each: torch counts who opened one, and would count wrong.
        self._rollouts.stage("receive_shared", first={name: (index, *reduce_tensor(flat)) for name in self._told})
        self._keep(index, raw)

    def commit(self, probe: Probe, verify: Callable[[WeightAck], None]) -> int:
        try:
            return super().commit(probe, verify)
        finally:
            self._kept = []


def make_transport(
    sync: SyncConfig,
    rollouts: Rollouts,
    exchange: Exchange | None = None,
    followers: tuple[int, ...] = (),
    *,
    ranks: Ranks,
    device: torch.device,
    note: Callable[[str], None],
) -> ObjectStoreTransport:
    """The transport that `sync.transport` names."""
    if sync.transport == "collective":
        return CollectiveTransport(rollouts, sync.timeout_s, exchange, followers, ranks=ranks, device=device, note=note)
    kind = CudaIpcTransport if sync.transport == "cuda_ipc" else ObjectStoreTransport
    return kind(rollouts, sync.timeout_s, exchange, followers)
