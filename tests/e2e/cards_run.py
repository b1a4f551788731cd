"""Starting real runs for the tests here: the command as a user types it, and the processes that belong to it."""

import contextlib
import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "configs" / "cards.yaml"


def checkout(place: Path) -> Path:
    """A folder that looks like a checkout with its .venv to whoever stands in it; what is written stays in it."""
    installed, wanted = Path(sys.prefix) / "installed", (ROOT / "pyproject.toml").open("rb")
    with wanted:
        now = subprocess.run(["cksum"], stdin=wanted, capture_output=True, text=True, check=True).stdout
    # Of another state of pyproject.toml, a script of the checkout would install that folder in place of this one.
    if not installed.is_file() or not installed.read_text().startswith(now.strip()):
        pytest.skip("wants the environment that launch/install.sh makes now: bash launch/test.sh --all")
    place.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", ".venv", ".git"):
            (place / entry.name).symlink_to(entry)
    (place / ".venv").symlink_to(sys.prefix)
    return place


class Run:
    """A `tokenppo train` that was started here. Its processes are found through it, never by name.

    `command` is what is typed in its place to have a run in `folder`.
    """

    def __init__(
        self, folder: Path, *options: str, config: Path | None = CARDS, command: list[str] | None = None
    ) -> None:
        self.folder = folder
        self.out = folder.with_suffix(".out")
        if command is None:
            command = [str(Path(sys.executable).parent / "tokenppo"), "train"]
            command += ["--config", str(config)] if config else []
            command += ["--run.dir", str(folder.parent), "--run.name", folder.name]
        command = [*command, *options]
        folder.parent.mkdir(exist_ok=True)
        with open(self.out, "wb") as out:
            # A shell has its background jobs ignore Ctrl-C, and whatever they start inherits that, the tests too.
            hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
            self.process = subprocess.Popen(
                command, cwd=folder.parent, stdout=out, stderr=subprocess.STDOUT, preexec_fn=hear
            )

    def words(self) -> str:
        return self.out.read_text(errors="replace")

    def rows(self) -> list[dict]:
        """The whole rows so far: what is read beside the writer may end in the middle of one."""
        path = self.folder / "metrics.jsonl"
        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
        return [json.loads(line) for line in whole.splitlines()]

    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())

    def pids(self) -> dict[str, int]:
        return json.loads((self.folder / "processes.json").read_text())

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_for(self, what: Callable[[], object], timeout_s: float = 300) -> None:
        """Until `what()` is true; fails when the run ends first or the deadline passes."""
        deadline = time.monotonic() + timeout_s
        while not what():
            assert self.process.poll() is None, f"ended with {self.process.returncode} too early:\n{self.words()}"
            assert time.monotonic() < deadline, f"nothing after {timeout_s} s:\n{self.words()}"
            time.sleep(0.05)

    def end(self, timeout_s: float = 600) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout_s} s:\n{self.words()}") from None

    def kill(self) -> None:
        for process in [*self.family(), psutil.Process(self.process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended with one that was killed before it
                process.kill()
        self.process.wait(30)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


def same_numbers(a: list[dict], b: list[dict]) -> None:
    """Two runs have the same metrics bit for bit, but for what clocks and faults decide."""

    def timeless(rows: list[dict]) -> list[dict]:
        return [
            {k: v for k, v in row.items() if k != "timestamp" and not k.startswith(("time/", "perf/", "faults/"))}
            for row in rows
        ]

    assert len(a) == len(b) > 0
    for x, y in zip(timeless(a), timeless(b), strict=True):
        assert x == y
