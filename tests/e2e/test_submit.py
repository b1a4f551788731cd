"""Jobs that are sent: to a real Ray cluster with tokens; and shell that does what it says, whatever is in it."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import tiny_models
from cards_run import ROOT
from launch.submit.node import free_ports

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
CARDS = str(ROOT / "configs" / "cards.yaml")
SHELL = [
    *(ROOT / "launch").glob("*.sh"),
    ROOT / ".ci" / "run",
    *(ROOT / "tests" / "rendered").glob("*.sh"),
    *(ROOT / "docker").glob("*.sh"),
]
HOSTILE = [
    *("$(touch pwned)", "`touch pwned`", "a; touch pwned", "a\ntouch pwned\n", "'\"; touch pwned #"),
    *("x{{ 7 * 7 }}", "na\u00efve \u2603 \u202e", "\\", "-rf", "", "a b  c", "*", "~", "!!"),
]


class Head:
    """A Ray head of the test's own, with dashboard and token, that knows nothing of any other on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        port, dashboard, agent, client = free_ports(4)
        self.port, self.dashboard = dashboard, f"http://127.0.0.1:{dashboard}"
        self.address = f"127.0.0.1:{port}"
        self.token = secrets.token_hex(32)
        token = folder / "token"
        token.touch(0o600)
        token.write_text(self.token)
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
        while self.ask("GET", "/api/jobs/", self.token) != 200:
            words = (self.folder / "head.out").read_text()
            assert self.process.poll() is None and time.monotonic() < deadline, words
            time.sleep(0.2)

    def ask(self, method: str, path: str, token: str | None, body: dict | None = None) -> int | None:
        """The status that it answers with; None where nobody does."""
        request = urllib.request.Request(f"{self.dashboard}{path}", method=method)
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30).status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def end(self) -> None:
        """Only what this head started: its descendants, by process id."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            process.kill()
        self.process.wait(30)


@pytest.fixture(scope="module")
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


def submit(head: Head, cwd: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [str(BIN / "tokenppo"), "submit", "ray", *options]
    environ = head.environ | environment
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=240)


def test_a_job_trains_on_a_cluster_that_was_there(head, task, tmp_path):
    """The folder of the task goes along; the run is followed to its end, and leaves the cluster as it was."""
    runs = str(tmp_path / "runs")
    common = ["--config", "config.yaml", "--address", head.dashboard, "--working-dir", ".", "--run.dir", runs]
    done = submit(head, task, *common, "--run.name", "job")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 1/1" in done.stdout and "job-" in done.stderr
    folder = tmp_path / "runs" / "job"
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1]
    assert json.loads((folder / "summary.json").read_text())["exit"] == 0 and (folder / "final").is_dir()
    assert head.process.poll() is None, "a run ends its own processes, not the cluster that it joined"
    # The exit code is that of the run, here of a mistake that shows there alone.
    failed = submit(head, task, *common, "--run.name", "job", "--run.resume", "never")
    assert failed.returncode == 2 and "run.resume = never" in failed.stdout, failed.stdout + failed.stderr


def test_whoever_has_no_token_changes_nothing(head, task):
    """Every endpoint of the job server that changes state: 401 without a token, 403 with another."""
    body = {"entrypoint": "touch pwned", "submission_id": "evil"}
    for method, path, sent in (
        ("POST", "/api/jobs/", body),
        ("POST", "/api/jobs/evil/stop", {}),
        ("DELETE", "/api/jobs/evil", None),
        ("PUT", "/api/packages/gcs/x.zip", {}),
    ):
        assert head.ask(method, path, None, sent) == 401, (method, path)
        assert head.ask(method, path, "0" * 64, sent) == 403, (method, path)
    assert head.ask("GET", "/api/jobs/evil", head.token) == 404
    assert (head.folder / "token").stat().st_mode & 0o777 == 0o600
    wrong = submit(head, task, "--config", "config.yaml", "--address", head.dashboard, RAY_AUTH_TOKEN="0" * 64)
    assert (
        wrong.returncode == 2
        and "RAY_AUTH_TOKEN_PATH, the token of that cluster?" in wrong.stderr
        and wrong.stderr.count("\n") == 1
    ), wrong.stderr


def test_its_dashboard_listens_on_loopback_alone(head):
    listening = {
        connection.laddr.ip
        for process in psutil.Process(head.process.pid).children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == head.port
    }
    assert listening == {"127.0.0.1"}


def test_a_run_that_joins_needs_the_token_and_somebody_who_listens(head, task, tmp_path):
    def joined(address: str, **environment: str) -> subprocess.CompletedProcess:
        words = [str(BIN / "tokenppo"), "train", "--config", "config.yaml", "--resources.ray_address", address]
        words += ["--run.dir", str(tmp_path / "other")]
        environ = head.environ | environment | {"RAY_DEDUP_LOGS": "1"}
        return subprocess.run(words, cwd=task, env=environ, capture_output=True, text=True, timeout=120)

    wrong = joined(head.address, RAY_AUTH_TOKEN="0" * 64)
    assert wrong.returncode == 3 and "RAY_AUTH_TOKEN_PATH, the token of that cluster?" in wrong.stderr, wrong.stderr
    nobody = joined(f"127.0.0.1:{free_ports(1)[0]}")
    assert nobody.returncode == 3 and "no answer (Connection refused)" in nobody.stderr, nobody.stderr
    assert nobody.stderr.count("\n") == 1


@pytest.mark.parametrize("file", SHELL, ids=lambda file: str(file.relative_to(ROOT)))
def test_all_shell_is_sound(file):
    subprocess.run(["bash", "-n", str(file)], check=True, timeout=30)
    tool = shutil.which("shellcheck")
    if tool is None:
        pytest.skip(
            "bash -n finds nothing; shellcheck, which would see more, is not installed (apt-get install shellcheck)"
        )
    done = subprocess.run([tool, "--external-sources", "--severity=warning", str(file)], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_hostile_values_reach_the_trainer_as_they_are(tmp_path):
    """The script of SLURM, run by bash with an `srun` that notes its words: values come through, nothing else runs."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" > "$SRUN_WORDS"\n')
    srun.chmod(0o755)
    words = [f"--data.prompt_column={value}" for value in HOSTILE]
    runs = tmp_path / "a folder's $(name)"
    command = [str(BIN / "tokenppo"), "submit", "slurm", "--dry-run", "--config", CARDS, "--run.dir", str(runs), *words]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)
    assert made.returncode == 0, made.stderr
    environ = os.environ | {"PATH": f"{srun.parent}:{os.environ['PATH']}", "SRUN_WORDS": str(tmp_path / "words")}
    environ["SLURM_JOB_ID"] = "7"
    done = subprocess.run(["bash", "-s"], input=made.stdout, cwd=tmp_path, env=environ, text=True,
                          capture_output=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    got = (tmp_path / "words").read_bytes().decode().split("\0")[:-1]
    assert got[got.index("--config") + 2 :] == ["--run.dir", str(runs), *words]
    assert got[got.index("--meet") + 1] == f"{runs}/.meet/slurm-7-0"
    assert not list(tmp_path.rglob("pwned"))
