"""What DeepSpeed compiles on first use, and the lock that it waits at without end.

torch lets one process compile an extension and has the others wait until its lock file is gone
(`torch/utils/file_baton.py`). A process that is killed meanwhile leaves the file behind, and every later run on this
machine hangs in its start without a word. The compiling process holds the file open: that tells one from the other.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from core.faults import ProcessFault

# Where no other machine compiles: the process that holds a lock is one of ours to see.
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs", "apfs"}
ELSEWHERE_S = 180.0  # no object file of DeepSpeed's takes that long: a folder left alone for it is left for good
LETTING_GO_S = 0.5  # torch closes the file, then removes it: between the two it has no holder


def root() -> Path:
    """The folder in which torch compiles extensions, one folder each."""
    if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(folder)
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


def wait_for_compilers(
    note: Callable[[str], None], *, say_wait: bool = True, deadline_s: float = 600.0, folder: Path | None = None
) -> None:
    """Return once no other process compiles an extension; locks of processes that are no more are removed, and whoever
    removes one notes it. `say_wait`: note a wait too, which one rank does for all.

    Raises ProcessFault where one is still held after `deadline_s` seconds.
    """
    folder = folder or root()
    until, told = time.monotonic() + deadline_s, not say_wait
    while held := [lock for lock in _locks(folder) if not _is_free(lock, note)]:
        if time.monotonic() > until:
            raise ProcessFault(
                f"{held[0]}: another process has been compiling there for {deadline_s:.0f} s; if there is none, remove"
                " this file"
            )
        if not told:
            note(f"waiting for another process that compiles in {held[0].parent}")
            told = True
        time.sleep(0.2)


def locks(folder: Path | None = None) -> tuple[list[Path], list[Path]]:
    """(Locks that nobody holds any more, locks that may be held). Removes none."""
    abandoned, held = [], []
    for lock in _locks(folder or root()):
        seen = _unheld(lock)
        if seen is not None:
            (abandoned if seen else held).append(lock)
    return abandoned, held


def _locks(folder: Path) -> list[Path]:
    return [*folder.glob("*/lock"), *folder.glob("*/*/lock")]


def _unheld(lock: Path) -> bool | None:
    """Whether nobody holds `lock`; None where it is gone. Looks twice, LETTING_GO_S apart, before it says so."""
    try:
        seen = lock.stat()
        if _is_held(lock):
            return False
        quiet_s = time.time() - max(path.stat().st_mtime for path in [lock.parent, *lock.parent.iterdir()])
        if not _is_local(lock) and quiet_s < ELSEWHERE_S:
            return False
        time.sleep(LETTING_GO_S)
        now = lock.stat()
    except FileNotFoundError:
        return None
    # Another file: somebody began meanwhile.
    return (now.st_ino, now.st_ctime_ns) == (seen.st_ino, seen.st_ctime_ns) and not _is_held(lock)


def _is_free(lock: Path, note: Callable[[str], None]) -> bool:
    """Whether `lock` is gone, by its holder or, where that is no more, by us."""
    unheld = _unheld(lock)
    if unheld is not True:
        return unheld is None
    lock.unlink(missing_ok=True)
    note(f"removed {lock}: the process that compiled there is no more")
    return True


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine has the file open."""
    name = os.path.realpath(lock)
    for process in psutil.process_iter():
        try:
            if any(file.path == name for file in process.open_files()):
                return True
        except psutil.Error:
            continue  # gone, or somebody else's, who does not compile in our folder
    return False


def _is_local(path: Path) -> bool:
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    inside = [mount for mount in mounts if path.resolve().is_relative_to(mount)]
    return bool(inside) and mounts[max(inside, key=lambda mount: len(mount.parts))] in LOCAL
