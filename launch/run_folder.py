"""The folder of a run: config.yaml, metrics.jsonl, trained.jsonl, summary.json, report.html, checkpoints/, best/,
final/, ledger/, files of the trackers."""

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from core.config import load, to_yaml
from core.faults import StorageFault, UserError
from core.schema import Config
from launch import stopping, trained
from trainer import checkpoint

CHECKPOINTS = "checkpoints"
TRACES = ("metrics.jsonl", CHECKPOINTS, trained.FILE, "best", "final")  # of a run that got somewhere
# A run may be given more steps, or be stopped later; where its folder is, what of it is kept, and whether one may go on
# with it, is no part of what it does.
MAY_CHANGE = ("run.steps", "run.dir", "run.resume", "run.keep_checkpoints", "run.patience", "run.max_kl")
MAY_CHANGE += ("resources.ray_address", "resources.nodes", "resources.join_timeout_s")
PAUSE = "pause"  # a file that somebody made: the run saves after the step that it is in, and ends with exit code 8
LOOK_S = 0.2  # longer than `at_work` ever holds a lock


@dataclass(frozen=True)
class Found:
    """What a run folder holds, of the run that `cfg` describes."""

    rows: int = 0  # of metrics.jsonl
    saved: tuple[int, ...] = ()  # steps of the checkpoints, latest first
    finished: bool = False  # the run ended well, and neither run.steps nor another limit asks for more

    @property
    def started(self) -> bool:
        return bool(self.rows or self.saved or self.finished)


def refuse_no_run(folder: Path) -> None:
    """Raise UserError unless a run was begun there."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"RUN = {folder}: there is no run in this folder (no config.yaml)")


def configuration(folder: Path, overrides: dict[str, Any] | None = None) -> Config:
    """What a run was made with, and `overrides`. Raises UserError where there is no run."""
    refuse_no_run(folder)
    return load(folder / "config.yaml", overrides)


def examine(cfg: Config) -> Found:
    """What is there to go on from. Makes nothing, imports nothing heavy.

    Raises UserError if the folder cannot be written, holds another run, any run where `run.resume` is never, or nothing
    to go on from where it is must.
    """
    folder = cfg.run.folder
    if folder.is_symlink():
        raise UserError(
            f"run.name = {cfg.run.name}: {folder} is a link to {folder.readlink()}, and a run writes into its own"
            " folder alone; give the --run.dir that it lies in"
        )
    parent = next(p for p in [folder, *folder.parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"run.dir = {cfg.run.dir}: {parent} cannot be written to; give another --run.dir")
    # A run that ended before its first step leaves an empty metrics.jsonl; the size of a folder says nothing.
    used = [n for n in TRACES if (folder / n).is_dir() or ((folder / n).is_file() and (folder / n).stat().st_size > 0)]
    saved = tuple(checkpoint.steps_saved(folder / CHECKPOINTS))
    if cfg.run.resume == "must" and not saved:
        raise UserError(
            f"run.resume = must: {folder} holds no checkpoint to go on from; give the --run.dir and --run.name of a run"
            " that has one, or begin with auto"
        )
    if not used:
        return Found()
    remedy = "give another --run.name, or move that folder away"
    if cfg.run.resume == "never":
        raise UserError(
            f"run.resume = never: {folder} holds a run already ({', '.join(used)}); {remedy}, or go on in it with auto"
        )
    _refuse_changes(cfg, folder, remedy)
    if saved and cfg.run.steps < saved[0]:
        raise UserError(f"run.steps = {cfg.run.steps}: the run in {folder} has done {saved[0]} already; {remedy}")
    return Found(rows=len(read_rows(folder)), saved=saved, finished=_is_finished(cfg, folder, saved))


def _is_finished(cfg: Config, folder: Path, saved: tuple[int, ...]) -> bool:
    summary = read_summary(folder)
    if not (folder / "final").is_dir() or summary.get("exit") != 0 or saved[:1] != (summary.get("steps"),):
        return False
    stopped = summary.get("stopped")
    limits = {name: getattr(cfg.run, name) for name in (stopping.PATIENCE, stopping.MAX_KL)}
    return saved[0] == cfg.run.steps or (stopped in limits and limits[stopped] == summary.get("limit"))


def _refuse_changes(cfg: Config, folder: Path, remedy: str) -> None:
    """Raise UserError, a line for each key, where the run in the folder was begun with other settings."""
    try:
        begun, now = flat(load(folder / "config.yaml")), flat(cfg)
    except UserError as error:
        raise UserError(f"{folder} holds a run whose config.yaml cannot be read ({error}); {remedy}") from None
    missing = object()
    changed = [k for k in now | begun if k not in MAY_CHANGE and now.get(k, missing) != begun.get(k, missing)]
    if changed:
        lines = [
            f"{key} = {now.get(key, 'absent')}: the run in {folder} was begun with {begun.get(key, 'nothing there')}"
            for key in changed
        ]
        raise UserError(
            "\n".join([*lines, f"to go on with it take its settings (only run.steps may grow); else {remedy}"])
        )


@contextmanager
def opened(cfg: Config) -> Iterator[Path]:
    """The run folder with its config.yaml, held against every other run until the end of the block."""
    examine(cfg)
    folder = cfg.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "config.yaml", "a", encoding="utf-8") as config:
        try:
            _hold(config)
        except BlockingIOError:
            raise UserError(
                f"run.name = {cfg.run.name}: another run is at work in {folder}; give another name"
            ) from None
        examine(cfg)
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
    """Whether a living process holds this run folder, as `opened` does. Waits for nothing."""
    with open(folder / "config.yaml", encoding="utf-8") as config:
        try:
            fcntl.flock(config, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go of with the file, a moment later
        except BlockingIOError:
            return True
    return False


def drop_after(folder: Path, step: int) -> int:
    """Cut what metrics.jsonl and the ledger say of later steps, which will happen again; returns how many rows of the
    former that were."""
    from core import ledger_table  # with pyarrow, which not every verb waits for

    for file in ledger_table.files(folder):
        if ledger_table.step_of(file) > step:
            file.unlink()
    path, rows = folder / "metrics.jsonl", read_rows(folder)
    kept = [row for row in rows if row["step"] <= step]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        write_whole(path, text)
    return len(rows) - len(kept)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a kill tore in two is no row."""
    path, rows = folder / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json; empty where there is none that can be read."""
    try:
        return json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


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

    write_whole(folder / "summary.json", json.dumps(clean(summary), indent=2, allow_nan=False) + "\n")


def versions() -> dict[str, str]:
    """Of what a run computes with, for the record."""
    found = {"python": platform.python_version()}
    for package in ("tokenppo", "torch", "transformers", "accelerate", "deepspeed", "ray"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def tracker_ids(folder: Path) -> dict[str, str]:
    """Run ids that the trackers of this run have, kept from its start: it may stop before its first checkpoint."""
    path = folder / "trackers.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_tracker_ids(folder: Path, ids: dict[str, str]) -> None:
    if ids:
        write_whole(folder / "trackers.json", json.dumps(ids) + "\n")


def write_whole(path: Path, text: str) -> None:
    """A file that a reader, or the next start, finds whole or not at all. Raises: StorageFault."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise StorageFault(f"{path} could not be written ({error.strerror or error})") from None


def farewell(folder: Path, summary: dict[str, Any], *, was_finished: bool = False) -> str:
    """What is said at the end of a run: its evaluations and where the results are."""
    evals, lines = summary.get("eval", {}), []
    for when in ("before", "after", "best"):
        if when in evals:
            values = {name: value for name, value in evals[when].items() if value is not None}
            shown = ", ".join(f"{k} {v:.3g}" for k, v in values.items() if k != "step" and "/" not in k)
            reward = f"reward {values['reward/total']:.2f}" if "reward/total" in values else ""
            lines.append(f"{when:>7} (step {evals[when]['step']}): " + ", ".join(filter(None, [reward, shown])))
    names = [n for n in ("report.html", "metrics.jsonl", "summary.json", "best", "final") if (folder / n).exists()]
    lines.append(f"results: {folder} ({', '.join(names)})")
    if was_finished:
        lines.insert(0, f"{folder} holds this run, finished after {summary.get('steps')} steps:")
        grows = f"--run.{summary['stopped']}" if summary.get("stopped") else "--run.steps"
        lines.append(f"to train on raise {grows}; to begin anew give another --run.name")
    elif summary.get("stopped"):
        lines.insert(0, f"stopped after step {summary['steps']} by run.{summary['stopped']} = {summary['limit']:g}")
    return "\n".join(lines)
