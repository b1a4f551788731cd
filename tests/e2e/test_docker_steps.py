"""The steps of docker/Dockerfile work: done without docker, in an empty folder with an empty home."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import docker_steps

SYSTEM = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the image is of Linux")
def test_the_cpu_image_can_be_made_and_is_well(tmp_path):
    """The venv by pip as in the image, then the health check, the command and the demo's script as in a container."""
    interpreter = str(Path(sys.base_prefix) / "bin")  # where the image has /usr/local/bin/python3
    app = tmp_path / "app"
    environ = docker_steps.make("cpu", app, tmp_path / "home", f"{interpreter}:{SYSTEM}")
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


def test_the_demo_is_what_a_cpu_container_does():
    assert docker_steps.command("cpu", "CMD") == ["bash", "launch/demo.sh"]
    assert docker_steps.command("cuda", "HEALTHCHECK") == ["tokenppo", "health"]
