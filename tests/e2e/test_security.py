"""What SECURITY.md promises of real processes: who is let in, and where no secret is ever written."""

import http.client
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import canaries
import grpc
import psutil
import pytest
import ray
from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT

import tiny_models
from cards_run import ROOT
from core.config import load
from core.faults import ProcessFault, UserError
from launch import ray_auth
from reward_http import Served

pytestmark = pytest.mark.slow

CONFIG = """
model: {path: model, dtype: float32}
data: {path: prompts.jsonl, eval_path: prompts.jsonl, eval_prompts: 2}
rollout: {workers: 1, batch_size: 4, n_samples_per_prompt: 2, chunk_size: 4, max_new_tokens: 6}
rewards: {brief: {fn: "URL"}}
ppo: {mini_batch_size: 4, micro_batch_size: 4}
run: {steps: 1, dir: runs, name: mine}
log: {trackers: [tensorboard, wandb], samples_every: 1, ledger: 1.0}
"""
REWARDS = """
import time
from pathlib import Path

HERE = Path(__file__).parent


def brief(completion_ids, **_):
    deadline = time.monotonic() + 240
    while (HERE / "runs" / "mine" / "processes.json").exists() and not (HERE / "seen").exists():
        if time.monotonic() > deadline:
            raise TimeoutError("nobody saw Ray's agent within 240 s")
        time.sleep(0.05)
    return [-0.1 * len(x) for x in completion_ids]
"""  # no step ends before Ray's agent was seen, which may come up long after the actors
GCS = "/ray.rpc.{}"
TOLD = (  # what Ray's control store knows of jobs and their runtime environments
    "JobInfoGcsService/GetAllJobInfo",
    "NodeInfoGcsService/GetAllNodeInfo",
    "ActorInfoGcsService/GetAllActorInfo",
    "WorkerInfoGcsService/GetAllWorkerInfo",
)
AGENT_PORT = DEFAULT_DASHBOARD_AGENT_LISTEN_PORT  # beside another Ray that has it, an agent does without
NO_AGENT = b"Failed to start HTTP server"  # and says so in its log
SUBMIT = ("/api/jobs/", "/api/job_agent/jobs/")  # of Ray's dashboard, and of its agent on each node


# ------------------------------------------------------------------------------------- a Ray that asks for no token


@contextmanager
def control_store(folder: Path, mode: str) -> Iterator[str]:
    """Ray's control store alone, which is what answers at a cluster's address; gives host:port."""
    folder.mkdir()
    program = Path(ray.__file__).parent / "core" / "src" / "ray" / "gcs" / "gcs_server"
    command = [str(program), f"--log_dir={folder}", "--config_list=e30=", "--gcs_server_port=0"]
    command += ["--metrics-agent-port=0", "--node-ip-address=127.0.0.1", "--session-name=s", f"--session-dir={folder}"]
    command += [f"--node-id={'0' * 56}"]
    environment = os.environ | {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with open(folder / "err", "wb") as err:
        server = subprocess.Popen(command, env=environment, stdout=err, stderr=err)
    try:
        deadline = time.monotonic() + 60
        while not (open_ports := [c.laddr.port for c in _connections(server.pid) if c.status == "LISTEN"]):
            assert server.poll() is None and time.monotonic() < deadline, (folder / "err").read_text()
            time.sleep(0.05)
        yield f"127.0.0.1:{open_ports[0]}"
    finally:
        server.kill()
        server.wait(30)


def _connections(pid: int) -> list:
    return psutil.Process(pid).net_connections()


def joining(address: str, **more: object) -> object:
    least = {"model.path": "m", "data.path": "d.jsonl", "rewards.mine.fn": "r.py:f"}
    return load(None, least | {"resources.ray_address": address} | more)


def test_a_cluster_that_asks_nobody_for_a_token_is_refused_unless_one_says_so_twice(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with control_store(tmp_path / "open", "disabled") as address:
        with pytest.raises(UserError, match=f"ray_address = {address}: .*asks nobody for a token.*resources.insecure"):
            ray_auth.refuse_open(joining(address), address)
        insecure = joining(address, **{"resources.insecure": True})
        with pytest.raises(UserError, match="RAY_AUTH_MODE=disabled in the environment"):
            ray_auth.refuse_open(insecure, address)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        ray_auth.refuse_open(insecure, address)
        # The command says it in one line and starts nothing.
        make_task(tmp_path, "http://127.0.0.1:1")
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token"}
        line = [sys.executable, "-P", "-m", "tokenppo", "train", "--config", "config.yaml"]
        line += ["--resources.ray_address", address]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "asks nobody for a token" in done.stderr and not (tmp_path / "runs").exists()


def test_a_cluster_with_a_token_lets_no_stranger_in_and_another_server_is_no_ray(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    with control_store(tmp_path / "closed", "token") as address:
        assert not ray_auth.lets_strangers_in(address)
        ray_auth.refuse_open(joining(address), address)
    monkeypatch.setattr(ray_auth, "ASK_S", 1.0)
    with pytest.raises(ProcessFault, match="no Ray"):
        ray_auth.lets_strangers_in(address)


# ------------------------------------------------------------------------------------------------------- canaries


def make_task(folder: Path, url: str) -> None:
    tiny_models.save_model(folder / "model", "gpt2")
    rows = [{"prompt": f"the {w} sat"} for w in ("cat", "dog")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(CONFIG.replace("URL", url))


@dataclass
class Family:
    """What was seen of the processes of a run while it was at work."""

    lines: set[str] = field(default_factory=set)  # their command lines
    told: dict[str, bytes] = field(default_factory=dict)  # question -> what Ray's control store answered
    strangers: bool | None = None  # whether it let one in with a wrong token
    knocks: dict[tuple[str, str], int | None] = field(default_factory=dict)  # (process, path) -> HTTP status
    agent_ports: set[str] = field(default_factory=set)  # whose AGENT_PORT is: "ours", "another's"

    def look(self, run: subprocess.Popen, token: Path, begun: Path) -> None:
        """`begun`: a file that is there when all actors are."""
        processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        ports: set[tuple[str, int]] = set()
        for process in processes:
            try:
                self.lines.add(" ".join(process.cmdline()))
                if begun.exists():
                    listening = [c.laddr for c in process.net_connections() if c.status == "LISTEN"]
                    ports |= {(" ".join(process.cmdline())[:200], at.port) for at in listening}
            except psutil.Error:
                continue
        if ports:
            every = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == "LISTEN"}
            ours = {port for _, port in ports}
            self.agent_ports |= {"ours" if AGENT_PORT in ours else "another's"} if AGENT_PORT in every else set()
        # Each as soon as it listens, Ray's agent maybe long after the actors; at once, since some say nothing for long.
        doors = {(f"{name} at {port}", path): port for name, port in ports for path in SUBMIT}
        silent = {place for place, port in doors.items() if port == AGENT_PORT and self.knocks.get(place) is None}
        doors = {place: port for place, port in doors.items() if place in silent or place not in self.knocks}
        with ThreadPoolExecutor(16) as pool:
            said = pool.map(lambda place: knock(doors[place], place[1]), doors)
            self.knocks |= dict(zip(doors, said, strict=True))
        found = re.search(r"--gcs-address=(\S+:\d+)", "\n".join(self.lines))
        if self.told or not found or not ports:
            return
        bearer = (("authorization", f"Bearer {token.read_text().strip()}"),)
        with grpc.insecure_channel(found[1], options=[("grpc.enable_http_proxy", 0)]) as channel:
            for name in TOLD:
                self.told[name] = channel.unary_unary(GCS.format(name))(b"", timeout=30, metadata=bearer)
        self.strangers = ray_auth.lets_strangers_in(found[1])


def knock(port: int, path: str) -> int | None:
    """The status of a request without a token that would run a program; None where it is no HTTP that answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3)
    try:
        connection.request("POST", path, json.dumps({"entrypoint": "true"}), {"Content-Type": "application/json"})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def test_no_secret_is_written_anywhere(monkeypatch):
    """The smallest whole run: W&B offline, TensorBoard, a reward server with a token, a Ray of its own, a report."""
    folder = Path(tempfile.mkdtemp(prefix="tp"))  # short: Ray's sockets lie in it
    planted = {
        "WANDB_API_KEY": secrets.token_hex(20),
        "HF_TOKEN": "hf_" + secrets.token_hex(17),
        "TOKENPPO_REWARD_TOKEN": secrets.token_hex(16),
    }
    kept = {name: x for name, x in os.environ.items() if not name.startswith(("RAY_", "WANDB_", "HF_"))}
    (folder / "home").mkdir()
    environment = kept | planted | {"HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(folder)}
    environment |= {"WANDB_MODE": "offline", "PYTHONDONTWRITEBYTECODE": "1"}
    token, family, served, run = folder / "home" / ".ray" / "auth_token", Family(), None, None
    try:
        (folder / "rewards.py").write_text(REWARDS)
        (folder / "served.yaml").write_text(f"rewards: {{brief: {{fn: '{folder}/rewards.py:brief'}}}}\n")
        served = Served(folder / "served.yaml", environment=environment)
        make_task(folder, served.url)
        with open(folder / "out", "wb") as out:
            line = [sys.executable, "-P", "-m", "tokenppo", "train", "--config", "config.yaml"]
            run = subprocess.Popen(line, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 480
        while run.poll() is None:
            family.look(run, token, folder / "runs" / "mine" / "processes.json")
            if any(NO_AGENT in log.read_bytes() for log in folder.rglob("session_*/logs/dashboard_agent.log")):
                family.agent_ports.add("another's")
            if family.agent_ports:
                (folder / "seen").touch()
            assert time.monotonic() < deadline, (folder / "out").read_text()
            time.sleep(0.1)
        words = (folder / "out").read_text()
        assert run.returncode == 0, words
        family.lines.add(" ".join(psutil.Process(served.process.pid).cmdline()))

        # It was all there to be seen.
        made = folder / "runs" / "mine"
        assert (made / "report.html").is_file() and list(made.glob("ledger/*")) and (made / "final").is_dir()
        assert list(made.rglob("*.wandb")) and list(made.rglob("events.out.tfevents.*"))
        assert list(made.glob("checkpoints/step-1/learner/*")) and "results: " in words
        session = [path for path in folder.rglob("session_*/logs/*") if path.is_file()]
        assert {"gcs_server.out", "raylet.out"} <= {path.name for path in session}
        assert any("gcs_server" in line for line in family.lines) and any("wandb-core" in line for line in family.lines)
        assert len(family.told) == len(TOLD) and b"claim_packages" in b"".join(family.told.values())
        assert b"RolloutWorker" in family.told["ActorInfoGcsService/GetAllActorInfo"]
        # The token of Ray, and who gets in without it.
        assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        assert family.strangers is False
        # Ray's agent asks for the token; where another Ray has its port, nobody of this run takes programs at all.
        assert family.agent_ports, family.knocks
        if "ours" in family.agent_ports:
            assert {401, 403} & set(family.knocks.values()), family.knocks
        assert not {place: status for place, status in family.knocks.items() if status is not None and status < 400}

        planted["the token of Ray"] = token.read_text().strip()
        token.unlink()  # its own place
        places = [*canaries.files(folder), *((f"command line: {line}", line.encode()) for line in family.lines)]
        places += [(f"Ray's {name}", answer) for name, answer in family.told.items()]
        assert len(places) > 60
        assert canaries.hits(planted, places) == []
        # A hit in one of each kind would have been seen.
        for name, canary in planted.items():
            assert canaries.hits({name: canary}, [("here", f"x{canary}".encode())])
    finally:
        if run is not None and run.poll() is None:
            for process in [*psutil.Process(run.pid).children(recursive=True), psutil.Process(run.pid)]:
                process.kill()
            run.wait(30)
        if served is not None:
            served.end()
        shutil.rmtree(folder, ignore_errors=True)
