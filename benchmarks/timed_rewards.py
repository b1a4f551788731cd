"""Rewards whose own cost is known, for benchmarks/reward.py."""

import time

import numpy as np


def constant(completion_ids, **_):
    """Costs nothing to find, as a row of floats: what is timed is everything around it."""
    return [_row(len(ids)) for ids in completion_ids]


_rows: dict[int, np.ndarray] = {}


def _row(length: int) -> np.ndarray:
    if length not in _rows:
        _rows[length] = np.linspace(-1.0, 1.0, length) / 3
    return _rows[length]


class FirstChunkLate:
    """Reward latency: sleeps `delay_s` in each `chunks`-th call, the first one included."""

    def __init__(self, delay_s: float, chunks: int) -> None:
        self._delay_s, self._chunks, self._calls = delay_s, chunks, 0

    def __call__(self, completions, **_):
        if self._calls % self._chunks == 0:
            time.sleep(self._delay_s)
        self._calls += 1
        return [0.0] * len(completions)
