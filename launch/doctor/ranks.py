"""Two processes of this machine that really add up a tensor: over gloo, and over NCCL where there are two GPUs."""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from launch.cluster import die_with_parent
from launch.doctor import devices
from launch.doctor.finding import Finding, Situation, fail, ok, warn

RANK = Path(__file__).with_name("rank.py")
DEADLINE_S = 60.0  # of both: most of it is the import of torch
SLOW_MIB_S = {"gloo": 20.0, "nccl": 200.0}
REMEDY = {
    "gloo": "GLOO_SOCKET_IFNAME=lo, or the interface to use; a sandbox or firewall may forbid connections",
    "nccl": "NCCL_DEBUG=INFO says more; NCCL_P2P_DISABLE=1 or NCCL_SHM_DISABLE=1 shows which way is broken",
}


@dataclass(frozen=True, kw_only=True)
class Sum:
    """What came of it."""

    backend: str
    mib_s: float = 0.0
    right: bool = False
    error: str | None = None
    late: bool = False  # no answer at all


def judge_sums(sums: list[Sum], gpus: int, busy: bool) -> list[Finding]:
    """`busy`: this machine has more to do than it can."""
    found = []
    for s in sums:
        if s.late and busy:
            said = f"{s.backend}: two processes did not meet within {DEADLINE_S:.0f} s, on a busy machine"
            found.append(warn(said, "ask again when it has less to do (uptime)"))
        elif s.late:
            found.append(fail(f"{s.backend}: two processes did not meet within {DEADLINE_S:.0f} s", REMEDY[s.backend]))
        elif s.error is not None:
            found.append(fail(f"{s.backend}: {s.error}", REMEDY[s.backend]))
        elif not s.right:
            found.append(
                fail(f"{s.backend}: 1 + 2 is not 3 between two processes", "report it: training would be wrong")
            )
        elif s.mib_s < SLOW_MIB_S[s.backend]:
            found.append(
                warn(f"{s.backend} adds up {s.mib_s:,.0f} MiB/s between two processes: slow", REMEDY[s.backend])
            )
    said = ", ".join(f"{s.backend} {s.mib_s:,.0f} MiB/s" for s in sums)
    return found or [ok(f"two processes add up: {said}" + ("; NCCL wants two GPUs" if gpus == 1 else ""))]


def look_at_ranks(situation: Situation) -> list[Finding]:
    gpus = len(devices.driver().gpus) if situation.cfg.resources.device != "cpu" else 0
    return judge_sums([add_up(backend) for backend in ("gloo", "nccl")[: 1 + (gpus > 1)]], gpus, devices.busy())


def add_up(backend: str, deadline_s: float = DEADLINE_S) -> Sum:
    """Start both, wait for both. Neither outlives this call."""
    guard = functools.partial(die_with_parent, os.getpid())
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # of a launcher above us
        environment.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="tokenppo-") as folder:
        command = [sys.executable, "-P", str(RANK)]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), backend, folder],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=guard,
            )
            for rank in range(2)
        ]
        until = time.monotonic() + deadline_s
        try:
            said = [rank.communicate(timeout=max(0.1, until - time.monotonic())) for rank in ranks]
        except subprocess.TimeoutExpired:
            return Sum(backend=backend, late=True)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait(10)
    for rank, (_, err) in zip(ranks, said, strict=True):
        if rank.returncode:
            lines = [line for line in err.splitlines() if line.strip()]
            return Sum(backend=backend, error=lines[-1][:300] if lines else f"a process ended with {rank.returncode}")
    results = [json.loads(out) for out, _ in said]
    return Sum(backend=backend, right=all(r["right"] for r in results), mib_s=min(r["mib_s"] for r in results))
