"""Decode steps that are recorded once and replayed: on a GPU a step of a small model is mostly launches of kernels.

A recorded step reads and writes the same memory each time, so it has a fixed number of rows and of tokens that it looks
back on: the next of a few sizes. Rows beyond those in use are of slots that are free, and repeat what they did last:
whoever gets such a slot reads no column that it has not written. New weights are written into the old memory on a GPU,
so they need nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rollout.engines.decoder import Decoder
from rollout.engines.slots import Slots, Tokens

WIDTH = 256  # tokens that a step looks back on are a multiple of it, or all that there is room for
Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], Any]]]  # -> where its result stands, and: again


class OnCuda:
    """CUDA graphs that share one pool of memory: a result stands until the next of them is replayed."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what libraries set up at their first call must not be recorded
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = step()
        return result, graph.replay


@dataclass(frozen=True)
class _Step:
    token: Tensor  # [rows]
    place: Tensor  # [rows]
    logits: Tensor  # [rows, V]
    again: Callable[[], Any]


class Graphs:
    """A decoder's steps over the slots of an engine."""

    def __init__(self, decoder: Decoder, record: Record) -> None:
        self._decoder, self._record = decoder, record
        self._slots: Slots | None = None
        self._steps: dict[tuple[int, int], _Step] = {}  # by rows and tokens looked back on

    def logits(self, token: Tensor, place: Tensor, slots: Slots) -> Tensor:
        """As Decoder.logits, [B, V]. The next call overwrites it."""
        if slots is not self._slots:  # other memory
            self._slots, self._steps = slots, {}
        n = len(token)
        rows = min(1 << (n - 1).bit_length(), slots.n_slots)
        length = min(-(-(int(place.max()) + 1) // WIDTH) * WIDTH, slots.room)
        step = self._steps.get((rows, length))
        if step is None:
            at = token.new_zeros(rows), place.new_zeros(rows)
            _fill(at, (token, place))  # it runs while it is recorded, and must write what stands there anyway
            logits, again = self._record(lambda: self._decoder.logits(*at, Tokens(slots, at[1], length)))
            step = self._steps[rows, length] = _Step(*at, logits, again)
        _fill((step.token, step.place), (token, place))
        step.again()
        return step.logits[:n]


def _fill(kept: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(kept, new, strict=True):
        x[: len(y)].copy_(y)
