"""A side of a comparison as a process of its own: JSON lines, requests on its stdin, answers on a pipe of their own.

The parent has `Child`; the process calls `requests` and `answer`. Whatever a library prints in the child, while it is
imported too, goes to its log.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

ANSWERS = "TOKENPPO_ANSWERS_FD"  # environment variable: the child's end of the pipe
_answers: TextIO | None = None


def requests() -> Iterator[dict[str, Any]]:
    """In the child: each request, until the parent is gone or says quit."""
    global _answers
    if _answers is None:
        _answers = os.fdopen(int(os.environ[ANSWERS]), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            return
        yield request


def answer(**fields: Any) -> None:
    assert _answers is not None
    print(json.dumps(fields), file=_answers, flush=True)


class Child:
    """In the parent. Ends the process on leaving; raises RuntimeError with its last words if it dies."""

    def __init__(self, python: Path, script: str, *, env: dict[str, str], log: Path) -> None:
        root = Path(__file__).resolve().parent
        env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | env
        env["PYTHONPATH"] = f"{root.parent}{os.pathsep}{root}"
        self._log = log
        reading, writing = os.pipe()
        self._answers = os.fdopen(reading)
        with open(log, "ab") as printed:
            self._process = subprocess.Popen(
                [str(python), "-P", str(root / script)],  # or rollout.py here would stand in for our package
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=printed,
                text=True,
                env=env | {ANSWERS: str(writing)},
                pass_fds=[writing],
            )
        os.close(writing)  # so that the end of the child is the end of the pipe

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        try:
            print(json.dumps({"do": do, **fields}), file=self._process.stdin, flush=True)
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            last = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{self._process.args[-1]} ended with {code} when asked to {do}:\n{last}")
        return json.loads(line)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            try:
                print(json.dumps({"do": "quit"}), file=self._process.stdin, flush=True)
                self._process.wait(timeout=30)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        self._answers.close()


def reset_peak() -> None:
    """Begin a new peak of this process's resident memory (Linux, `man 5 proc`: clear_refs).

    What was freed goes back to the system first, so that it is not there to be used again unseen.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def memory() -> tuple[int, int]:
    """Resident bytes of this process now, and their peak since `reset_peak`."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmRSS"].split()[0]) * 1024, int(status["VmHWM"].split()[0]) * 1024
