"""Room for a run: shared memory and disk, asked for before anything is started."""

import shutil
import sys
from pathlib import Path

from core.faults import UserError
from core.schema import Config

SHARED = Path("/dev/shm")
MIB, GIB = 2**20, 2**30


def refuse_too_little(cfg: Config, n_parameters: int) -> None:
    """Raise UserError where this machine has too little shared memory, or the disk of the runs too little room."""
    refuse_too_little_shared_memory(cfg)
    refuse_too_little_disk(cfg, n_parameters)


def refuse_too_little_shared_memory(cfg: Config) -> None:
    """Raise UserError where the object store does not fit into the shared memory of this machine."""
    if cfg.resources.ray_address is None and sys.platform == "linux" and SHARED.is_dir():
        free = shutil.disk_usage(SHARED).free
        if free < cfg.resources.object_store_mb * MIB:
            raise UserError(
                f"resources.object_store_mb = {cfg.resources.object_store_mb}: {SHARED} has {free // MIB} MiB free;"
                " give less, or the container more (docker run --shm-size)"
            )


def refuse_too_little_disk(cfg: Config, n_parameters: int) -> None:
    """Raise UserError where the files of the run do not fit. Those that it has already are room of its own."""
    needed = written_bytes(cfg, n_parameters) - _there_already(cfg.run.folder)
    parent = next(p for p in [cfg.run.folder, *cfg.run.folder.parents] if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"run.dir = {cfg.run.dir}: the run writes up to {needed / GIB:.2g} GiB there (checkpoints, best, final) and"
            f" {free / GIB:.2g} GiB are free; make room, lower run.keep_checkpoints, or give another --run.dir"
        )


def _there_already(folder: Path) -> int:
    """Bytes of an earlier start of this run: they are replaced, or are part of what is to be written."""
    places = [folder / name for name in ("checkpoints", "best", "final")]
    return sum(file.stat().st_size for place in places for file in place.rglob("*") if file.is_file())


def written_bytes(cfg: Config, n_parameters: int) -> int:
    """Bytes on disk at the worst moment: one more checkpoint than is kept, best and final while they are replaced.

    A checkpoint is parameters and two moments of AdamW, in float32.
    """
    return n_parameters * 4 * (3 * (cfg.run.keep_checkpoints + 1) + 3)
