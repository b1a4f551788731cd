"""Ranks: the learner processes of one job, as the loop sees them.

Numbers, names and faults travel over a gloo group of its own beside the engine's (which may be NCCL): CPU tensors,
and a deadline of ours. Every method but the properties waits for all ranks to call it, in the same order; a rank that
died breaks the wait at once, one that hangs breaks it after `timeout_s`. With one process nothing waits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core import faults
from core.faults import Fault, ProcessFault


class Ranks:
    def __init__(self, index: int = 0, size: int = 1, *, timeout_s: float = 1800) -> None:
        """`size` > 1: torch's default process group exists and this is rank `index` of it."""
        self.index, self.size, self._timeout_s = index, size, timeout_s
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if size > 1 else None

    @property
    def is_main(self) -> bool:
        """This rank reports: it owns the run folder, the trackers and the terminal."""
        return self.index == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a CPU tensor over all ranks; a new tensor."""
        total = values.clone()
        if self.size > 1:
            with self._peers("sum"):
                dist.all_reduce(total, group=self._group)
        return total

    def sum_list(self, values: list[float]) -> list[float]:
        """`sum` for plain numbers, in float64."""
        return self.sum(torch.tensor(values, dtype=torch.float64)).tolist()

    def max(self, value: float) -> float:
        """The largest over all ranks; NaN if any is."""
        return float(torch.tensor(self.gather(value), dtype=torch.float64).max())

    def gather_max(self, values: list[float]) -> list[float]:
        """`max` of several numbers at once."""
        return torch.tensor(self.gather(values), dtype=torch.float64).amax(dim=0).tolist()

    def gather(self, item: Any) -> list[Any]:
        """One small picklable object of every rank, by rank, on every rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        with self._peers("gather"):
            dist.all_gather_object(items, item, group=self._group)
        return items

    def from_main(self, item: Any) -> Any:
        """What rank 0 passed, on every rank."""
        return self.gather(item if self.is_main else None)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block in which each rank works alone. It ends well on all ranks or on none.

        Raises:
            Fault: this rank's own, or that of another rank with its number, under the same class and exit code. Its
                attribute `known_to_all` says that every rank raises it.
        """
        if self.size == 1:
            yield
            return
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            mine = error
        try:
            words = self.gather(None if mine is None else _words(mine))
        except ProcessFault:
            if mine is not None:  # the peers left because of something else, or this was the cause
                raise mine from None
            raise
        if mine is not None:
            mine.known_to_all = True
            raise mine
        for index, fault in enumerate(words):
            if fault is not None:
                kind, text = fault
                error = getattr(faults, kind)(f"learner rank {index}: {text}")
                error.known_to_all = True
                raise error

    @contextmanager
    def may_lose_peers(self) -> Iterator[None]:
        """A block in which an engine calls collectives of its own: a peer lost in one is a ProcessFault there too."""
        try:
            yield
        except RuntimeError as error:
            # NCCL's errors have a class. Gloo's are plain RuntimeErrors, as much else is, that name its source file.
            if self.size == 1 or not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
                raise
            raise self._lost("engine", error) from None

    @contextmanager
    def _peers(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._lost(what, error) from None

    def _lost(self, what: str, error: RuntimeError) -> ProcessFault:
        return ProcessFault(
            f"learner rank {self.index} lost another rank, or waited more than resources.collective_timeout_s ="
            f" {self._timeout_s:g} s for it ({what}: {(str(error).splitlines() or ['no words'])[0]})"
        )


def _words(error: Exception) -> tuple[str, str]:
    """Name of the class of fault and its text, as other ranks shall raise it."""
    if isinstance(error, Fault):
        return type(error).__name__, str(error)
    return ProcessFault.__name__, f"{type(error).__name__}: {error} (its traceback is above)"
