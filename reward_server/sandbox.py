"""A program that a model wrote, in a process that can do no harm, and the unit tests that it passes.

Level `strict` gives the program a machine of its own in all but the CPU: a root of read-only system folders and an
empty tmpfs, no network, no other process to be seen or signalled, its own IPC, no way to more privileges. It wants
Linux namespaces, as root or as a user who may make user namespaces, and is refused where the kernel has none.

Level `basic` has only what every Unix has: an empty environment, limits, an unprivileged user where we are root. Such a
program can read what that user can, open connections, and leave a process behind that left its session.

Both: limits of time, memory, files, processes and output; a deadline after which everything is killed.

What remains: the tests run in the interpreter that ran the program. One that was written against this harness (that
looks for its pipe and forges an answer, or returns objects that are equal to anything) can pass without solving. It has
to be written for that: leaving early, printing, catching everything and replacing builtins do not pass a test.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from core.faults import ProcessFault, UserError

Level = Literal["strict", "basic"]
CHILD = Path(__file__).with_name("sandbox_child.py")
START_S = 10.0  # that making a sandbox may take, besides the program's own time
PYTHON = os.path.realpath(sys.executable)
FIRST_UID = 1_500_000_000  # beyond what accounts and containers are given


@dataclass(frozen=True)
class Limits:
    wall_s: float = 5.0  # of the program with all of its tests
    cpu_s: int = 5
    memory_mb: int = 512
    file_mb: int = 8
    processes: int = 32
    output_bytes: int = 65536  # of what it prints; more is read and dropped


@dataclass(frozen=True)
class Verdict:
    """What became of a program: which tests passed, and where it failed itself."""

    passed: list[bool]
    error: str = ""  # of the program before any test, or why it ended early
    line: int | None = None  # of the program where that was, from 1
    output: bytes = field(default=b"", repr=False)


def run_tests(program: str, tests: list[str], limits: Limits, level: Level) -> Verdict:
    """Run `program` and then each test in its namespace. A test passes if it ends without an exception, in time.

    Raises ProcessFault where the sandbox itself does not come about: that says nothing about the program.
    """
    with tempfile.TemporaryDirectory(prefix="tokenppo-sandbox-") as folder:
        os.chmod(folder, 0o711)
        here, there = os.pipe(), os.pipe()
        # A user of its own where we are root, who shares neither files nor the count of processes with another sandbox.
        uid = FIRST_UID + int.from_bytes(os.urandom(3), "big")
        options = asdict(limits) | {"level": level, "folder": folder, "uid": uid, "read": here[0], "write": there[1]}
        try:
            process = subprocess.Popen(
                [PYTHON, "-I", "-S", str(CHILD), json.dumps(options)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={},
                pass_fds=(here[0], there[1]),
                start_new_session=True,
            )
        finally:
            os.close(here[0])
            os.close(there[1])
        talk = _Talk(process, here[1], there[0], limits)
        try:
            return talk.judge(program, tests)
        finally:
            _kill(process, talk.first)
            os.close(here[1])
            os.close(there[0])


def refuse_unavailable(level: Level) -> None:
    """Raise UserError, with the reason, where a sandbox of this level cannot be made: one is made and looked at."""
    try:
        verdict = run_tests("", _PROBES if level == "strict" else ["pass"], Limits(), level)
    except ProcessFault as fault:
        remedy = (
            "the Python that runs this must be readable by the user nobody"
            if level == "basic"
            else "run as root or allow user namespaces (sysctl kernel.unprivileged_userns_clone), or take level: basic"
            " on a machine with nothing to lose"
        )
        raise UserError(f"running code at level {level}: {fault}; {remedy}") from None
    failed = [test for test, passed in zip(_PROBES, verdict.passed, strict=False) if not passed]
    if failed or verdict.error:
        raise UserError(f"running code at level {level}: the sandbox leaks here ({failed or verdict.error})")


# Each must pass inside: no interface but a loopback that is down, no other process, no writable system.
_PROBES = [
    "import os; assert os.getpid() <= 3 and not os.path.exists('/proc/1')",
    "import socket; assert [n for _, n in socket.if_nameindex()] == ['lo']",
    "import os; assert os.getuid() != 0 and not os.access('/usr', os.W_OK) and not os.path.exists('/home')",
]


class _Talk:
    """Both sides of the pipes to the harness, every wait with the deadline of the program."""

    def __init__(self, process: subprocess.Popen, to: int, back: int, limits: Limits) -> None:
        self._process, self._to, self._back, self._limits = process, to, back, limits
        assert process.stdout is not None
        self._stdout = process.stdout.fileno()
        self._output = bytearray()
        self._buffer = bytearray()
        self.first: int | None = None  # pidfd of the first process of its PID namespace
        for fd in (self._stdout, back):
            os.set_blocking(fd, False)

    def judge(self, program: str, tests: list[str]) -> Verdict:
        self._deadline = time.monotonic() + START_S
        # Both lines are written before the program comes through the pipe.
        answer = self._line()
        if answer is not None and answer.startswith("first "):
            self.first = os.pidfd_open(int(answer.removeprefix("first ")))
            answer = self._line()
        if answer != "made":
            said = self._last_words().strip().splitlines()[-1:] or ["no words"]
            raise ProcessFault(f"no sandbox could be made ({said[0]})")
        self._deadline = time.monotonic() + self._limits.wall_s
        self._send(program)
        answer = self._line()
        none = [False] * len(tests)
        if answer is None:
            return Verdict(none, self._why(), output=bytes(self._output))
        error, line = _report(answer)
        if error:
            return Verdict(none, error, line, bytes(self._output))
        passed = []
        for test in tests:
            # The word is made now: nothing that ran before could know it.
            word = os.urandom(16).hex()
            self._send(json.dumps([word, test]))
            answer = self._line()
            passed.append(answer == word)
            if answer is None:
                break
        passed += [False] * (len(tests) - len(passed))
        return Verdict(passed, "" if answer is not None or not tests else self._why(), output=bytes(self._output))

    def _last_words(self) -> str:
        deadline = time.monotonic() + 1.0
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            self._output += os.read(self._stdout, 65536)
        except BlockingIOError:
            pass  # it said nothing
        return bytes(self._output[-300:]).decode(errors="replace")

    def _why(self) -> str:
        return "it ended early" if self._ended() else f"not done within {self._limits.wall_s:g} s"

    def _ended(self) -> bool:
        return self._process.poll() is not None or time.monotonic() < self._deadline

    def _send(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        data = len(data).to_bytes(8, "big") + data
        while data:
            left = self._deadline - time.monotonic()
            _, ready, _ = select.select([], [self._to], [], max(0.0, left))
            if not ready:
                return
            try:
                data = data[os.write(self._to, data[:65536]) :]
            except BrokenPipeError:
                return

    def _line(self) -> str | None:
        """The next line from the harness; None where it ended or the deadline passed. Drains what is printed."""
        streams = [self._back, self._stdout]
        while b"\n" not in self._buffer:
            left = self._deadline - time.monotonic()
            ready, _, _ = select.select(streams, [], [], max(0.0, left))
            if not ready:
                return None
            for fd in ready:
                data = os.read(fd, 65536)
                if fd == self._back:
                    if not data or len(self._buffer) > 65536:
                        return None
                    self._buffer += data
                elif not data:
                    streams.remove(fd)
                elif len(self._output) < self._limits.output_bytes:
                    self._output += data[: self._limits.output_bytes - len(self._output)]
        line, _, rest = self._buffer.partition(b"\n")
        self._buffer = bytearray(rest)
        return line.decode("utf-8", "replace")


def _report(answer: str) -> tuple[str, int | None]:
    """What the harness says of the program, unless the program wrote there in its place."""
    try:
        tree = json.loads(answer)
        error, line = tree["error"], tree["line"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "it wrote into the pipe of the harness", None
    return str(error)[:300], line if type(line) is int and 0 < line < 10**9 else None


def _kill(process: subprocess.Popen, first: int | None) -> None:
    """All of it, and wait until it is gone.

    A PID namespace ends with its first process, whose end waits for that of all others; then the process that made the
    namespace ends by itself. Without one the group is all that can be found.
    """
    if first is not None:
        try:
            signal.pidfd_send_signal(first, signal.SIGKILL)
            process.wait(10)
        except ProcessLookupError:
            pass  # it has ended by itself
        finally:
            os.close(first)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of it has ended
    process.wait(10)
    if process.stdout is not None:
        process.stdout.close()
