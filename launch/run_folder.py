"""The folder of a run: config.yaml, metrics.jsonl, summary.json, best/, final/, tensorboard files."""

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from core.config import Config, to_yaml
from core.faults import UserError

TRACES = ("metrics.jsonl", "best", "final")  # of a run that got somewhere; one that did not start may start again
LOOK_S = 0.2  # longer than `at_work` ever holds a lock


def refuse_missing(cfg: Config) -> None:
    """Raise UserError for files and folders that the configuration names and that are not there. Imports nothing."""
    for key, path in (("data.path", cfg.data.path), ("data.eval_path", cfg.data.eval_path)):
        if path is not None and path.endswith((".jsonl", ".json", ".parquet")) and not Path(path).is_file():
            raise UserError(f"{key} = {path}: there is no such file")
    if Path(cfg.model.path).is_absolute() and not Path(cfg.model.path).is_dir():
        raise UserError(f"model.path = {cfg.model.path}: there is no such folder; give one, or a hub id (owner/name)")
    for name, spec in cfg.rewards.items():
        file = spec.fn.rpartition(":")[0]
        if file.endswith(".py") and not Path(file).is_file():
            raise UserError(f"rewards.{name}.fn = {spec.fn}: there is no file {file}")


def refuse_used(cfg: Config) -> None:
    """Raise UserError if the run folder holds a run, or cannot be written. Makes nothing."""
    folder = cfg.run.folder
    # A run that ended before its first step leaves an empty metrics.jsonl; the size of a folder says nothing.
    used = [n for n in TRACES if (folder / n).is_dir() or ((folder / n).is_file() and (folder / n).stat().st_size > 0)]
    if used:
        raise UserError(
            f"run.name = {cfg.run.name}: {folder} holds a run already ({', '.join(used)});"
            " give another --run.name, or move that folder away"
        )
    parent = next(p for p in [folder, *folder.parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"run.dir = {cfg.run.dir}: {parent} cannot be written to; give another --run.dir")


@contextmanager
def created(cfg: Config) -> Iterator[Path]:
    """The run folder with its config.yaml, held against every other run until the end of the block."""
    refuse_used(cfg)
    folder = cfg.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "config.yaml", "a", encoding="utf-8") as config:
        try:
            _hold(config)
        except BlockingIOError:
            raise UserError(
                f"run.name = {cfg.run.name}: another run is at work in {folder}; give another name"
            ) from None
        refuse_used(cfg)
        config.truncate(0)
        config.write(to_yaml(cfg))
        config.flush()
        yield folder


def _hold(config: TextIO) -> None:
    """Lock it; the system lets go when this process ends. Tries twice, since `at_work` may be looking just now."""
    try:
        fcntl.flock(config, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(LOOK_S)
        fcntl.flock(config, fcntl.LOCK_EX | fcntl.LOCK_NB)


def at_work(folder: Path) -> bool:
    """Whether a living process holds this run folder, as `created` does. Waits for nothing."""
    with open(folder / "config.yaml", encoding="utf-8") as config:
        try:
            fcntl.flock(config, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go of with the file, a moment later
        except BlockingIOError:
            return True
    return False


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Prompts that were handed over as objects, for the record: the configuration names this file."""
    try:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except TypeError as error:
        raise UserError(f"prompts: a row cannot be written as JSON ({error}); only plain values can") from None
    path.write_text(text, encoding="utf-8")


def flat(cfg: Config) -> dict[str, Any]:
    """Dotted key -> value of every setting, as trackers want them."""

    def walk(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, value in tree.items():
            out |= walk(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        return out

    return walk(cfg.model_dump(mode="json"), "")


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Whole or not at all. A number that is not finite is written as null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    temporary = folder / ".summary.json.new"
    temporary.write_text(json.dumps(clean(summary), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "summary.json")
