"""The steps of docker/Dockerfile work: done without docker, in an empty folder with an empty home."""

import contextlib
import http.client
import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from packaging.utils import canonicalize_name

import docker_steps

pytestmark = pytest.mark.timeout(1500)  # pip unpacks 2 GB: a minute on a quiet machine, ten on a busy one
SYSTEM = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


INTERPRETER = str(Path(sys.base_prefix) / "bin")  # where the image has /usr/local/bin/python3
LOCKED = sys.platform == "linux" and sys.version_info[:2] == (3, 11)
SHORT = {
    "run.steps": "1",
    "data.eval_prompts": "4",
    "rollout.workers": "1",
    "rollout.batch_size": "16",
    "rollout.chunk_size": "8",
    "rollout.max_new_tokens": "16",
    "ppo.mini_batch_size": "8",
    "ppo.micro_batch_size": "8",
}
TOKEN = "only-in-a-file-of-this-test"


@dataclass(frozen=True)
class Image:
    target: str
    app: Path  # stands for /app
    environ: dict[str, str]

    def do(self, *words: str, timeout_s: float = 120) -> subprocess.CompletedProcess:
        return subprocess.run(words, cwd=self.app, env=self.environ, capture_output=True, text=True, timeout=timeout_s)


def made(target: str, folder: Path) -> Image:
    """By pip as in the image; minutes for the target cpu."""
    if not LOCKED:
        pytest.skip("the lock is of Linux and Python 3.11")
    environ = docker_steps.make(target, folder / "app", folder / "home", f"{INTERPRETER}:{SYSTEM}")
    return Image(target, folder / "app", environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def cpu(tmp_path_factory) -> Image:
    if not importlib.metadata.version("torch").endswith("+cpu"):
        pytest.skip("docker/cpu.lock wants torch's build for CPUs, and what pip brought here is another")
    return made("cpu", tmp_path_factory.mktemp("cpu"))


@pytest.fixture(scope="module")
def rewards(tmp_path_factory) -> Image:
    return made("reward-server", tmp_path_factory.mktemp("rewards"))


@pytest.mark.slow
@pytest.mark.long(seconds=240)
def test_the_cpu_image_can_be_made_and_is_well(cpu):
    """The health check, the command and the demo's script as in a container."""

    def done(*words: str) -> str:
        run = cpu.do(*words)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    assert "is well" in done(*docker_steps.command("cpu", "HEALTHCHECK"))
    assert str(cpu.app) in done("python", "-P", "-c", "import tokenppo; print(tokenppo.__file__)")
    plan = done("tokenppo", "train", "--config", "configs/cards.yaml", "--dry-run")
    assert "1 learner" in plan and f"{cpu.app}/runs/cards" in plan
    assert done("bash", "-ec", ". launch/install.sh; command -v ninja") == f"{cpu.app}/.venv/bin/ninja\n", "DeepSpeed's"
    assert cpu.do("python", "-c", "import pytest").returncode == 1, "the tools of the tests have no place in an image"
    assert not (cpu.app / "tests").exists() and os.listdir(cpu.app / "launch" / "templates")
    came = releases(done("python", "-m", "pip", "freeze"))
    assert len(came) > 100 and came <= releases((docker_steps.ROOT / "docker" / "cpu.lock").read_text())


def releases(text: str) -> set[tuple[str, str]]:
    """(name, version) of each line that names a release, whatever the way that a name is written."""
    return {(canonicalize_name(name), version) for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.M)}


@contextlib.contextmanager
def started(command: list[str], app: Path, environ: dict[str, str]) -> Iterator[str]:
    """A server of the image; gives the line that it says when it listens."""
    with subprocess.Popen(
        command, cwd=app, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            yield server.stdout.readline()
        finally:
            server.terminate()
            said, code = server.stdout.read(), server.wait(20)
    assert code == 143 and said == "", said


class Server:
    """CMD and HEALTHCHECK of the reward server as they stand, but for the port and the place of the secret."""

    def __init__(self, image: Image, folder: Path) -> None:
        self.image, self.secret = image, folder / "reward_token"
        self.secret.write_text(TOKEN + "\n")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = str(free.getsockname()[1])
        self.command = self.here(docker_steps.command(image.target, "CMD"))

    def here(self, words: list[str]) -> list[str]:
        places = {"reward-server:": "127.0.0.1:", "8080": self.port, "/run/secrets/reward_token": str(self.secret)}
        for there, here in places.items():
            words = [word.replace(there, here) for word in words]
        return words

    def is_well(self) -> bool:
        check = self.here(docker_steps.command(self.image.target, "HEALTHCHECK"))
        proxied = self.image.environ | {"http_proxy": "http://127.0.0.1:1"}
        return subprocess.run(check, env=proxied, capture_output=True, timeout=60).returncode == 0

    def status(self, token: str) -> int:
        body = '{"prompt": "name hugo ; =>", "completion": "hugo", "columns": {"facts": {"name": "hugo"}}}'
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", int(self.port), timeout=30)) as connection:
            connection.request("POST", "/v1/try", body, headers)
            return connection.getresponse().status


@pytest.mark.slow
def test_the_reward_server_image_can_be_made_scores_and_is_well(rewards, tmp_path):
    server = Server(rewards, tmp_path)
    assert not server.is_well(), "nothing listens yet"
    with started(server.command, rewards.app, rewards.environ) as line:
        assert "scoring consistency, quality, coverage, slot_error at http://0.0.0.0" in line
        assert server.is_well() and (server.status(TOKEN), server.status("a-guess-of-a-stranger")) == (200, 401)
    assert not server.is_well(), "it has ended"


@pytest.mark.slow
def test_the_reward_server_image_is_small_and_says_what_it_lacks(rewards, tmp_path):
    absent = "import importlib.util as u; print([n for n in ('torch', 'ray', 'accelerate', 'pip') if u.find_spec(n)])"
    assert rewards.do("python", "-c", absent).stdout == "[]\n"
    assert "serve-reward" in rewards.do("tokenppo", "--help").stdout
    (tmp_path / "c.yaml").write_text(
        "rewards:\n  fluent: {fn: reward_server.library.models:Fluency, options: {model: x}}\n"
    )
    lacking = rewards.do("tokenppo", "serve-reward", "--config", str(tmp_path / "c.yaml"), "--port", "0")
    assert lacking.returncode == 2 and "No module named 'torch'" in lacking.stderr, lacking.stderr
    assert "Traceback" not in lacking.stderr
    here = ("core", "tests", "pyproject.toml", "examples/cards/base")
    assert not any((rewards.app / name).exists() for name in here)
    size = sum(path.lstat().st_size for path in rewards.app.rglob("*"))
    assert size < 400e6, f"{size / 1e6:.0f} MB: what came into it?"


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder with a short name: Ray's sockets lie below it, and theirs end at 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="c") as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.long(seconds=60)
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a read-only root")
def test_a_learner_and_its_server_run_as_compose_has_them(cpu, rewards, scratch):
    """Both services of docker/compose.yaml, on a read-only root without capabilities; the training is a short one."""
    compose = yaml.safe_load((docker_steps.ROOT / "docker" / "compose.yaml").read_text())["services"]
    assert compose["learner"]["tmpfs"] == ["/tmp", "/home/tokenppo:exec,uid=10001,gid=10001,mode=0700"]
    server = Server(rewards, scratch)
    command, environ = docker_steps.contained(server.command, scratch / "server", rewards.environ)
    written, _ = docker_steps.contained(["touch", str(rewards.app / "written")], scratch / "touch", rewards.environ)
    assert "Read-only" in subprocess.run(written, capture_output=True, text=True, timeout=60).stderr
    with started(command, rewards.app, environ) as line:
        assert "scoring" in line and server.is_well(), line
        words = server.here(compose["learner"]["command"])
        words += [word for key, value in SHORT.items() for word in (f"--{key}", value)]
        command, environ = docker_steps.contained(
            [*words, "--run.dir", str(scratch / "learner" / "runs")], scratch / "learner", cpu.environ
        )
        run = subprocess.run(command, cwd=cpu.app, env=environ, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout + run.stderr
    (row,) = [json.loads(line) for line in (scratch / "learner/runs/cards/metrics.jsonl").read_text().splitlines()][-1:]
    assert row["step"] == 1, row
    assert TOKEN not in run.stdout + run.stderr
    kept = [path for path in (scratch / "learner" / "runs").rglob("*") if path.is_file()]
    assert kept and not [path for path in kept if TOKEN.encode() in path.read_bytes()], "the token is in the run folder"


def test_the_demo_is_what_a_cpu_container_does():
    assert docker_steps.command("cpu", "CMD") == ["bash", "launch/demo.sh"]
    assert docker_steps.command("cuda", "HEALTHCHECK") == ["tokenppo", "health"]
