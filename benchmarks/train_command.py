"""Training as a user starts it, `python -m tokenppo train ...`, and what it leaves in the run folder."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "configs" / "cards.yaml"


@dataclass(frozen=True)
class Finished:
    """A run that has ended, well or not."""

    folder: Path
    exit_code: int

    @property
    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl: one object per step."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    @property
    def summary(self) -> dict[str, Any]:
        path = self.folder / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @property
    def last_words(self) -> str:
        """The end of what the command printed, which says why a run failed."""
        return "\n".join(_printed(self.folder).read_text(encoding="utf-8", errors="replace").splitlines()[-12:])


def train(folder: Path, config: Path, settings: dict[str, Any], watch: Callable[[int], None] | None = None) -> Finished:
    """Train in the run folder `folder` and wait for the end. Ctrl-C ends the command, with all that it started.

    Args:
        settings: dotted key -> value, over those of `config`.
        watch: told the command's process id at once; must return.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tokenppo", "train", "--config", str(config.absolute())]
    settings = settings | {"run.dir": folder.parent, "run.name": folder.name}
    command += [f"--{key}={value}" for key, value in settings.items()]
    with open(_printed(folder), "wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        if watch is not None:
            watch(process.pid)
        try:
            process.wait()
        except KeyboardInterrupt:
            process.wait()  # it has had the signal too, and ends its processes
            raise
    return Finished(folder, process.returncode)


def is_done(folder: Path) -> bool:
    """Whether `folder` holds a run that ended well."""
    return Finished(folder, 0).summary.get("exit") == 0


def circumstances() -> str:
    """When and where: for the line above every table."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{date.today()}, {cores} CPU cores ({platform.machine()}), Python {platform.python_version()}"


def _printed(folder: Path) -> Path:
    # Beside the folder: a folder that is not empty before the run could be taken for a run.
    return folder.with_name(f"{folder.name}.out")


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A markdown table, columns aligned so that it can be read as it is."""
    widths = [max(len(line[i]) for line in [heads, *rows]) for i in range(len(heads))]
    lines = [heads, ["-" * (width - 1) + ":" for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def train_unless_done(folder: Path, config: Path, settings: dict[str, Any]) -> Finished:
    """The run that ended well in `folder`, if there is one; else trains anew, over what a run cut short left there."""
    if is_done(folder):
        return Finished(folder, 0)
    shutil.rmtree(folder, ignore_errors=True)
    return train(folder, config, settings)
