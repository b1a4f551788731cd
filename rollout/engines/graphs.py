"""Decode steps that are recorded once and replayed: on a GPU a step of a small model is mostly launches of kernels.

A recorded step reads and writes the same memory each time, so it has a fixed number of rows and of tokens that it looks
back on: the next of a few sizes. Rows beyond those in use are of slots that are free; they write into the first column,
which whoever gets such a slot overwrites. New weights are written into the old memory on a GPU, so they need nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rollout.engines.decoder import Decoder
from rollout.engines.slots import Slots, Tokens

WIDTH = 256  # tokens that a step looks back on are a multiple of it, or all that there is room for
Result = tuple[Tensor, Tensor | None]  # of a decoder's step
Record = Callable[[Callable[[], Result]], tuple[Result, Callable[[], Any]]]  # -> where its result stands, and: again


class OnCuda:
    """CUDA graphs that share one pool of memory: a result stands until the next of them is replayed."""

    def __init__(self) -> None:
        self._pool, self._aside = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, step: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        here = torch.cuda.current_stream()
        self._aside.wait_stream(here)
        try:
            with torch.cuda.stream(self._aside):  # what libraries set up at their first call must not be recorded
                for _ in range(2):
                    step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._aside):
                result = step()
        finally:
            torch.cuda.set_stream(here)  # a recording that fails leaves the other one behind
        here.wait_stream(self._aside)
        return result, graph.replay


@dataclass(frozen=True)
class _Step:
    token: Tensor  # [rows]
    place: Tensor  # [rows]
    logits: Tensor  # [rows, V]
    values: Tensor | None  # [rows]
    again: Callable[[], Any]


class Graphs:
    """A decoder's steps over the slots of an engine. `given_up`: why steps are launched, since one was not recorded."""

    def __init__(self, decoder: Decoder, make_record: Callable[[], Record]) -> None:
        self._decoder, self._make_record = decoder, make_record
        self.given_up: str | None = None
        self.forget()

    def forget(self) -> None:
        """Steps and the memory that they are about; a pool is not used again when its graphs are gone."""
        self._slots: Slots | None = None
        self._steps: dict[tuple[int, int], _Step] = {}  # by rows and tokens looked back on
        self._record: Record | None = None

    def step(self, token: Tensor, place: Tensor, slots: Slots) -> Result:
        """As Decoder.step. The next call overwrites it."""
        if slots is not self._slots:
            self.forget()
            self._slots = slots
        n = len(token)
        rows = min(1 << (n - 1).bit_length(), slots.n_slots)
        length = min(-(-(int(place.max()) + 1) // WIDTH) * WIDTH, slots.room)
        step = self._steps.get((rows, length))
        if step is None and self.given_up is None:
            step = self._recorded(rows, length, token, place, slots)
        if step is None:
            return self._decoder.step(token, place, Tokens(slots, place))
        _fill((step.token, step.place), (token, place))
        step.again()
        return step.logits[:n], None if step.values is None else step.values[:n]

    def _recorded(self, rows: int, length: int, token: Tensor, place: Tensor, slots: Slots) -> _Step | None:
        at = token.new_zeros(rows), place.new_zeros(rows)
        _fill(at, (token, place))  # it runs while it is recorded, and must write what stands there anyway
        try:
            self._record = self._record or self._make_record()
            result, again = self._record(lambda: self._decoder.step(*at, Tokens(slots, at[1], length)))
        except RuntimeError as error:  # no memory for it, or something that no graph takes: the step itself works
            self.forget()
            self.given_up = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"decode steps are launched one by one, slower: no CUDA graph of {rows} rows ({self.given_up})")
            return None
        self._steps[rows, length] = _Step(*at, *result, again)
        return self._steps[rows, length]


def _fill(kept: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> None:
    """Rows that are not in use are at place 0."""
    for x, y in zip(kept, new, strict=True):
        x[: len(y)].copy_(y)
        x[len(y) :].zero_()
