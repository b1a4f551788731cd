"""GPUs, memory, and what the system lets one user have."""

import functools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from launch.cluster import cores
from launch.doctor.finding import Finding, Situation, fail, ok, warn

MIB, GIB = 2**20, 2**30
ASK_S = 15.0  # nvidia-smi, which a driver in trouble keeps waiting
QUERY = "index,name,memory.total,memory.used,mig.mode.current,driver_version"
# The demo's processes took 2.1 GiB together at their peak (docs/benchmarks.md).
LEAST_MEMORY, GOOD_MEMORY = 1.5 * GIB, 4 * GIB
LEAST_FILES, GOOD_FILES = 512, 4096  # Ray itself warns below 4096
LEAST_TASKS, GOOD_TASKS = 500, 4000  # threads: a run of two workers has about a thousand
LOOK = (
    "import json, torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0;"
    "print(json.dumps([n, torch.version.cuda]))"
)


BUSY = 2.0  # processes that want a core, for each core: then a late answer says nothing


def busy() -> bool:
    return os.getloadavg()[0] / cores() > BUSY


@dataclass(frozen=True)
class Gpu:
    name: str
    total: float  # bytes
    used: float
    mig: bool


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi says. `error`: why it says nothing though it is there."""

    gpus: tuple[Gpu, ...] = ()
    version: str | None = None
    cuda: str | None = None
    error: str | None = None


@functools.cache  # two checks ask, and a driver in trouble makes each wait
def driver() -> Driver:
    if shutil.which("nvidia-smi") is None:
        return Driver()
    try:
        banner = _said("nvidia-smi")
        rows = _said("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits")
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stdout", None) or getattr(error, "stderr", None) or str(error)).strip()
        return Driver(error=(said.splitlines() or [type(error).__name__])[0])
    return parse_driver(banner, rows)


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=True).stdout


def parse_driver(banner: str, rows: str) -> Driver:
    """Of what nvidia-smi prints by itself, and of its rows of QUERY."""
    cuda = re.search(r"CUDA Version:\s*([\d.]+)", banner)
    gpus, version = [], None
    for row in filter(None, map(str.strip, rows.splitlines())):
        _, name, total, used, mig, version = (cell.strip() for cell in row.split(","))
        # A GPU that is cut up, or shares the host's memory, has no number here.
        sizes = [float(x) * MIB if x.replace(".", "").isdigit() else 0.0 for x in (total, used)]
        gpus.append(Gpu(name, *sizes, mig == "Enabled"))
    return Driver(tuple(gpus), version, cuda[1] if cuda else None)


def judge_gpus(found: Driver, seen_by_torch: int | None, visible: str | None, wanted: bool) -> list[Finding]:
    """`seen_by_torch`: GPUs, None where torch did not answer. `visible`: CUDA_VISIBLE_DEVICES. `wanted`: the run says
    resources.device: cuda."""
    if found.error is not None:
        return [fail(f"nvidia-smi fails: {found.error}", "mend the driver: look at dmesg, load its module or restart")]
    if not found.gpus:
        if wanted:
            return [fail("none, and resources.device is cuda", "another machine, or --resources.device auto")]
        return [ok("none: models run on the CPU")]
    kinds = ", ".join(sorted({gpu.name for gpu in found.gpus}))
    said = f"{len(found.gpus)} x {kinds}, driver {found.version} (CUDA {found.cuda})"
    if seen_by_torch is None:
        return [
            fail(f"{said}; torch does not answer when asked for them", "python -c 'import torch; torch.cuda.init()'")
        ]
    expected = (
        len(found.gpus) if visible is None else len([x for x in visible.split(",") if x.strip() not in ("", "-1")])
    )
    if seen_by_torch == 0 and expected:
        found_bad = fail if wanted else warn
        return [found_bad(f"{said}; torch sees none of them", "a torch that is built for this driver's CUDA")]
    problems = []
    if any(gpu.mig for gpu in found.gpus):
        cut = sum(gpu.mig for gpu in found.gpus)
        problems.append(
            warn(
                f"{said}; {cut} in MIG mode, of which a process sees one slice",
                "one learner and its workers for each slice, by CUDA_VISIBLE_DEVICES; NCCL joins no slices",
            )
        )
    if 0 < seen_by_torch < expected:
        problems.append(warn(f"{said}; torch sees {seen_by_torch} of {expected}", "look at dmesg for the others"))
    for i, gpu in enumerate(found.gpus):
        if gpu.total and gpu.used > gpu.total / 10:
            used = f"GPU {i}: {gpu.used / GIB:.1f} of {gpu.total / GIB:.0f} GiB are taken by others"
            problems.append(warn(used, "nvidia-smi names them; wait, or leave it out by CUDA_VISIBLE_DEVICES"))
    memory = f"{min(gpu.total for gpu in found.gpus) / GIB:.0f} GiB each"
    return problems or [ok(f"{said}, {memory}; torch sees {seen_by_torch}")]


def look_at_gpus(situation: Situation) -> list[Finding]:
    found, seen = driver(), 0
    if found.gpus:
        try:
            seen = json.loads(_said(sys.executable, "-c", LOOK))[0]
        except (OSError, ValueError, subprocess.SubprocessError):
            seen = None
    wanted = situation.cfg.resources.device == "cuda"
    return judge_gpus(found, seen, os.environ.get("CUDA_VISIBLE_DEVICES"), wanted)


def cgroup_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[float, float] | None:
    """(Limit, used) of the container or job that this process is in, in bytes; None where there is no limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            words = [(root / name).read_text().strip() for name in (limit, used)]
        except OSError:
            continue
        if words[0].isdigit() and int(words[0]) < 2**60:  # version 1 says "none" by a very large number
            return float(words[0]), float(words[1])
    return None


def memory_here() -> tuple[float, float]:
    """(Total, available) bytes, of the machine or of the container."""
    memory = psutil.virtual_memory()
    total, available = float(memory.total), float(memory.available)
    limited = cgroup_memory()
    if limited is not None:
        total, available = min(total, limited[0]), min(available, limited[0] - limited[1])
    return total, available


def judge_memory(total: float, available: float) -> list[Finding]:
    said = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    if available < LEAST_MEMORY:
        return [fail(f"{said}; the smallest run takes 2", "end what takes it (ps aux --sort -rss), or another machine")]
    if available < GOOD_MEMORY:
        return [warn(f"{said}; the demo takes 2, others more", "end what takes it (ps aux --sort -rss)")]
    return [ok(f"{said}, {cores()} cores")]


def look_at_memory(situation: Situation) -> list[Finding]:
    return judge_memory(*memory_here())


def judge_limits(files: tuple[int, int], tasks: int | None) -> list[Finding]:
    """`files`: soft and hard limit of open files. `tasks`: threads that may yet be started; None without a limit."""
    soft, hard = files
    raised = f"ulimit -n {hard if hard > soft else 65536}" + ("" if hard > soft else " (as root, or in limits.conf)")
    found = []
    if soft < LEAST_FILES:
        found.append(fail(f"{soft} open files are allowed, and Ray needs more", raised))
    elif soft < GOOD_FILES:
        found.append(warn(f"{soft} open files are allowed: few for many workers", raised))
    more = "ulimit -u, or the pids limit of the container (docker run --pids-limit)"
    if tasks is not None and tasks < LEAST_TASKS:
        found.append(fail(f"only {tasks} more threads may be started, and Ray needs hundreds", more))
    elif tasks is not None and tasks < GOOD_TASKS:
        found.append(warn(f"only {tasks} more threads may be started: few for many workers", more))
    return found or [ok(f"{soft} open files, {'any number of' if tasks is None else tasks} more threads")]


def look_at_limits(situation: Situation) -> list[Finding]:
    files = tuple(10**6 if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    return judge_limits(files, _tasks_left())


def _tasks_left(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """By the pids limit of the container, and by this user's own; root has none."""
    left: list[int] = []
    try:
        most, now = ((root / name).read_text().strip() for name in ("pids.max", "pids.current"))
        if most.isdigit():
            left.append(int(most) - int(now))
    except OSError:
        pass  # no such group here: no such limit
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if limit != resource.RLIM_INFINITY and os.geteuid() != 0:
        mine = 0
        for process in psutil.process_iter(["uids", "num_threads"]):
            uids = process.info["uids"]
            mine += (process.info["num_threads"] or 0) if uids is not None and uids.real == os.getuid() else 0
        left.append(limit - mine)
    return max(0, min(left)) if left else None
