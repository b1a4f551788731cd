"""trained.jsonl: the samples that each step was trained on, and the proof of it that goes into a checkpoint.

    {"step": 1, "uids": ["03f1...", "1c9e...", ...]}        one line a step, uids of all ranks sorted

Line s of the file and the proof of step s - 1 give the proof of step s: SHA-256 of the two. So a checkpoint of a few
bytes stands for the list of all samples before it, in the order of the steps; a line that is lost, changed, repeated or
moved is found when the run goes on. What was trained after the checkpoint is cut from the file: it happens again. Where
the file was found to be wrong, its successor begins with the proof of the checkpoint in place of the lines before it.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.faults import StorageFault

FILE = "trained.jsonl"


@dataclass(frozen=True)
class Trained:
    """What a checkpoint says of the samples that were trained on so far."""

    step: int = 0
    samples: int = 0
    chain: str = ""  # SHA-256, hex

    def after(self, line: str) -> "Trained":
        row = json.loads(line)
        chain = hashlib.sha256(f"{self.chain}\n{line}".encode()).hexdigest()
        return Trained(row["step"], self.samples + len(row["uids"]), chain)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def append(folder: Path, before: Trained, step: int, uids: Iterable[str]) -> Trained:
    """Add the line of a step; returns the proof that has it. Raises: StorageFault."""
    line = json.dumps({"step": step, "uids": sorted(uids)})
    try:
        with open(folder / FILE, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")
    except OSError as error:
        raise _unwritten(folder, error) from None
    return before.after(line)


def flush(folder: Path) -> None:
    """Have the disk take it: a checkpoint that is about to be written stands for these lines. Raises: StorageFault."""
    try:
        with open(folder / FILE, "a", encoding="utf-8") as stream:
            os.fsync(stream.fileno())
    except OSError as error:
        raise _unwritten(folder, error) from None


def cut_to(folder: Path, proof: Trained) -> str | None:
    """Drop what comes after a checkpoint. Returns words where the rest is not what that one says.

    The file is a record: training goes on rightly without it, so it is set aside and named, not a reason to stop.
    """
    path, found, kept = folder / FILE, Trained(), []
    try:
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            if found.step >= proof.step:
                break
            found = found.after(line) if "uids" in (row := json.loads(line)) else Trained(**row)
            kept.append(line + "\n")
    except (ValueError, KeyError, TypeError):
        found = Trained()
    try:
        if found == proof:
            fresh = path.with_name(f".{FILE}.new")
            fresh.write_text("".join(kept), encoding="utf-8")
            os.replace(fresh, path)
            return None
        aside = folder / f"{FILE}.damaged-at-{proof.step}"
        if path.exists():
            os.replace(path, aside)
        path.write_text(json.dumps(proof.to_json()) + "\n", encoding="utf-8")
    except OSError as error:
        raise _unwritten(folder, error) from None
    return (
        f"warning: {path} does not list the {proof.samples} samples that the run was trained on up to step"
        f" {proof.step}; what there was is {aside.name} now, and {FILE} begins after that step"
    )


def uids_by_step(folder: Path) -> dict[int, list[str]]:
    """Step -> sorted uids of the samples that it was trained on."""
    rows = [json.loads(line) for line in (folder / FILE).read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row["uids"] for row in rows if "uids" in row}


def _unwritten(folder: Path, error: OSError) -> StorageFault:
    return StorageFault(f"{folder / FILE} could not be written ({error.strerror or error})")
