"""Environments: what answers the policy between its turns, in a process of its own beside the rollout worker.

A process, because it is a stranger's code and every call has a deadline: a thread that hangs in C holds the
interpreter's lock, and with it whoever should notice. What hangs here is killed, and the worker says who it was.

    worker                                     child (`serve`)
    EnvironmentProcess.step ----- turns, columns -----> environment.step(turns, columns)
                            <---- text, end, fault ----
"""

import ctypes
import importlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from core.faults import EnvironmentFault

ROOT = str(Path(__file__).parents[1])
PR_SET_PDEATHSIG = 1


class Environment(Protocol):
    """What `rollout.environment` names; a user writes it, and it inherits nothing.

    Example, a calculator. The response holds "<calc>2+2</calc><eos>", which ended a turn:

        class Calculator:
            def __init__(self, digits: int = 6): ...      # rollout.environment_options, once in each worker
            def step(self, turns, columns):
                asked = re.search("<calc>(.*)</calc>$", turns[-1])
                return f" {evaluate(asked[1])} " if asked else None
    """

    def step(self, turns: list[str], columns: dict[str, Any]) -> str | None:
        """Called when the policy has ended a turn by a stop token.

        Args:
            turns: the response so far: what the policy wrote, what this answered, ..., what the policy just wrote. So
                their number is odd, and (len(turns) + 1) / 2 turns are the policy's. Special tokens are not shown.
            columns: the row of the dataset, `prompt` included.
        Returns:
            the text that the policy goes on after, at least one token of it, or None: the response is over.

        A function of its arguments alone, whatever it was called with before: responses share one object, and which
        they are depends on the worker. What it needs to know of earlier turns is in `turns`.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class EnvironmentSpec:
    """The settings of a run that its environment and the turns in it need."""

    name: str  # as the configuration has it
    load: Callable[[], Environment]  # runs in the environment's process
    timeout_s: float  # of one call
    start_timeout_s: float  # until it is loaded
    max_turns: int
    max_new_tokens: int  # of a whole response, observations included


class EnvironmentProcess:
    """The child process of one worker, and the questions to it. Every wait ends at its deadline with EnvironmentFault,
    and the child with it; it also ends with the process that started it, however that ends."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        """Waits until the environment is loaded. Raises EnvironmentFault where it cannot be."""
        self._spec, self._trusted = spec, False
        self._socket, theirs = socket.socketpair()
        inherited = [path for path in sys.path if path]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([ROOT, *inherited]),  # ours first, whatever folder the user stands in
            "PYTHONHASHSEED": "0",  # or the order of a set, and so an answer, would depend on the worker
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from rollout.environment import serve; serve({theirs.fileno()})"],
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        self._ask((os.getpid(), spec.load), spec.start_timeout_s, "its start")

    @property
    def pid(self) -> int:
        return self._process.pid

    def step(self, turns: list[str], columns: dict[str, Any], uid: str) -> str | None:
        """Its answer for the response of sample `uid`. Raises EnvironmentFault, which names both."""
        where = f"sample {uid}, turn {len(turns) // 2 + 1}"
        answer = self._ask((turns, columns), self._spec.timeout_s, where)
        if not self._trusted:  # once is enough to find a counter, or a clock
            again = self._ask((turns, columns), self._spec.timeout_s, where)
            if again != answer:
                raise self._fault(
                    where, f"asked again it answers {again!r:.80}, not {answer!r:.80}; take all from its arguments"
                )
            self._trusted = True
        return answer

    def close(self) -> None:
        """End the child, whatever it is doing."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _ask(self, question: Any, timeout_s: float, where: str) -> str | None:
        deadline = time.monotonic() + timeout_s
        try:
            # Pickle: rows hold whatever a dataset does, and both ends are this process and its child.
            _send(self._socket, pickle.dumps(question), deadline)
            answer = json.loads(_receive(self._socket, deadline))
        except TimeoutError:
            raise self._fault(where, f"no answer within {timeout_s:g} s") from None
        except OSError:
            raise self._fault(where, f"its process ended with exit code {self._process.wait()}") from None
        if "fault" in answer:
            raise self._fault(where, answer["fault"])
        return answer["text"]

    def _fault(self, where: str, reason: str) -> EnvironmentFault:
        self.close()
        return EnvironmentFault(f"rollout.environment = {self._spec.name}: {where}: {reason}")


def serve(fd: int) -> None:
    """The child: load the environment, then answer until the worker is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends us
    with socket.socket(fileno=fd) as worker:
        try:
            parent, load = pickle.loads(_receive(worker, None))
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                return
            environment, answer = None, {"text": None}
            try:
                environment = load()
            except (Exception, SystemExit) as error:
                answer = {"fault": _raised(error)}
            while True:
                _send(worker, json.dumps(answer).encode(), None)
                turns, columns = pickle.loads(_receive(worker, None))
                answer = _answer(environment, turns, columns)
        except OSError:  # nobody listens any more
            return


def _answer(environment: Environment, turns: list[str], columns: dict[str, Any]) -> dict[str, Any]:
    try:
        text = environment.step(turns, columns)
    except (Exception, SystemExit) as error:
        return {"fault": _raised(error)}
    if text is None:
        return {"text": None}
    if not isinstance(text, str) or not text:
        return {"fault": f"gave {text!r:.80} ({type(text).__name__}); wanted is a text, or None when it is over"}
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        return {"fault": f"gave {text!r:.80}, which is no text: {error.reason}"}
    return {"text": text}


def _raised(error: BaseException) -> str:
    """`raised KeyError: 'x' (env.py:12, in step)`, on one line: the last frame that is not of a library."""
    said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    ours = (__file__, importlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in ours and "<" not in f.filename]
    frames = [f for f in frames if "site-packages" not in f.filename] or frames
    return f"raised {said}" + "".join(f" ({f.filename}:{f.lineno}, in {f.name})" for f in frames[-1:])


def _send(to: socket.socket, message: bytes, deadline: float | None) -> None:
    to.settimeout(_left(deadline))
    to.sendall(len(message).to_bytes(8, "little") + message)


def _receive(from_: socket.socket, deadline: float | None) -> bytes:
    """One message. Raises TimeoutError at the deadline, ConnectionError where the other end is gone."""
    return _read(from_, int.from_bytes(_read(from_, 8, deadline), "little"), deadline)


def _read(from_: socket.socket, n: int, deadline: float | None) -> bytes:
    parts, missing = [], n
    while missing:
        from_.settimeout(_left(deadline))
        part = from_.recv(min(missing, 1 << 20))
        if not part:
            raise ConnectionError("the other end is gone")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
