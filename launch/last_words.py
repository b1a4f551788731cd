"""What is said and written when the system ends a run (SIGTERM), however little time it leaves.

A cluster sends SIGTERM to every process of a job at once. When its raylet is gone Ray ends this process too, from its
C++ side and with nothing written, and a handler in Python may come too late for that: it runs on the main thread, which
can be inside a call of Ray's for a second. So what must not be lost is done on a thread that the signal itself wakes.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from core.faults import TERMINATED

AGAIN_S = 0.05


def raise_terminated(signum: int, frame: FrameType | None) -> None:
    """A handler of signals: SystemExit(TERMINATED), so that what was started is ended on the way out. A moment later
    where a finalizer is at work: of what is raised there Python prints a traceback and goes on."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            threading.Timer(AGAIN_S, os.kill, (os.getpid(), signum)).start()
            return
        frame = frame.f_back
    raise SystemExit(TERMINATED)


@contextmanager
def on_sigterm(act: Callable[[], None]) -> Iterator[None]:
    """Within the block the first SIGTERM has `act` called at once on a thread; the handler of the process runs as ever.

    Outside the main thread, which alone hears signals, the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hear, ring = socket.socketpair()
    ring.setblocking(False)  # what set_wakeup_fd asks for

    def listen() -> None:
        while number := hear.recv(1):
            if number[0] == signal.SIGTERM:
                act()
                return

    listener = threading.Thread(target=listen, name="sigterm", daemon=True)
    listener.start()
    before = signal.set_wakeup_fd(ring.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        ring.close()
        listener.join()
        hear.close()


@contextmanager
def undisturbed_end(stack: ExitStack, lives_on: bool) -> Iterator[None]:
    """After an exception the SIGTERM with which a launcher ends the ranks that are left cuts nothing short: neither the
    end of what was started nor the words of rank 0, which the other ranks leave to it. A process that lives on, such as
    a notebook, hears it again when `stack` has closed."""
    try:
        yield
    except BaseException:
        if threading.current_thread() is threading.main_thread():
            heard = signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if lives_on:
                stack.callback(signal.signal, signal.SIGTERM, heard)
        raise
