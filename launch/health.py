"""`tokenppo health [DIR]`: is this installation whole, can runs be written, and does every run at work get on?

For whoever restarts what hangs: a container engine, a job scheduler, a person. To be asked on the machine of the run,
since process ids mean nothing elsewhere. It imports nothing heavy and leaves no trace.
"""

import importlib.metadata
import importlib.util
import json
import os
import tempfile
import time
from pathlib import Path

from core.faults import ProcessFault
from launch import run_folder

NEEDED = ("accelerate", "ray", "torch", "transformers")
PROGRESS = ("metrics.jsonl", "processes.json", "config.yaml")  # a run at work writes to these


def report(folder: Path, stale_s: float) -> str:
    """One line on what is well. Raises ProcessFault with one line on all that is not."""
    version = _version()
    if not folder.exists():
        return f"tokenppo {version} is well; there is no {folder} yet"
    _refuse_unwritable(folder)
    runs = sorted(path.parent for path in [*folder.glob("config.yaml"), *folder.glob("*/config.yaml")])
    at_work = [run for run in runs if run_folder.at_work(run)]
    if wrong := [f"{run}: {problem}" for run in at_work if (problem := _standstill(run, stale_s))]:
        raise ProcessFault("; ".join(wrong))
    return f"tokenppo {version} is well; {folder}: {len(runs)} runs, {len(at_work)} at work"


def _version() -> str:
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise ProcessFault(f"cannot import {', '.join(absent)}: install tokenppo again (bash launch/install.sh)")
    try:
        return importlib.metadata.version("tokenppo")
    except importlib.metadata.PackageNotFoundError:
        raise ProcessFault("tokenppo is not installed: bash launch/demo.sh does it, or pip install .") from None


def _refuse_unwritable(folder: Path) -> None:
    """By writing, to a file without a name: permissions say nothing of a full disk, and root has them all."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
    except OSError as error:
        raise ProcessFault(f"{folder} cannot be written to ({error.strerror}): no run can save anything") from None


def _standstill(run: Path, stale_s: float) -> str | None:
    """Why a run at work does not get on; None if it does."""
    if (pids := _pids(run)) and not any(map(_is_alive, pids.values())):
        return f"its processes ({', '.join(pids)}) are all gone, but it has not ended; stop it and start it again"
    idle_s = time.time() - max((run / name).stat().st_mtime for name in PROGRESS if (run / name).exists())
    if idle_s > stale_s:
        return f"no progress for {idle_s:.0f} s, which is more than --stale-s {stale_s:g}; stop it and start it again"
    return None


def _pids(run: Path) -> dict[str, int]:
    """Name -> process id; empty as long as the run has not written them down whole."""
    try:
        return json.loads((run / "processes.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is there, and another user's
        return True
    try:  # a process that ended and that nobody has waited for still has its number
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return not Path("/proc/self/stat").exists()
