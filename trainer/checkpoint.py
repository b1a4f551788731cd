"""What a run leaves on disk: folders for `from_pretrained`, and checkpoints from which it goes on.

    checkpoints/step-20/
        learner/         what Accelerate saves of the engine: parameters, AdamW, RNG; with DeepSpeed a file per rank
        under_way/       with `rollout.round_tokens`: a file per rank of what is written and not trained on
        state.json       everything else that the next step depends on
        manifest.json    size and SHA-256 of each file above, and of itself; written last

A checkpoint is one unit: it is used whole or not at all. The order in which it is written (`save`) is such that a crash
at any moment leaves the old or the new one; the manifest finds what happens to the bytes later. No torch here before it
is needed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from core.faults import StorageFault, UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from trainer.engine_weights import PolicyWeights
    from trainer.learner import Learner
    from trainer.model import PolicyWithValueHead

VALUE_HEAD_FILE = "value_head.safetensors"
MANIFEST = "manifest.json"
# Of checkpoints; 2: multipliers of rewards; 3: SHA-256, a manifest that proves itself, trained samples; 4: what is
# under way.
FORMAT = 4
ROOM = 1.2  # of the size of the last checkpoint must be free before the next is begun
HASHES = 4  # files that are read at the same time


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    state: dict[str, Any]  # state.json
    damaged: tuple[tuple[Path, str], ...] = ()  # later ones, which cannot be used, and what is wrong with each

    @property
    def step(self) -> int:
        return self.state["step"]


def steps_saved(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder of checkpoints, latest first; whole or damaged."""
    found = [p.name.removeprefix("step-") for p in folder.glob("step-*") if p.is_dir()]
    return sorted((int(step) for step in found if step.isdigit()), reverse=True)


def latest(folder: Path) -> Checkpoint | None:
    """The latest whole checkpoint, with the damaged ones after it. None where there never was one. Changes nothing.

    Raises StorageFault where there are checkpoints and all are damaged, UserError for one of another version.
    """
    damaged: list[tuple[Path, str]] = []
    for step in steps_saved(folder):
        place = folder / f"step-{step}"
        if (damage := damage_of(place)) is None:
            state = json.loads((place / "state.json").read_text(encoding="utf-8"))
            return Checkpoint(place, state, tuple(damaged))
        damaged.append((place, damage))
    n = len(damaged) + len(list(folder.glob("step-*.damaged*")))
    if n:
        first = f" ({damaged[0][0].name}: {damaged[0][1]})" if damaged else ""
        raise StorageFault(f"{folder}: all {n} checkpoints are damaged{first}; start under another --run.name")
    return None


def set_aside(place: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for one; it is never deleted. Returns its new place."""
    aside, n = place.with_name(f"{place.name}.damaged"), 1
    while aside.exists():
        aside, n = place.with_name(f"{place.name}.damaged.{n + 1}"), n + 1
    with storage(place.parent):
        os.replace(place, aside)
        flush(place.parent, deep=False)
    return aside


def damage_of(place: Path, *, only: bool = True, bytes_too: bool = True) -> str | None:
    """What is wrong with a folder, by its manifest: a flipped bit would load without a word. None: it is whole.

    `only`: a file that the manifest does not know is damage too. `bytes_too`: compare contents, not just sizes.
    Raises UserError where the manifest is one of another version of tokenppo.
    """
    try:
        files = _read_manifest(place)
        if links := sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_symlink()):
            return f"{links[0]} is a link, to something that no manifest knows"
        there = {str(p.relative_to(place)) for p in place.rglob("*") if not p.is_dir()} - {MANIFEST}
        if missing := sorted(set(files) - there):
            return f"{missing[0]} is missing"
        if only and (strange := sorted(there - set(files))):
            return f"{strange[0]} is not one of its files"
        for name, (size, _) in files.items():
            if (found := (place / name).stat().st_size) != size:
                return f"{name} has {found} bytes of {size}"
        for name, digest in _digests(place, list(files)).items() if bytes_too else ():
            if digest != files[name][1]:
                return f"{name} holds other bytes than were written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    return None


def save(
    folder: Path,
    learner: "Learner",
    state: dict[str, Any],
    *,
    keep: int,
    tables: "Mapping[str, pa.Table] | None" = None,
) -> None:
    """Write checkpoint `step-<learner.step>` of `folder`, then delete all but the last `keep`. All ranks call it.

    `tables`: of this rank, by the path of the Parquet file in the checkpoint, which no other rank has.

    Each block ends with a meeting of all ranks. In this order: what crashed saves left is cleared and room is asked
    for; every rank writes its files into `.step-N.new`; every rank has the disk take them; rank 0 writes state and
    manifest, flushes, renames, flushes the parent. Only after the manifest was read back under its final name is an old
    checkpoint deleted, and it too is renamed first, so that none is ever half there under the name of a whole one.

    Raises StorageFault where the disk does not take it; the checkpoints before it are untouched.
    """
    place, fresh = folder / f"step-{learner.step}", folder / f".step-{learner.step}.new"
    with learner.ranks.together(), storage(folder):
        if learner.ranks.is_main:
            clear_leftovers(folder)
            _refuse_too_little_room(folder)
            fresh.mkdir(parents=True)
    with learner.ranks.together(), storage(folder):
        learner.save_state(fresh / "learner")
        for name, table in (tables or {}).items():
            _write_table(fresh / name, table)
    with learner.ranks.together(), storage(folder):
        flush(fresh)
    with learner.ranks.together(), storage(folder):
        if learner.ranks.is_main:
            state = {"format": FORMAT, "step": learner.step, **state}
            _write(fresh / "state.json", json.dumps(state, indent=2) + "\n")
            write_manifest(fresh, learner.step)
            os.rename(fresh, place)
            flush(folder, deep=False)
            if damage := damage_of(place, bytes_too=False):
                raise StorageFault(
                    f"{place} was written and is damaged already ({damage}); look at that disk, then start the same"
                    " command again: the checkpoint before it is whole"
                )
            for step in steps_saved(folder)[keep:]:
                os.replace(folder / f"step-{step}", old := folder / f".step-{step}.old")
                shutil.rmtree(old)


def clear_leftovers(folder: Path) -> None:
    """Delete what saves that a crash cut short have left: neither `.new` nor `.old` ever was, or is, a checkpoint."""
    for leftover in (*folder.glob(".step-*.new"), *folder.glob(".step-*.old")):
        shutil.rmtree(leftover)


def _refuse_too_little_room(folder: Path) -> None:
    """Raise StorageFault before anything is written where the next checkpoint, judged by the last, will not fit."""
    steps = steps_saved(folder)
    if not steps:
        return
    files = [p for p in (folder / f"step-{steps[0]}").rglob("*") if p.is_file()]
    needed, free = ROOM * sum(p.stat().st_size for p in files), shutil.disk_usage(folder).free
    if free < needed:
        raise StorageFault(
            f"{folder}: the next checkpoint wants {needed / 2**20:.3g} MiB and {free / 2**20:.3g} MiB are free; make"
            f" room and start the same command again, it goes on from step {steps[0]}"
        )


@contextmanager
def storage(folder: Path) -> Iterator[None]:
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


def write_manifest(place: Path, step: int) -> None:
    """The manifest of all files in a folder, and have the disk take it and the names of the files."""
    names = sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file())
    files = {name: [(place / name).stat().st_size, digest] for name, digest in _digests(place, names).items()}
    _write(place / MANIFEST, _manifest({"format": FORMAT, "step": step, "files": files}))
    for folder in (*(p for p in place.rglob("*") if p.is_dir()), place):
        flush(folder, deep=False)


def _manifest(content: dict[str, Any]) -> str:
    """The text of a manifest: its content and the digest of that. Another text of the same meaning is damage."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"sha256": digest}, indent=2, sort_keys=True) + "\n"


def _read_manifest(place: Path) -> dict[str, tuple[int, str]]:
    """Name -> size and SHA-256. Raises ValueError and its like where it was not written so.

    UserError: see damage_of.
    """
    text = (place / MANIFEST).read_bytes().decode()
    content = json.loads(text)
    if content and all(isinstance(x, list) and len(x) == 2 for x in content.values()):  # as up to format 2
        raise _another_version(place, "2 or before")
    if text != _manifest({name: value for name, value in content.items() if name != "sha256"}):
        raise ValueError("it holds other bytes than were written")
    if content["format"] != FORMAT:
        raise _another_version(place, content["format"])
    number = place.name.removeprefix("step-")
    if number.isdigit() and content["step"] != int(number):
        raise ValueError(f"it is of step {content['step']}")
    return {name: (size, digest) for name, (size, digest) in content["files"].items()}


def _another_version(place: Path, found: object) -> UserError:
    return UserError(
        f"{place} was written by another version of tokenppo (format {found}, this one reads {FORMAT}); go on with that"
        " version, or give another --run.name"
    )


def _digests(place: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of files, several at a time: hashlib lets go of the interpreter meanwhile."""

    def digest(name: str) -> str:
        with open(place / name, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    with ThreadPoolExecutor(HASHES) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _write(path: Path, text: str) -> None:
    """A file that the disk has taken when this returns."""
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _write_table(path: Path, table: "pa.Table") -> None:
    import pyarrow.parquet

    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as stream:
        pyarrow.parquet.write_table(table, stream)


def flush(folder: Path, *, deep: bool = True) -> None:
    """Have the disk take everything in a folder, and the folder's own list of names."""
    for path in (*(folder.rglob("*") if deep else ()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def put_back(folder: Path) -> None:
    """Undo a replacement by `save_pretrained` that a crash cut in two: the folder was away and its successor not there.

    The new one is not taken: the run goes on from before it, and writes it again.
    """
    old = folder.with_name(f".{folder.name}.old")
    if old.is_dir() and not folder.exists():
        os.replace(old, folder)


def save_pretrained(
    policy: "PolicyWithValueHead", weights: "PolicyWeights", tokenizer: Any, folder: Path, *, step: int
) -> None:
    """The causal LM, its tokenizer and the value head beside, as `from_pretrained` loads them; whole or not at all.

    With the model goes its generation config, which transformers took from the base model; and a manifest, by which an
    export knows that these are the bytes that were written. An adapter is merged into the LM, and stands in `adapter/`
    by itself too, as peft loads it.
    """
    from safetensors.torch import save_file

    from trainer import adapters

    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    with storage(folder):
        put_back(folder)
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir(parents=True)
        modules = policy.lm.named_modules()
        # A sync sends these too; who loads the folder makes them anew, and would be told of strangers.
        computed = {f"{path}.{name}" for path, module in modules for name in module._non_persistent_buffers_set}
        policy.lm.save_pretrained(fresh, state_dict={n: x for n, x in weights.lm.items() if n not in computed})
        tokenizer.save_pretrained(fresh)
        save_file({name: x.cpu().contiguous() for name, x in weights.value.items()}, fresh / VALUE_HEAD_FILE)
        if weights.adapter:
            adapters.save_adapter(weights.adapter, policy.config, fresh / "adapter")
        for file in fresh.rglob("*"):  # safetensors leaves 0600, which a colleague's job could not read
            if file.is_file():
                file.chmod(0o644)
        flush(fresh)
        write_manifest(fresh, step)
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)
        flush(folder.parent, deep=False)
        shutil.rmtree(old, ignore_errors=True)
