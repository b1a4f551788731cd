"""What a run leaves on disk: folders for `from_pretrained`, and checkpoints from which it goes on.

    checkpoints/step-20/
        learner/         what Accelerate saves of the engine: parameters, AdamW, RNG; with DeepSpeed a file per rank
        state.json       everything else that the next step depends on
        manifest.json    size and digest of each file above, written last

Every folder is made under another name, flushed and renamed: it is whole or absent. No torch here before it is needed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from core.faults import StorageFault, UserError

if TYPE_CHECKING:
    from trainer.engine_weights import PolicyWeights
    from trainer.learner import Learner
    from trainer.model import PolicyWithValueHead

VALUE_HEAD_FILE = "value_head.safetensors"
FORMAT = 2  # of state.json; 2: multipliers of rewards


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    state: dict[str, Any]  # state.json

    @property
    def step(self) -> int:
        return self.state["step"]


def steps_saved(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder of checkpoints, latest first; whole or damaged."""
    found = [p.name.removeprefix("step-") for p in folder.glob("step-*") if (p / "manifest.json").is_file()]
    return sorted((int(step) for step in found if step.isdigit()), reverse=True)


def latest(folder: Path, note: Callable[[str], None]) -> Checkpoint | None:
    """The latest whole checkpoint; a damaged one is named in a note and passed over. None where there is none.

    Raises StorageFault where there are checkpoints and all are damaged, UserError for one of another version.
    """
    steps = steps_saved(folder)
    for step in steps:
        place = folder / f"step-{step}"
        if (damage := damage_of(place)) is None:
            state = json.loads((place / "state.json").read_text(encoding="utf-8"))
            if state.get("format") != FORMAT:
                raise UserError(
                    f"{place} was written by another version of tokenppo (format {state.get('format')}, this one reads"
                    f" {FORMAT}); go on with that version, or give another --run.name"
                )
            return Checkpoint(place, state)
        note(f"warning: the checkpoint {place} is damaged ({damage}); the one before it is used")
    if steps:
        raise StorageFault(f"{folder}: all {len(steps)} checkpoints are damaged; start under another --run.name")
    return None


def damage_of(place: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest: a flipped bit would load without a word. None: it is whole."""
    try:
        manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
        for name, (size, digest) in manifest.items():
            file = place / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes of {size}"
            if _digest(file) != digest:
                return f"{name} holds other bytes than were written"
    except (OSError, ValueError) as error:
        return f"manifest.json cannot be read: {error}"
    return None if "state.json" in manifest else "state.json is missing"


def save(folder: Path, learner: "Learner", state: dict[str, Any], *, keep: int) -> None:
    """Write checkpoint `step-<learner.step>` of `folder`, then delete all but the last `keep`. All ranks call it.

    Raises StorageFault where the disk does not take it; the checkpoints before it are untouched.
    """
    place, fresh = folder / f"step-{learner.step}", folder / f".step-{learner.step}.new"
    with learner.ranks.together(), _storage(folder):
        if learner.ranks.is_main:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
    with learner.ranks.together(), _storage(folder):
        learner.save_state(fresh / "learner")
    with learner.ranks.together(), _storage(folder):
        if learner.ranks.is_main:
            state = {"format": FORMAT, "step": learner.step, **state}
            (fresh / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            files = sorted(p for p in fresh.rglob("*") if p.is_file())
            manifest = {str(p.relative_to(fresh)): (p.stat().st_size, _digest(p)) for p in files}
            (fresh / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            _flush(fresh)
            if place.exists():
                shutil.rmtree(place)
            os.replace(fresh, place)
            _flush(folder, deep=False)
            for step in steps_saved(folder)[keep:]:
                shutil.rmtree(folder / f"step-{step}")


@contextmanager
def _storage(folder: Path) -> Iterator[None]:
    """What the system and the writers of torch and safetensors raise when a disk takes no more, as StorageFault."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        words = str(error).splitlines()[0]
        # torch's writer raises a plain RuntimeError, as much else does: it names its own source file or class.
        if type(error) is RuntimeError and "inline_container" not in words and "PytorchStreamWriter" not in words:
            raise
        raise StorageFault(
            f"{folder} could not be written ({words}); make room and start the same command again"
        ) from None


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _flush(folder: Path, *, deep: bool = True) -> None:
    """Have the disk take everything in a folder, and the folder's own list of names."""
    for path in (*(folder.rglob("*") if deep else ()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_pretrained(policy: "PolicyWithValueHead", weights: "PolicyWeights", tokenizer: Any, folder: Path) -> None:
    """The causal LM, its tokenizer and the value head beside, as `from_pretrained` loads them; whole or not at all.

    An adapter is merged into the LM, and in `adapter/` by itself too, as peft loads it.
    """
    from safetensors.torch import save_file

    from trainer import adapters

    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    with _storage(folder):
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir(parents=True)
        policy.lm.save_pretrained(fresh, state_dict=weights.lm)
        tokenizer.save_pretrained(fresh)
        save_file({name: x.cpu().contiguous() for name, x in weights.value.items()}, fresh / VALUE_HEAD_FILE)
        if weights.adapter:
            adapters.save_adapter(weights.adapter, policy.config, fresh / "adapter")
        for file in (
            p for p in fresh.rglob("*") if p.is_file()
        ):  # safetensors leaves 0600, which a colleague's job could not read
            file.chmod(0o644)
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)
        shutil.rmtree(old, ignore_errors=True)
