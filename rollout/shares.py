"""Shares: which learner rank gets which chunk, and a group of workers that writes for several ranks.

Legend: N ranks, W workers. Chunks are cut from the requests of all ranks, by ordinal; chunk c belongs to rank c mod N,
whoever writes it. Rank r drives workers r, r + N, ...; where W < N, rank r >= W drives none and is the guest of rank
r mod W, its host.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from core.faults import ProcessFault
from core.trajectory import PromptRequest, Trajectory
from core.under_way import UnderWay, Written
from core.weights import WeightManifest
from rollout.group import RolloutGroup, WeightUpdate
from rollout.in_order import InOrder
from rollout.rounds import RoundPlan

END = "end"  # to a guest: of what it asked for nothing more will come


@dataclass(frozen=True)
class Shares:
    rank: int = 0
    n_ranks: int = 1
    n_workers: int = 1
    chunk_size: int = 32

    @property
    def workers(self) -> list[int]:
        """Numbers of the workers that this rank drives."""
        return list(range(self.rank, self.n_workers, self.n_ranks))

    @property
    def host(self) -> int:
        """The rank whose workers write for this one."""
        return self.rank % self.n_workers if self.rank >= self.n_workers else self.rank

    @property
    def guests(self) -> list[int]:
        """Ranks without workers for which this one's workers write."""
        if self.rank >= self.n_workers:
            return []
        return [r for r in range(self.n_workers, self.n_ranks) if r % self.n_workers == self.rank]

    def chunks(self, requests: list[PromptRequest], rank: int) -> list[list[PromptRequest]]:
        """The chunks of `requests` (those of all ranks, in order) that belong to `rank`."""
        cut = [requests[i : i + self.chunk_size] for i in range(0, len(requests), self.chunk_size)]
        return cut[rank :: self.n_ranks]

    def of_rank(self, requests: list[PromptRequest]) -> list[PromptRequest]:
        """The requests of this rank."""
        return [request for chunk in self.chunks(requests, self.rank) for request in chunk]


class Exchange(Protocol):
    """Where drivers of one Ray cluster hand references to each other (launch/exchange.py)."""

    def post(self, box: tuple[str, int], item: list[Any]) -> None: ...

    def take(self, box: tuple[str, int], timeout_s: float | None = None) -> list[Any]: ...


class Rollouts:
    """The rollouts of one rank: `start` takes the requests of all ranks and has the chunks of this one written;
    `start_batch` does so for a batch to train on, in rounds where these are planned.

    Batches and weight updates happen in the order in which they were asked for; `ahead`: in the background.
    """

    def __init__(
        self,
        shares: Shares,
        group: RolloutGroup | None,
        exchange: Exchange | None = None,
        timeout_s: float = 1800,
        *,
        ahead: bool = False,
        plan: RoundPlan | None = None,
        at_least: int | None = None,
    ) -> None:
        """
        Args:
            plan: of batches that are written in rounds; with it every rank drives workers of its own.
            group: the workers that this rank drives; None for a guest.
            exchange: None where there are neither guests nor hosts.
            timeout_s: longest wait of a guest for its next part of a chunk.
            at_least: of a chunk that is written whole, as RolloutWorker.generate has it.
        """
        self._shares, self._group, self._exchange, self._timeout_s = shares, group, exchange, timeout_s
        self.counters: Counter[str] = group.counters if group is not None else Counter()
        self._in_order = InOrder(in_background=ahead)
        self._ahead, self._at_least = ahead, at_least
        self._plan, self._under_way = plan, UnderWay()  # the latter is that of the calls in order

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the workers that this rank drives, by name."""
        return self._group.pids if self._group is not None else {}

    def wait_ready(self) -> None:
        """Until every worker of this rank has loaded its model."""
        if self._group is not None:
            self._group.wait_ready()

    def open_update(self, manifest: WeightManifest) -> list[str]:
        """See RolloutGroup.open_update; a guest has no workers to tell. Nor are they told early where batches are
        written ahead: the version before may still wait for its commit, and this one would take its place."""
        return self._group.open_update(manifest) if self._group is not None and not self._ahead else []

    def open_deal(self, manifest: WeightManifest) -> None:
        """See RolloutGroup.open_deal. Where batches are written ahead, the buckets wait for the weights' turn."""
        if self._group is not None and not self._ahead:
            self._group.open_deal(manifest)

    def deal(self, index: int, bucket: Any) -> None:
        """See RolloutGroup.deal."""
        if self._group is not None and not self._ahead:
            self._group.deal(index, bucket)

    def stage(self, method: str, *args: Any, first: dict[str, tuple] | None = None) -> None:
        """See RolloutGroup.stage."""
        if self._group is not None and not self._ahead:
            self._group.stage(method, *args, first=first)

    def update_weights(self, update: WeightUpdate, timeout_s: float) -> int | None:
        """See RolloutGroup.update_weights; a guest has no worker to give them to. None where batches are written ahead:
        those asked for before may still be written, those asked for from now on come of it, or raise what it raised."""
        if self._group is None:
            return 0

        def commit() -> int:
            with self._told_to_guests():
                return self._group.update_weights(update, timeout_s)

        done = self._in_order.run(commit)
        return None if self._ahead else done.result()

    def restore(self, under_way: UnderWay) -> None:
        """Go on with what a checkpoint has. Before anything is asked for."""
        self._under_way = under_way

    def finish(self) -> None:
        """Wait for all that was asked for, and raise what one of these raised. Where batches are written ahead, none of
        them waits for the last weights."""
        self._in_order.run(lambda: None).result()

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
        self._in_order.close()

    def share(self, requests: list[PromptRequest]) -> list[PromptRequest]:
        """Those of `requests` whose responses come to this rank."""
        return self._shares.of_rank(requests)

    def start(self, requests: list[PromptRequest], submit: Callable[[Iterator[Any]], list[Any]]) -> Future:
        """Have the responses written, and each part of this rank's chunks (an ObjectRef of list[Trajectory]) given to
        `submit` when it is finished. The Future of what `submit` gave, and of the seconds that it took."""

        def write() -> tuple[list[Any], float]:
            began = time.perf_counter()
            pending = submit(self._generate(requests))
            return pending, time.perf_counter() - began

        return self._in_order.run(write)

    def start_batch(self, requests: list[PromptRequest], submit: Callable[[Iterator[Any]], list[Any]]) -> Future:
        """Have a batch written: the responses to `requests`, which all ranks took for it; or, in rounds, as many
        prompts, the first that became ready of all that were taken so far. The Future of a Written."""

        def whole() -> Written:
            began = time.perf_counter()
            pending = submit(self._generate(requests))
            return Written(requests=self.share(requests), pending=pending, seconds=time.perf_counter() - began)

        return self._in_order.run(whole if self._plan is None else lambda: self._in_rounds(requests, submit))

    def _in_rounds(self, requests: list[PromptRequest], submit: Callable[[Iterator[Any]], list[Any]]) -> Written:
        """One round where anything is under way, so that what is long moves on in every step, and more of them, under
        the same weights, until a batch is ready."""
        began, pending, rounds = time.perf_counter(), [], 0
        way, quota = self._under_way.take(self._plan.of_rank(requests)), self._plan.quota
        while (way.begun and not rounds) or len(way.ready) < quota:
            assert way.begun, f"{len(way.ready)} of {quota} prompts are ready and no others are under way"
            unfinished: list[Trajectory] = []
            pending += submit(self._round(way, unfinished))
            way, rounds = way.after_round(unfinished), rounds + 1
        self._group.let_rest()
        batch, self._under_way = way.batch(quota)
        seconds = time.perf_counter() - began
        return Written(requests=batch, pending=pending, seconds=seconds, rounds=rounds, under_way=self._under_way)

    def _round(self, way: UnderWay, unfinished: list[Trajectory]) -> Iterator[Any]:
        """Have all that is not over written on; yields references to what is over, and collects the rest."""
        chunks = self._plan.chunks(way.writing)
        for number, over, left in self._group.generate(chunks, way.begun, self._plan.tokens):
            unfinished += left
            if len(left) < len(chunks[number]):
                yield over

    def _generate(self, requests: list[PromptRequest]) -> Iterator[Any]:
        shares = self._shares
        if self._group is None:
            while (item := self._exchange.take(("chunks", shares.rank), self._timeout_s)) != [END]:
                if not item:
                    raise ProcessFault(f"learner rank {shares.host}, whose workers write for this one, failed")
                yield item[0]
            return
        # In turn by rank, as with one rank for all: nobody's last chunk waits behind all of another's.
        queues = {rank: shares.chunks(requests, rank) for rank in (shares.rank, *shares.guests)}
        longest = max(len(queue) for queue in queues.values())
        todo = [(rank, queue[i]) for i in range(longest) for rank, queue in queues.items() if i < len(queue)]
        with self._told_to_guests():
            for number, part, _ in self._group.generate([chunk for _, chunk in todo], at_least=self._at_least):
                rank = todo[number][0]
                if rank == shares.rank:
                    yield part
                else:
                    self._exchange.post(("chunks", rank), [part])
            for guest in shares.guests:
                self._exchange.post(("chunks", guest), [END])

    @contextmanager
    def _told_to_guests(self) -> Iterator[None]:
        """A block whose failure, or that of whoever takes its chunks, guests hear of: nothing more will come, and they
        need not wait for their deadline."""
        try:
            yield
        except (Exception, GeneratorExit):
            for guest in self._shares.guests:
                with suppress(ProcessFault):  # a broken exchange comes of the failure and must not hide it
                    self._exchange.post(("chunks", guest), [])
            raise
