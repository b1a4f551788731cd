"""A metric of weight 0 that keeps the first chunk of each step waiting: reward latency, for benchmarks/reward.py."""

import time


class FirstChunkLate:
    """Sleeps `delay_s` in each `chunks`-th call, the first one included."""

    def __init__(self, delay_s: float, chunks: int) -> None:
        self._delay_s, self._chunks, self._calls = delay_s, chunks, 0

    def __call__(self, completions, **_):
        if self._calls % self._chunks == 0:
            time.sleep(self._delay_s)
        self._calls += 1
        return [0.0] * len(completions)
