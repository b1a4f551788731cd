"""A job of Kubernetes: a YAML of several documents, rendered from launch/templates/k8s_*.yaml.j2, and `kubectl apply`.

    1 node      ConfigMap, NetworkPolicy, Job       `tokenppo train` with a Ray of its own
    N nodes     ConfigMap, NetworkPolicy, RayJob    KubeRay (1.5.1 or newer) starts Ray with a token of its own; its
                                                    head pod has the learner processes, N-1 worker pods the rest

The current folder stands for WORKDIR of the image: what the configuration names must lie in it, and be in the image.
The configuration itself goes along. Runs are on a volume that is there already; secrets are named, never written.
"""

import hashlib
import os
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from core.faults import InvariantFault, Paused, ProcessFault, UserError
from core.reward_name import RewardName
from core.schema import Config
from launch.submit import ray_job, render
from launch.submit.job import Job

WORKDIR = Path("/app")  # as docker/Dockerfile has it
RAY_VERSION = "2.60.0"  # the least that pyproject.toml asks for; KubeRay wants to know it before it turns on tokens
NAME_MAX = 47  # of a RayJob: KubeRay makes longer names of it
RETRIES = 6
CONFIG_MAX = 2**20  # bytes of a ConfigMap
END_S = 30  # between the end of the wait for a save and the killing of what is left
STALE_S = 3600  # of `tokenppo health`
APPLY_S = 120

LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
UNITS = {"": 1, **{f"{u}i": 2 ** (10 * n) for n, u in enumerate("KMGT", 1)}, "k": 10**3, "M": 10**6, "G": 10**9}
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Kubernetes:
    image: str
    namespace: str | None = None  # that of kubectl's context
    volume_claim: str = "tokenppo-runs"
    secret: str | None = None
    memory: str = "32Gi"  # of each pod, shared memory included
    save_before: int = 300  # seconds that a pod which must go has for its save


def manifest(job: Job, given: Kubernetes) -> str:
    """The documents. Raises UserError for what Kubernetes would refuse, or would take for something else."""
    _check(given)
    runs = run_dir(job.cfg)
    named = in_image(job, runs)
    if job.nodes > 1 and job.gpus and job.cfg.rollout.placement != "apart":
        raise UserError(
            f"--nodes {job.nodes}: learners sit on the first node, and with rollout.placement = colocated so do the"
            " workers; give --rollout.placement apart, or --nodes 1"
        )
    shm = -(-job.cfg.resources.object_store_mb * 3 // 2)
    if shm * MIB >= bytes_of(given.memory):
        raise UserError(
            f"--memory {given.memory}: shared memory is part of it, and resources.object_store_mb ="
            f" {job.cfg.resources.object_store_mb} takes {shm}Mi; give more"
        )
    config = _text(job.config)
    inside = replace(
        job,
        cfg=job.cfg.model_copy(update={"run": job.cfg.run.model_copy(update={"dir": str(runs)})}),
        config=_inside(job.config) if job.config else None,
        accelerate=str(_inside(Path(job.accelerate))) if Path(job.accelerate).is_absolute() else job.accelerate,
    )
    for word in (*job.words, str(runs), *map(str, named), str(inside.config or "")):
        _refuse_unwritable(word)
    name = resource_name(job.name)
    return render.template(
        "k8s_rayjob.yaml.j2" if job.nodes > 1 else "k8s_job.yaml.j2",
        job=inside,
        k8s=given,
        own_name=name,
        config=config,
        config_name=f"{name}-{hashlib.sha256(config.encode()).hexdigest()[:8]}" if config is not None else None,
        named=named,
        runs=str(runs),
        folder=str(runs / job.name),
        workdir=str(WORKDIR),
        words=train_words(inside),
        entrypoint=f"cd {WORKDIR} && {ray_job.entrypoint(inside, None)}" if job.nodes > 1 else None,
        shm=shm,
        store=job.cfg.resources.object_store_mb * MIB,
        grace=given.save_before + END_S,
        stale=STALE_S,
        retries=RETRIES,
        ray_version=RAY_VERSION,
        paused=Paused.exit_code,
        hopeless=[UserError.exit_code, InvariantFault.exit_code],
    )


def train_words(job: Job) -> list[str]:
    """The words of the container of a Job, as its process shall have them."""
    ranks = ["--accelerate", job.accelerate, "--num-processes", str(job.ranks)] if job.ranks > 1 else []
    return ["tokenppo", "train", *job.train(job.config), "--run.dir", job.cfg.run.dir, *ranks]


def resource_name(run: str) -> str:
    """The name of a run as Kubernetes takes names; another one for every other run."""
    slug = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    name = f"tokenppo-{slug}"
    if slug == run and len(name) <= NAME_MAX:
        return name
    return f"{name[: NAME_MAX - 7].rstrip('-')}-{hashlib.sha256(run.encode()).hexdigest()[:6]}"


def run_dir(cfg: Config) -> Path:
    """Where the volume is mounted. Raises UserError for a folder that would hide the program."""
    runs = Path(cfg.run.dir)
    runs = _inside(runs) if runs.is_relative_to(Path.cwd()) else runs
    if WORKDIR.is_relative_to(runs) or ":" in str(runs):
        raise UserError(
            f"run.dir = {cfg.run.dir}: the volume of the runs is mounted at {runs} in the pods, which would hide the"
            " program or is no place for one; give another, e.g. --run.dir /runs"
        )
    return runs


def in_image(job: Job, runs: Path) -> list[Path]:
    """Files and folders of the image that the configuration names. Raises UserError for one that cannot be there."""
    cfg, found = job.cfg, []
    paths = [("model.path", cfg.model.path), ("model.value_path", cfg.model.value_path)]
    paths += [(cfg.data.key, source) for source in cfg.data.sources]
    paths += [("data.eval_path", cfg.data.eval_path), ("data.ptx_path", cfg.data.ptx_path)]
    paths += [("rollout.python", cfg.rollout.python)]
    functions = [(f"rewards.{name}.fn", spec.fn) for name, spec in cfg.rewards.items()]
    functions += [("data.augment", cfg.data.augment), ("rollout.environment", cfg.rollout.environment)]
    paths += [(key, str(RewardName.parse(fn).file or "")) for key, fn in functions if fn]
    paths += [("--accelerate", job.accelerate)]
    written = "\n".join([_text(job.config) or "", *job.words])
    for key, text in paths:
        path = Path(text or "")
        if not path.is_absolute() or path.is_relative_to(runs):
            continue
        if not path.is_relative_to(Path.cwd()):
            raise UserError(
                f"{key} = {text}: the pods have what is in the current folder ({WORKDIR} in the image) and under"
                f" run.dir ({runs}, on the volume); put it there"
            )
        if text in written and key != "--accelerate" and Path.cwd() != WORKDIR:
            raise UserError(f"{key} = {text}: is {_inside(path)} in the image; write it relative to the current folder")
        found.append(_inside(path))
    return list(dict.fromkeys(found))


def bytes_of(quantity: str) -> int:
    """`32Gi` -> bytes. Raises UserError for what is none."""
    found = re.fullmatch(r"([1-9]\d*)(\D*)", quantity, re.ASCII)
    if found is None or found[2] not in UNITS:
        raise UserError(f"--memory {quantity}: wants a quantity of Kubernetes, such as 64Gi")
    return int(found[1]) * UNITS[found[2]]


def _inside(path: Path) -> Path:
    """Where a file of the current folder is in the image."""
    path = Path(os.path.normpath(path))
    if not path.is_relative_to(Path.cwd()):
        raise UserError(
            f"{path}: is not in the current folder, which stands for {WORKDIR} in the image; go to the folder that the"
            " image was made from"
        )
    if ":" in str(path):
        raise UserError(f"{path}: Kubernetes mounts nothing at a path with a colon; give it another name")
    return WORKDIR / path.relative_to(Path.cwd())


def _text(config: Path | None) -> str | None:
    if config is None:
        return None
    text = config.read_text(encoding="utf-8").rstrip() + "\n"
    if len(text.encode()) > CONFIG_MAX - 2**12:
        raise UserError(f"--config {config}: a ConfigMap holds 1 MiB; put what is long into files of the image")
    return text


def _refuse_unwritable(word: str) -> None:
    try:
        word.encode()
    except UnicodeEncodeError:
        raise UserError(f"{word!r}: is no UTF-8, which all text in Kubernetes is") from None


def _check(given: Kubernetes) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*", given.image):
        raise UserError(f"--image {given.image!r}: wants the name of an image, e.g. registry.example/tokenppo:cuda")
    for option, value, kind in (
        ("--namespace", given.namespace, "namespace"),
        ("--volume-claim", given.volume_claim, "PersistentVolumeClaim"),
        ("--secret", given.secret, "Secret"),
    ):
        pattern = LABEL if kind == "namespace" else rf"{LABEL}(\.{LABEL})*"
        if value is not None and not (re.fullmatch(pattern, value) and len(value) <= 253):
            raise UserError(f"{option} {value!r}: wants the name of a {kind}: a-z, 0-9 and -, as Kubernetes takes them")
    if given.save_before < 1:
        raise UserError(f"--save-before {given.save_before}: wants seconds, at least 1")
    bytes_of(given.memory)


def submit(text: str) -> str:
    """Hand it to the cluster; gives what kubectl says. Raises UserError where there is no kubectl or it refuses,
    ProcessFault where it does not answer."""
    try:
        done = subprocess.run(
            ["kubectl", "apply", "--filename", "-"], input=text.encode(), capture_output=True, timeout=APPLY_S
        )
    except FileNotFoundError:
        raise UserError("submit k8s: there is no kubectl on PATH; install it, or give --dry-run") from None
    except subprocess.TimeoutExpired:
        raise ProcessFault(
            f"submit k8s: kubectl did not answer within {APPLY_S} s; does the cluster (kubectl cluster-info)?"
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise UserError(f"submit k8s: kubectl refuses: {said or done.returncode}")
    return done.stdout.decode(errors="replace").strip()
