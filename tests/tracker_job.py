"""A process that tracks a made-up run with the real W&B and TensorBoard, and what they wrote."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]

JOB = """
import json, os, signal, sys, time
from pathlib import Path
from accelerate import PartialState
from core.diagnosis import Diagnosis, Facts
from core.schema import Config
from launch import run_folder
from launch import trackers as module
from launch.trackers import Trackers
from trainer.run_log import RunLog

job = json.loads(sys.argv[1])
PartialState(cpu=True)
module.CLOSE_S = job.get("close_s", module.CLOSE_S)
module.INIT_S = job.get("init_s", module.INIT_S)
module.ROOM = job.get("room", module.ROOM)
cfg, folder = Config(**job["cfg"]), Path(job["folder"])
print("wandb loaded:", "wandb" in sys.modules)
trackers = Trackers.open(
    cfg, folder, ids=job.get("ids", {}), resumed_from=job.get("resumed_from"), note=lambda text: print("note:", text)
)
print("ids:", json.dumps(trackers.ids))
if job.get("resumed_from") is not None:
    run_folder.drop_after(folder, job["resumed_from"])
with RunLog(
    folder, total_steps=9, trackers=trackers, diagnosis=Diagnosis(Facts()), alert=trackers.alert
) as log:
    log.baseline({"eval/reward/total": 9.0})
    for step in job["steps"]:
        if step in job.get("looks", []):
            from tests.exhibits import exhibit
            trackers.show(exhibit(step))
        row = {"reward/total": step / 4, "eval/reward/total": -float(step), "faults/tracker_errors": step}
        log.step(step, row | job.get("rows", {}).get(str(step), {}))
        if step in job.get("checkpoints", []):
            trackers.checkpoint(folder / "checkpoints" / f"step-{step}", step)
    if job.get("die"):
        from tests import wandb_file
        (file,) = wandb_file.files(folder)
        while len(wandb_file.read(file).rows) < 1 + len(job["steps"]):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    if job.get("freeze"):
        import psutil
        while len(trackers._open["wandb"]._queue.queue):  # else it would have nothing to be kept from
            time.sleep(0.01)
        core = [p for p in psutil.Process().children() if p.name().startswith("wandb-core")]
        assert len(core) == 1
        core[0].suspend()
        began = time.monotonic()
        for step in range(job["steps"][-1] + 1, job["steps"][-1] + 1 + job.get("more", 0)):
            log.step(step, {"reward/total": 0.0})
        print("frozen for", time.monotonic() - began)
trackers.close(job.get("exit", 0))
trackers.close(0)
print("closed; wandb loaded:", "wandb" in sys.modules)
"""


def settings(folder: Path, *names: str, log: dict | None = None, **options) -> dict:
    return {
        "model": {"path": "m"},
        "data": {"path": "d.jsonl"},
        "rewards": {"quality": {"fn": "mine:quality", "options": options}},
        "log": {"trackers": list(names), "project": "tests", **(log or {})},
        "run": {"name": folder.name, "dir": str(folder.parent)},
    }


def jobs_in(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """A function that runs one process to its end, in a home of its own, with standard input closed."""
    home = tmp_path / "home"
    temporary = tmp_path / "tmp"
    for made in (home, temporary, tmp_path / "cwd", tmp_path / "a-run"):
        made.mkdir()

    def run(*names, env=None, options=None, log=None, returncode=0, argv=(), **spec):
        spec |= {
            "cfg": settings(tmp_path / "a-run", *names, log=log, **(options or {})),
            "folder": str(tmp_path / "a-run"),
        }
        clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "NETRC"}
        clean |= {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
            clean.pop(name, None)
        done = subprocess.run(
            [sys.executable, "-P", "-c", JOB, json.dumps(spec), *argv],
            env=clean | (env or {}),
            cwd=tmp_path / "cwd",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == returncode, done.stdout + done.stderr
        return done

    run.folder, run.home, run.temporary, run.cwd = tmp_path / "a-run", home, temporary, tmp_path / "cwd"
    return run


def notes(done) -> list[str]:
    return [line for line in done.stdout.splitlines() if line.startswith("note:")]


def ids(done) -> dict[str, str]:
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("ids:"))[4:])


def steps(recorded) -> list[int]:
    return [row["_step"] for row in recorded.rows]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    reader = EventAccumulator(str(folder / "tests"), size_guidance={"scalars": 0})
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(name)]
