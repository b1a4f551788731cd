"""The steps of docker/Dockerfile work: done without docker, in an empty folder with an empty home."""

import contextlib
import http.client
import importlib.metadata
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import docker_steps

SYSTEM = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


INTERPRETER = str(Path(sys.base_prefix) / "bin")  # where the image has /usr/local/bin/python3
LOCKED = sys.platform == "linux" and sys.version_info[:2] == (3, 11)
TOKEN = "only-in-a-file-of-this-test"


@pytest.mark.slow
@pytest.mark.skipif(not LOCKED, reason="the lock is of Linux and Python 3.11")
@pytest.mark.skipif(
    not importlib.metadata.version("torch").endswith("+cpu"),
    reason="docker/cpu.lock wants torch's build for CPUs, and what pip brought here is another",
)
def test_the_cpu_image_can_be_made_and_is_well(tmp_path):
    """The venv by pip as in the image, then the health check, the command and the demo's script as in a container."""
    app = tmp_path / "app"
    environ = docker_steps.make("cpu", app, tmp_path / "home", f"{INTERPRETER}:{SYSTEM}")
    environ |= {"OMP_NUM_THREADS": "1"}

    def done(*words: str, timeout_s: float = 120) -> str:
        run = subprocess.run(words, cwd=app, env=environ, capture_output=True, text=True, timeout=timeout_s)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    assert "is well" in done(*docker_steps.command("cpu", "HEALTHCHECK"))
    assert str(app) in done("python", "-P", "-c", "import tokenppo; print(tokenppo.__file__)")
    plan = done("tokenppo", "train", "--config", "configs/cards.yaml", "--dry-run")
    assert "1 learner" in plan and f"{app}/runs/cards" in plan
    assert done("bash", "-ec", ". launch/install.sh; command -v ninja") == f"{app}/.venv/bin/ninja\n", "DeepSpeed's"
    absent = subprocess.run(["python", "-c", "import pytest"], cwd=app, env=environ, capture_output=True)
    assert absent.returncode == 1, "the tools of the tests have no place in an image"
    assert not (app / "tests").exists() and os.listdir(app / "launch" / "templates")


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


@pytest.mark.slow
@pytest.mark.skipif(not LOCKED, reason="the lock is of Linux and Python 3.11")
def test_the_reward_server_image_can_be_made_scores_and_is_well(tmp_path):
    """The small venv by pip, then CMD and HEALTHCHECK as they stand, but for the port and the place of the secret."""
    app = tmp_path / "app"
    environ = docker_steps.make("reward-server", app, tmp_path / "home", f"{INTERPRETER}:{SYSTEM}")
    secret = tmp_path / "reward_token"
    secret.write_text(TOKEN + "\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])

    def here(words: list[str]) -> list[str]:
        return [word.replace("8080", port).replace("/run/secrets/reward_token", str(secret)) for word in words]

    def is_well() -> bool:
        check = here(docker_steps.command("reward-server", "HEALTHCHECK"))
        proxied = environ | {"http_proxy": "http://127.0.0.1:1"}
        return subprocess.run(check, cwd=app, env=proxied, capture_output=True, timeout=60).returncode == 0

    def status(token: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
        body = '{"prompt": "name hugo ; =>", "completion": "hugo", "columns": {"facts": {"name": "hugo"}}}'
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/try", body, headers)
        with contextlib.closing(connection):
            return connection.getresponse().status

    assert not is_well(), "nothing listens yet"
    with started(here(docker_steps.command("reward-server", "CMD")), app, environ) as line:
        assert "scoring consistency, quality, coverage, slot_error at http://0.0.0.0" in line
        assert is_well() and (status(TOKEN), status("a-guess-of-a-stranger")) == (200, 401)
    assert not is_well(), "it has ended"

    absent = "import importlib.util as u; print([n for n in ('torch', 'ray', 'accelerate', 'pip') if u.find_spec(n)])"
    told = subprocess.run(["python", "-c", absent], cwd=app, env=environ, capture_output=True, text=True, timeout=60)
    assert told.stdout == "[]\n", told
    help_ = subprocess.run(["tokenppo", "--help"], cwd=app, env=environ, capture_output=True, text=True, timeout=60)
    assert help_.returncode == 0 and "serve-reward" in help_.stdout, help_.stderr
    assert not any((app / name).exists() for name in ("core", "tests", "pyproject.toml", "examples/cards/base"))
    size = sum(p.lstat().st_size for p in app.rglob("*"))
    assert size < 400e6, f"{size / 1e6:.0f} MB: what came into it?"


def test_the_demo_is_what_a_cpu_container_does():
    assert docker_steps.command("cpu", "CMD") == ["bash", "launch/demo.sh"]
    assert docker_steps.command("cuda", "HEALTHCHECK") == ["tokenppo", "health"]
