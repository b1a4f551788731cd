"""Crashes inside `checkpoint.save`, one child process for each call to the file system that it makes.

    python tests/checkpoint_crashes.py FOLDER kill|power first|next

An audit hook sees every open for writing, mkdir, rename, remove and rmdir, and a wrapper every fsync; the child kills
itself with SIGKILL in front of the n-th. With `power` it first empties each file that the disk was not asked to take by
then, as a machine without current would: what is not flushed counts as lost. Product code knows nothing of this. Prints
one JSON object a crash; no torch, so that a child is a fork of a few milliseconds.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from trainer import checkpoint

FILES = {"model.bin": 3000, "optimizer.bin": 6000, "random_states_0.pkl": 10}
WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


class OneRank:
    is_main = True

    def together(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


class FakeLearner:
    """Writes files that say of which step they are."""

    ranks = OneRank()

    def __init__(self, step: int) -> None:
        self.step = step

    def save_state(self, folder: Path) -> None:
        folder.mkdir()
        for name, size in FILES.items():
            (folder / name).write_bytes(bytes([self.step]) * size)


def save(folder: Path, step: int) -> None:
    checkpoint.save(folder, FakeLearner(step), {"prompts": {"position": 8 * step}}, keep=2)


def step_of(found: checkpoint.Checkpoint) -> int:
    """The step that every single byte of a checkpoint agrees on; raises where they do not."""
    steps = {byte for name in FILES for byte in (found.folder / "learner" / name).read_bytes()}
    (step,) = steps | {found.step, found.state["prompts"]["position"] // 8}
    return step


def crash(folder: Path, at: int, run: Callable[[], None], *, power: bool) -> bool:
    """Run in a child that dies in front of its `at`-th call, from 1; whether it did."""
    pid = os.fork()
    if pid == 0:
        seen = 0
        flushed = {p.stat().st_ino for p in folder.rglob("*") if p.is_file()}
        fsync = os.fsync

        def point() -> None:
            nonlocal seen
            seen += 1
            if seen != at:
                return
            for file in folder.rglob("*") if power else ():
                if file.is_file() and file.stat().st_ino not in flushed:
                    os.truncate(file, 0)
            os.kill(os.getpid(), signal.SIGKILL)

        def watched_fsync(descriptor: int) -> None:
            point()
            fsync(descriptor)
            flushed.add(os.fstat(descriptor).st_ino)

        def hook(event: str, args: tuple) -> None:
            if event in WATCHED and (event != "open" or (args[2] & (os.O_WRONLY | os.O_RDWR))) and seen < at:
                point()

        os.fsync = watched_fsync
        sys.addaudithook(hook)
        try:
            run()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def main(folder: Path, power: bool, before: tuple[int, ...]) -> None:
    """Crash everywhere in the save after those of steps `before`; then look at what is there, and save once more."""
    new = len(before) + 1
    for at in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for step in before:
            save(folder, step)
        if not crash(folder, at, lambda: save(folder, new), power=power):
            return
        found = checkpoint.latest(folder)
        loaded = step_of(found) if found else None
        damaged = [step for step in checkpoint.steps_saved(folder) if checkpoint.damage_of(folder / f"step-{step}")]
        save(folder, (loaded or 0) + 1)
        names = sorted(p.name for p in folder.iterdir())
        print(json.dumps({"at": at, "loaded": loaded, "damaged": damaged, "after": names}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "power", {"first": (), "next": (1, 2)}[sys.argv[3]])
