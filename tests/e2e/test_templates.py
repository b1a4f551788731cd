"""The submission templates do what they say: a Ray job on a real cluster, a SLURM script under a checking `srun`."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import tiny_models

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "launch" / "templates"
BIN = Path(sys.executable).parent
SBATCH_OPTIONS = {  # of `man sbatch`, with what a value of ours must look like
    "job-name": r"[a-z]+",
    "nodes": "1",
    "ntasks": "1",
    "gpus": r"\d+",
    "cpus-per-task": r"\d+",
    "time": r"\d+:\d\d:\d\d",
    "signal": r"TERM@\d+",
    "requeue": "",
    "open-mode": "append",
    "output": r".*%j.*",
}
SRUN = r"""#!/usr/bin/env bash
# In place of srun: notes its options, refuses what it does not know, and becomes the command behind them.
set -eu
while [[ "${1:-}" == --* ]]; do
    [[ "$1" =~ ^--(ntasks|cpus-per-task|kill-on-bad-exit)=[0-9]+$ ]] || { echo "srun: $1?" >&2; exit 64; }
    echo "$1" >> "$SRUN_LOG"
    shift
done
echo "$*" >> "$SRUN_LOG"
exec "$@"
"""


@pytest.mark.parametrize("name", ["slurm.sh", "ray_job.sh"])
def test_a_template_is_a_script_and_holds_no_secret(name):
    subprocess.run(["bash", "-n", str(TEMPLATES / name)], check=True, timeout=30)
    text = (TEMPLATES / name).read_text()
    code = [line for line in text.splitlines() if not line.startswith("#")]
    assert not re.search(r"sleep|(TOKEN|KEY|SECRET|PASSWORD)\b", "\n".join(code))
    assert "set -euo pipefail" in code and os.access(TEMPLATES / name, os.X_OK)


def test_what_the_slurm_script_asks_for():
    lines = (TEMPLATES / "slurm.sh").read_text().splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    options = dict(re.fullmatch(r"--([a-z-]+)(?:=(\S+))?", line).groups("") for line in asked)
    assert options.keys() == SBATCH_OPTIONS.keys()
    for name, value in options.items():
        assert re.fullmatch(SBATCH_OPTIONS[name], value), f"--{name}={value}"
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    last_request = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert last_request < first_command, "sbatch reads no request behind the first command"


def slurm(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    job = submitted(tmp_path, *options, **environment)
    out, err = job.communicate(timeout=120)
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


def submitted(tmp_path: Path, *options: str, **environment: str) -> subprocess.Popen:
    """The script as SLURM runs it: a copy elsewhere, in the folder of the submission, with SLURM's variables."""
    script, srun = tmp_path / "spool" / "slurm_script", tmp_path / "bin" / "srun"
    for file, text in ((script, (TEMPLATES / "slurm.sh").read_text()), (srun, SRUN)):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    seen = os.environ | {"PATH": f"{srun.parent}:{os.environ['PATH']}", "SRUN_LOG": str(tmp_path / "srun.log")}
    seen |= {"SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "2", "OMP_NUM_THREADS": "1", "VENV": str(BIN.parent)}
    seen |= {"ACCELERATE_CONFIG": "launch/accelerate/cpu.yaml", "PYTHONPATH": str(ROOT)} | environment
    command = ["bash", str(script), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=seen, start_new_session=True, **pipes)


@pytest.mark.slow
def test_a_run_closes_its_files_when_slurm_ends_it(task, tmp_path):
    """TERM to every process of the job at once, as --signal=TERM@120 and a preemption send it."""
    folder = tmp_path / "runs" / "slurm-77"
    options = ("--run.dir", str(folder.parent), "--run.steps", "100000")
    job = submitted(tmp_path, *options, CONFIG=str(task / "config.yaml"))
    deadline = time.monotonic() + 120
    # A step is one of the summary a moment after its row is written: the second row says that the first one is.
    while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").read_text().count("\n") < 2:
        assert job.poll() is None and time.monotonic() < deadline, job.communicate(timeout=60)
    family = psutil.Process(job.pid).children(recursive=True)
    for process in [psutil.Process(job.pid), *family]:
        process.terminate()
    out, err = job.communicate(timeout=60)
    # Ray may end the learner before all else has ended, of which the last line would tell.
    assert "tokenppo: SIGTERM: ending what was started" in err, err
    summary = json.loads((folder / "summary.json").read_text())
    # Which end it hears of first is not ours to say: its own (143), or that of a worker in the middle of a call (1).
    assert summary["error"] in ("SystemExit: 143", "SystemExit: 1") and summary["steps"] >= 1, summary
    assert not psutil.wait_procs(family, timeout=20)[1]


def test_the_slurm_script_starts_the_trainer(tmp_path):
    done = slurm(tmp_path, "--dry-run", "--run.dir", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/runs/slurm-77" in done.stdout and "1 learner" in done.stdout
    *options, command = (tmp_path / "srun.log").read_text().splitlines()
    assert options == ["--ntasks=1", "--cpus-per-task=2", "--kill-on-bad-exit=1"]
    assert "--num_processes 1 --num_cpu_threads_per_process 2 -m launch.train" in command
    assert not (tmp_path / "runs").exists()


def test_ranks_and_names_of_the_slurm_script_come_from_the_environment(tmp_path):
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    accelerate = tmp_path / "venv" / "bin" / "accelerate"
    accelerate.write_text('#!/bin/sh\necho "$@"\n')
    accelerate.chmod(0o755)
    done = slurm(
        tmp_path, VENV=str(accelerate.parents[1]), SLURM_GPUS_ON_NODE="4", SLURM_CPUS_PER_TASK="32", RUN_NAME="a"
    )
    assert done.returncode == 0, done.stderr
    assert "--num_processes 4 --num_cpu_threads_per_process 8" in done.stdout and "--run.name a" in done.stdout
    assert "--num_processes 2" in slurm(tmp_path, VENV=str(accelerate.parents[1]), LEARNERS="2").stdout


@pytest.mark.parametrize("name", ["CONFIG", "ACCELERATE_CONFIG", "VENV"])
def test_the_slurm_script_names_what_is_not_there(tmp_path, name):
    done = slurm(tmp_path, **{name: "absent"})
    assert done.returncode == 2 and "there is no absent" in done.stderr and done.stderr.count("\n") == 1


def test_the_ray_script_asks_for_what_it_needs():
    for name, given in (("RAY_ADDRESS", {"RUN_DIR": "x"}), ("RUN_DIR", {"RAY_ADDRESS": "x"})):
        seen = {"PATH": os.environ["PATH"]} | given
        command = ["bash", str(TEMPLATES / "ray_job.sh")]
        done = subprocess.run(command, env=seen, capture_output=True, text=True, timeout=30)
        assert done.returncode != 0 and f"{name}: is " in done.stderr


def free_ports(n: int) -> list[int]:
    held = [socket.socket() for _ in range(n)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


class Head:
    """A Ray head of the test's own, with dashboard and token, that knows nothing of any other on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        port, dashboard, agent, client = free_ports(4)
        self.address, self.dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        token = folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environ = kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "OMP_NUM_THREADS": "1"}
        self.environ |= {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=100000000"]
        command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder / 't'}"]
        command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
        command += ["--disable-usage-stats"]
        with open(folder / "head.out", "wb") as out:
            self.process = subprocess.Popen(command, env=self.environ, stdout=out, stderr=subprocess.STDOUT)

    def wait_ready(self, timeout_s: float = 120) -> None:
        """Until the job server answers with the token."""
        deadline = time.monotonic() + timeout_s
        command = [str(BIN / "ray"), "job", "list", "--address", self.dashboard]
        while subprocess.run(command, env=self.environ, capture_output=True, timeout=60).returncode:
            words = (self.folder / "head.out").read_text()
            assert self.process.poll() is None and time.monotonic() < deadline, words

    def end(self) -> None:
        """Only what this head started: its descendants, by process id."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            process.kill()
        self.process.wait(30)


@pytest.fixture
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="tp"))  # short: Ray's sockets lie in it, and a socket's path has 107 bytes
    started = Head(folder)
    try:
        started.wait_ready()
        yield started
    finally:
        started.end()
        shutil.rmtree(folder)


@pytest.fixture
def task(tmp_path) -> Path:
    folder = tmp_path / "task"
    tiny_models.save_model(folder / "model", "gpt2")
    (folder / "rewards.py").write_text(
        "def brief(completion_ids, **_):\n    return [-0.1 * len(x) for x in completion_ids]"
    )
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"the {w} sat"}) + "\n" for w in ("cat", "dog"))
    )
    (folder / "config.yaml").write_text(
        """
model: {path: model, dtype: float32}
data: {path: prompts.jsonl}
rollout: {workers: 1, batch_size: 4, chunk_size: 4, max_new_tokens: 6}
rewards: {brief: {fn: rewards.py:brief}}
ppo: {mini_batch_size: 4, micro_batch_size: 4}
run: {steps: 1}
log: {trackers: []}
"""
    )
    return folder


@pytest.mark.slow
def test_a_ray_job_trains_on_a_cluster_that_was_there(head, task, tmp_path):
    """Also what the same cluster says to a run with another token, and an address where nobody listens."""
    seen = head.environ | {"RAY_ADDRESS": head.dashboard, "RUN_DIR": str(tmp_path / "runs"), "CONFIG": "config.yaml"}
    command = ["bash", str(TEMPLATES / "ray_job.sh"), "--run.name", "job"]
    done = subprocess.run(command, cwd=task, env=seen, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 1/1" in done.stdout and "succeeded" in done.stdout + done.stderr
    folder = tmp_path / "runs" / "job"
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1]
    assert json.loads((folder / "summary.json").read_text())["exit"] == 0 and (folder / "final").is_dir()
    assert head.process.poll() is None, "a run ends its own processes, not the cluster that it joined"

    def joined(address: str, **environment: str) -> subprocess.CompletedProcess:
        words = [str(BIN / "tokenppo"), "train", "--config", "config.yaml", "--resources.ray_address", address]
        words += ["--run.dir", str(tmp_path / "other")]
        environ = head.environ | environment | {"RAY_DEDUP_LOGS": "1"}
        return subprocess.run(words, cwd=task, env=environ, capture_output=True, text=True, timeout=120)

    wrong = joined(head.address, RAY_AUTH_TOKEN="0" * 64)
    assert wrong.returncode == 3 and "RAY_AUTH_TOKEN_PATH, the token of that cluster?" in wrong.stderr, wrong.stderr
    (port,) = free_ports(1)
    nobody = joined(f"127.0.0.1:{port}")
    assert nobody.returncode == 3 and "no answer (Connection refused)" in nobody.stderr, nobody.stderr
    assert nobody.stderr.count("\n") == 1
