"""InOrder: calls one after another, at once or in a thread of its own, so that whoever asks need not wait.

    main thread                            this thread
      run(write batch 2)  ------------->     write batch 2
      run(weights of 1)   ------------->     (waits: in order)
      learn from batch 1                     weights of 1
      result of batch 2   <-------------

The thread waits for what its calls wait for, each of which has a deadline of its own. A call that fails is the last:
those behind it fail with its error, which whoever waits for one of them is told. `close` waits for the call that is
running, at most CLOSE_S; what it waits for must have been ended before.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

CLOSE_S = 10.0


class InOrder:
    def __init__(self, *, in_background: bool) -> None:
        self._failed: BaseException | None = None
        self._queue: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if in_background:
            self._thread = threading.Thread(target=self._work, name="rollouts", daemon=True)
            self._thread.start()

    def run(self, call: Callable[[], Any]) -> Future:
        """Queue a call; without a thread it is done when this returns, and what it raises is raised here."""
        future: Future = Future()
        if self._thread is None:
            future.set_result(call())
        else:
            self._queue.put((future, call))
        return future

    def close(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(CLOSE_S)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            future, call = item
            if self._failed is None:
                try:
                    future.set_result(call())
                    continue
                except BaseException as error:  # raised where the result is waited for
                    self._failed = error
            future.set_exception(self._failed)
