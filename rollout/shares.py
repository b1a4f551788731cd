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
from core.trajectory import PromptRequest
from core.weights import WeightManifest
from rollout.group import RolloutGroup, WeightUpdate
from rollout.in_order import InOrder


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
    """The rollouts of one rank: `start` takes the requests of all ranks and has the chunks of this one written.

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
    ) -> None:
        """
        Args:
            group: the workers that this rank drives; None for a guest.
            exchange: None where there are neither guests nor hosts.
            timeout_s: longest wait of a guest for its next chunk.
        """
        self._shares, self._group, self._exchange, self._timeout_s = shares, group, exchange, timeout_s
        self.counters: Counter[str] = group.counters if group is not None else Counter()
        self._in_order = InOrder(in_background=ahead)
        self._ahead = ahead

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

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
        self._in_order.close()

    def share(self, requests: list[PromptRequest]) -> list[PromptRequest]:
        """Those of `requests` whose responses come to this rank."""
        return self._shares.of_rank(requests)

    def start(self, requests: list[PromptRequest], submit: Callable[[Iterator[Any]], list[Any]]) -> Future:
        """Have the responses written, and each chunk of this rank (an ObjectRef of list[Trajectory]) given to `submit`
        when it is finished. The Future of what `submit` gave, and of the seconds that it took."""

        def write() -> tuple[list[Any], float]:
            began = time.perf_counter()
            pending = submit(self._generate(requests))
            return pending, time.perf_counter() - began

        return self._in_order.run(write)

    def _generate(self, requests: list[PromptRequest]) -> Iterator[Any]:
        shares = self._shares
        if self._group is None:
            for _ in shares.chunks(requests, shares.rank):
                item = self._exchange.take(("chunks", shares.rank), self._timeout_s)
                if not item:
                    raise ProcessFault(f"learner rank {shares.host}, whose workers write for this one, failed")
                yield item[0]
            return
        # In turn by rank, as with one rank for all: nobody's last chunk waits behind all of another's.
        queues = {rank: shares.chunks(requests, rank) for rank in (shares.rank, *shares.guests)}
        longest = max(len(queue) for queue in queues.values())
        todo = [(rank, queue[i]) for i in range(longest) for rank, queue in queues.items() if i < len(queue)]
        with self._told_to_guests():
            for number, chunk in self._group.generate([chunk for _, chunk in todo]):
                rank = todo[number][0]
                if rank == shares.rank:
                    yield chunk
                else:
                    self._exchange.post(("chunks", rank), [chunk])

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
