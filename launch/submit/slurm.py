"""A job of SLURM: one batch script, rendered from launch/templates/slurm.sh.j2, and `sbatch`."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from core.faults import Paused, ProcessFault, UserError
from launch import run_folder
from launch.submit import render
from launch.submit.job import Job

# A value stands on a #SBATCH line, which is sbatch's to read and not a shell's: what it could take for more is refused.
VALUE = re.compile(r"[A-Za-z0-9_.,:/@%=+\[\]*()&|-]+")
OURS = {  # set from the job; a second one would silently count instead
    "job-name",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "cpus-per-task",
    "gpus-per-node",
    "time",
    "signal",
    "requeue",
    "no-requeue",
    "open-mode",
    "output",
    "array",
    "wrap",
}
SUBMIT_S = 60


@dataclass(frozen=True)
class Group:
    """A component of a heterogeneous job, or all of one that is not."""

    options: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Slurm:
    time: str = "24:00:00"
    save_before: int = 300  # seconds
    options: tuple[str, ...] = ()  # KEY=VALUE or KEY, of sbatch
    rollout_nodes: int = 0  # in a component of their own, with `rollout_options`
    rollout_options: tuple[str, ...] = ()
    container: str | None = None
    runtime: str = "pyxis"  # or apptainer
    mounts: tuple[str, ...] = ()


def script(job: Job, slurm: Slurm) -> str:
    """The batch script. Raises UserError for what sbatch would not take, or would take for something else."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", slurm.time):
        raise UserError(f"--time {slurm.time}: wants what sbatch takes, such as 24:00:00 or 2-12:00:00")
    if slurm.save_before < 1:
        raise UserError(f"--save-before {slurm.save_before}: wants seconds, at least 1")
    if slurm.rollout_nodes and job.learner_nodes > job.nodes - slurm.rollout_nodes:
        raise UserError(
            f"--rollout-nodes {slurm.rollout_nodes}: of {job.nodes} nodes {job.learner_nodes} have learners; give"
            " --learner-nodes"
        )
    if slurm.rollout_options and not slurm.rollout_nodes:
        raise UserError("--rollout-sbatch: goes with --rollout-nodes")
    if slurm.mounts and slurm.container is None:
        raise UserError("--mount: goes with --container")
    first = job.nodes - slurm.rollout_nodes
    common = [
        f"job-name={job.name}",
        "ntasks-per-node=1",
        f"cpus-per-task={job.cpus}",
        f"time={slurm.time}",
        f"signal=B:USR1@{slurm.save_before}",
        "requeue",
        "open-mode=append",
        f"output={job.name}-%j.log",
    ]
    gpus = [f"gpus-per-node={job.gpus}"] if job.gpus else []
    groups = [Group((f"nodes={first}", *common, *gpus, *_checked(slurm.options, "--sbatch")))]
    if slurm.rollout_nodes:
        own = [
            "ntasks-per-node=1",
            f"cpus-per-task={job.cpus}",
            *gpus,
            *_checked(slurm.rollout_options, "--rollout-sbatch"),
        ]
        groups.append(Group((f"nodes={slurm.rollout_nodes}", *own)))
    runs = Path(job.cfg.run.dir)
    return render.template(
        "slurm.sh.j2",
        job=job,
        groups=groups,
        folder=str(runs / job.name),
        meet=str(runs / ".meet"),
        log=f"{job.name}-%j-node%n.log",
        words=job.train(job.config),
        save_before=slurm.save_before,
        pause_file=run_folder.PAUSE,
        paused=Paused.exit_code,
        container=slurm.container,
        mounts=slurm.mounts,
        pyxis=slurm.container is not None and slurm.runtime == "pyxis",
        apptainer=slurm.container is not None and slurm.runtime == "apptainer",
    )


def _checked(options: tuple[str, ...], flag: str) -> list[str]:
    for option in options:
        key, equals, value = option.partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", key) or (equals and not VALUE.fullmatch(value)):
            raise UserError(f"{flag} {option!r}: wants KEY=VALUE of sbatch, without spaces, e.g. partition=gpu")
        if key in OURS:
            raise UserError(f"{flag} {option}: {key} is set from the other options of tokenppo submit slurm")
    return list(options)


def submit(text: str) -> str:
    """Queue it; gives what sbatch says. Raises UserError where there is no SLURM or it refuses, ProcessFault where it
    does not answer."""
    try:
        done = subprocess.run(["sbatch"], input=text, capture_output=True, text=True, timeout=SUBMIT_S)
    except FileNotFoundError:
        raise UserError(
            "submit slurm: there is no sbatch on PATH; run this on a login node, or give --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise ProcessFault(
            f"submit slurm: sbatch did not answer within {SUBMIT_S} s; is slurmctld up (sinfo)?"
        ) from None
    if done.returncode:
        raise UserError(f"submit slurm: sbatch refuses: {' '.join(done.stderr.split()) or done.returncode}")
    return done.stdout.strip()
