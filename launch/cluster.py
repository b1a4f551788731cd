"""Ray for one run: started here and ended here, or joined by address."""

import ctypes
import logging
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from core.faults import TERMINATED, ProcessFault, UserError
from core.schema import Config
from launch import ray_auth

EXIT_CODE_FOLDER = "TOKENPPO_EXIT_CODES"  # set by `tokenppo train`: accelerate launch turns every failure into a 1
HUB, HUB_S = "https://huggingface.co", 3
LAST_WORDS_S = 30.0
# Workers of a cluster that was there before have the environment of that cluster, not ours.
FOR_WORKERS = ("OMP_WAIT_POLICY", "CUBLAS_WORKSPACE_CONFIG", "TQDM_DISABLE")


def cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPU cores that this process may use: those it may run on, or what its container may have of them.

    A quota (docker run --cpus, the limit of a pod) leaves all cores in sight: threads for each of them would slow each
    other manyfold.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return there if quota is None else max(1, min(there, math.ceil(quota)))


def _quota(cgroup: Path) -> float | None:
    """Cores' worth of time by the second and the first version of cgroups; None where there is no limit."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in files).split()
        except (OSError, ValueError):
            continue
        return int(quota) / int(period) if quota not in ("max", "-1") else None
    return None


def device(cfg: Config) -> str:
    """`cpu` or `cuda`. Raises UserError where cuda is asked for and there is none, or a key does nothing on a CPU."""
    import torch

    if cfg.resources.device == "cuda" and not torch.cuda.is_available():
        raise UserError("resources.device = cuda: torch sees no CUDA device; use cpu or auto")
    if cfg.resources.reward_gpus and cfg.resources.ray_address is None and not torch.cuda.is_available():
        raise UserError(f"resources.reward_gpus = {cfg.resources.reward_gpus:g}: torch sees no CUDA device; give 0")
    if cfg.resources.device != "cpu" and torch.cuda.is_available():
        return "cuda"
    refuse_what_gpus_need(cfg)
    return "cpu"


def refuse_what_gpus_need(cfg: Config) -> None:
    """Raise UserError for what does nothing on a CPU."""
    for leaf in ("gpu_memory", "sleep"):
        if value := getattr(cfg.rollout, leaf):
            raise UserError(
                f"rollout.{leaf} = {str(value).lower()}: does nothing on a CPU, where vLLM has no GPU to share or to"
                " leave; leave it out"
            )
    if cfg.rollout.gpus_per_worker is not None:
        raise UserError(
            f"rollout.gpus_per_worker = {cfg.rollout.gpus_per_worker:g}: does nothing on a CPU, where workers have no"
            " GPU; leave it out"
        )
    if cfg.rollout.placement == "apart" and cfg.resources.ray_address is None:
        raise UserError(
            "rollout.placement = apart: does nothing on a CPU of one machine, where no GPU is shared; leave it out, or"
            " name a cluster (resources.ray_address)"
        )


def refuse_transport(cfg: Config, device: str, learners: int) -> None:
    """Raise UserError where weights cannot travel as `sync.transport` says."""
    if cfg.sync.transport != "object_store" and cfg.rollout.engine == "vllm" and device != "cpu":
        raise UserError(
            f"sync.transport = {cfg.sync.transport}: weights of vLLM arrive in host memory (docs/rollout.md), which"
            " neither NCCL nor CUDA IPC reaches; use object_store"
        )
    shares = cfg.rollout.placement == "colocated" or (cfg.rollout.gpus_per_worker or 1) < 1
    if cfg.sync.transport == "collective" and device != "cpu" and shares:
        raise UserError(
            "sync.transport = collective: NCCL wants a GPU for each learner and worker, and they share some; set"
            " rollout.placement: apart and rollout.gpus_per_worker: 1, or use object_store"
        )
    if cfg.sync.transport == "cuda_ipc" and device == "cpu":
        raise UserError("sync.transport = cuda_ipc: there is no GPU to share here; use object_store or collective")
    if cfg.sync.transport == "cuda_ipc" and learners > 1:
        raise UserError(
            f"sync.transport = cuda_ipc: {learners} learner processes were asked for, and memory of one GPU reaches the"
            " workers on it alone; use object_store"
        )


def launched() -> tuple[int, int]:
    """(rank, number) of the learner processes, as the launcher wrote them into the environment."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def outlast_rank_0() -> None:
    """Wait, at most LAST_WORDS_S, until rank 0 of this job has ended, where it is on this machine.

    A launcher ends all ranks as soon as one has failed, and rank 0 has a summary to write and to say what happened.
    While Ray shuts down there, SIGTERM kills it at once: Ray's C++ side puts the default action back.
    """
    import psutil

    for sibling in psutil.Process(os.getppid()).children():
        with suppress(psutil.Error):
            if sibling.environ().get("RANK") == "0":
                psutil.wait_procs([sibling], timeout=LAST_WORDS_S)


def thread_plan(cfg: Config, learners_here: int | None = None) -> tuple[int, int]:
    """CPU threads of (each learner process, each rollout worker).

    Learners and workers work in turn, so both share all cores, or at the same time (rollout.max_staleness): then each
    side has half of them. More threads than cores would slow each other more than tenfold.
    """
    if cfg.run.deterministic:
        return 1, 1
    learners_here = learners_here or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    of_side = cores() // 2 if cfg.rollout.max_staleness else cores()
    learner = cfg.resources.learner_threads or max(1, of_side // learners_here)
    return learner, cfg.resources.worker_threads or max(1, of_side // cfg.rollout.workers)


def prepare_environment() -> None:
    """Environment of this process and its children; to be called before torch and ray are imported, which read it then.

    Idle OpenMP threads must sleep: spinning ones steal the cores of the other processes.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    tools = str(Path(sys.executable).parent)  # with the ninja of this environment DeepSpeed compiles what it offloads
    if tools not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, [tools, os.environ.get("PATH")]))
    if shutil.which("nvidia-smi") is None:  # else deepspeed, once imported, says at length that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what run.deterministic needs on a GPU
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries, from every process at once, over our own panel
    # Ray starts its workers 15 steps below the rest of this machine: beside anything busy, a learner among it, they get
    # a thirtieth of a core and miss every deadline. They are the job here, not its background.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray gives back memory that nobody refers to any more once a second. Until then what is put goes into pages that
    # were never touched, which takes five times as long as into those of a version of the weights that is over.
    os.environ.setdefault("RAY_free_objects_period_milliseconds", "20")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # ours have an environment of their own and use none
    if "ray" not in sys.modules:  # half a change of mode, after the import, locks Ray out of its own cluster
        os.environ.setdefault(ray_auth.MODE, "token")


def prepare_hub(cfg: Config) -> None:
    """Where the hub is out of reach, tell its client so, before it is imported: it then goes by its cache at once.

    Left alone it tries each file six times over 23 s; no setting of its own bounds that.
    """
    named = [cfg.model.path, *cfg.data.sources, cfg.data.eval_path]
    if all(name is None or Path(name).is_absolute() for name in named) or "HF_HUB_OFFLINE" in os.environ:
        return
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return  # the proxy reaches what this process may not
    url = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or HUB)
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=HUB_S).close()
    except (OSError, ValueError):
        os.environ["HF_HUB_OFFLINE"] = "1"
        if launched()[0] == 0:  # what lies in the cache may be older than what the hub has
            print(f"{url.hostname} does not answer: models and datasets come from its local cache", file=sys.stderr)


@contextmanager
def ray_session(cfg: Config, address: str | None = None, *, log_to_driver: bool = True) -> Iterator[str]:
    """Ray up to the end of the block; gives its address. Everything started inside dies with it, also if this process
    is killed. `address`: of the Ray that another learner process of this run started or joined. `log_to_driver`: show
    what actors print."""
    import ray
    import torch
    from ray.exceptions import AuthenticationError

    joins = cfg.resources.ray_address
    if joins:
        refuse_unreachable(cfg)
    ray_auth.refuse_unset(cfg)
    ray_auth.private_token(make=joins in (None, "local"))  # a cluster has one, which a new one would not match
    # Actors import our packages from where this process has them. Ray will put the folder that the user stands in at
    # the front of their sys.path, whatever is in it: the hook runs before that.
    house = str(Path(__file__).resolve().parent.parent)
    runtime_env = {
        "env_vars": {name: os.environ[name] for name in FOR_WORKERS if name in os.environ}
        # Ray must show each worker its own GPUs, whatever the image of this machine is made for.
        | {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "0"}
        | {"PYTHONPATH": os.pathsep.join([house, *filter(None, [os.environ.get("PYTHONPATH")])])},
        "worker_process_setup_hook": "tokenppo.claim_packages",
    }
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        address = address or cfg.resources.ray_address
        if address:
            ray.init(
                address=address,
                logging_level=logging.WARNING,
                runtime_env=runtime_env,
                log_to_driver=log_to_driver,
            )
        else:
            ray.init(
                address="local",
                num_cpus=cores(),
                num_gpus=torch.cuda.device_count(),  # that we can use; Ray would count what the driver lists
                object_store_memory=cfg.resources.object_store_mb * 2**20,
                include_dashboard=False,
                logging_level=logging.WARNING,
                runtime_env=runtime_env,
                log_to_driver=log_to_driver,
            )
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"resources.ray_address = {address}" if cfg.resources.ray_address else address or "this machine"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = "; is RAY_AUTH_TOKEN, or the file RAY_AUTH_TOKEN_PATH, the token of that cluster?"
        remedy = remedy if cfg.resources.ray_address else ""
        raise ProcessFault(f"Ray did not start on {where}: {reason}{remedy}") from None
    if callable(on_term) and threading.current_thread() is threading.main_thread():
        # Ray put handlers of its own in front of ours, one of which ends this process with nothing written.
        signal.signal(signal.SIGTERM, on_term)
    try:
        gcs_address = ray.get_runtime_context().gcs_address
        if joins and launched()[0] == 0:
            ray_auth.refuse_open(cfg, gcs_address)  # `auto` is known only now; nothing of the run is there yet
        yield gcs_address
    finally:
        heard = signal.getsignal(signal.SIGTERM)
        ray.shutdown()
        if heard is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, heard)  # Ray's C++ side has put the default action there


def refuse_unreachable(cfg: Config) -> None:
    """Raise ProcessFault where nobody listens, in seconds (Ray would try for minutes); UserError for no address, and
    for a cluster that anybody may use."""
    address = cfg.resources.ray_address or "auto"
    if address in ("auto", "local") or "://" in address:
        return
    refuse_unanswered(address)
    ray_auth.refuse_open(cfg, address)


def refuse_unanswered(address: str) -> None:
    """As `refuse_unreachable`, of host:port, without a look at who may use it."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(
            f"resources.ray_address = {address}: is no address; write host:port (ray start --head names it), or auto"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise ProcessFault(
            f"resources.ray_address = {address}: no answer ({error.strerror or error}); start a cluster there"
            " (ray start --head), or leave the key out and the run has a Ray of its own"
        ) from None


def wait_for_nodes(cfg: Config) -> None:
    """Return once `resources.nodes` are in the Ray that this process is in. Raises ProcessFault after the deadline."""
    import ray

    wanted, deadline = cfg.resources.nodes, time.monotonic() + cfg.resources.join_timeout_s
    while (there := sum(node["Alive"] for node in ray.nodes())) < wanted:
        if time.monotonic() > deadline:
            raise ProcessFault(
                f"resources.nodes = {wanted}: {there} joined the cluster within {cfg.resources.join_timeout_s:g} s"
                " (resources.join_timeout_s); see what Ray says on the others, or ask for fewer"
            )
        time.sleep(0.2)


def adopt_orphans() -> None:
    """Ask Linux to make every descendant whose parent dies a child of this process, where it can be found and ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


@contextmanager
def orphans_adopted() -> Iterator[None]:
    """`adopt_orphans` for the length of the block: who does not wait for what it adopts collects zombies."""
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), ctypes.c_int()
    libc.prctl(37, ctypes.byref(before))  # PR_GET_CHILD_SUBREAPER
    adopt_orphans()
    try:
        yield
    finally:
        libc.prctl(36, before.value)


def die_with_parent(parent: int) -> None:
    """Ask Linux for SIGTERM when the parent of this process dies, so that a killed command leaves no orphans.

    `parent` is its process id; if it is dead already, this process ends here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(TERMINATED)
