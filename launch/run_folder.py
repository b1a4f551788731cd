"""The folder of a run: config.yaml, metrics.jsonl, summary.json, best/, final/, tensorboard files."""

import json
import math
import os
from pathlib import Path
from typing import Any

from core.config import Config, to_yaml
from core.faults import UserError

TRACES = ("metrics.jsonl", "summary.json", "best", "final")


def refuse_used(cfg: Config) -> None:
    """Raise UserError if the run folder holds a run, or cannot be written. Makes nothing."""
    folder = cfg.run.folder
    used = [name for name in TRACES if (folder / name).exists()]
    if used:
        raise UserError(
            f"run.name = {cfg.run.name}: {folder} holds a run already ({', '.join(used)});"
            " give another --run.name, or move that folder away"
        )
    parent = next(p for p in [folder, *folder.parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"run.dir = {cfg.run.dir}: {parent} cannot be written to; give another --run.dir")


def create(cfg: Config) -> Path:
    """Make the run folder with its config.yaml."""
    refuse_used(cfg)
    folder = cfg.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(cfg), encoding="utf-8")
    return folder


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
