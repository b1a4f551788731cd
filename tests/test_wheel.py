"""One wheel: our packages and the public face, with the files that they read, and no test, example or document."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from launch.report.render import OWN_SCRIPTS

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_nothing_else(tmp_path):
    ignore = shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignore)  # building leaves traces in the tree
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run([*command, str(tmp_path / "source")], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"core", "trainer", "rollout", "reward_server", "launch", "tokenppo.py"}
    sources = {
        str(p.relative_to(ROOT))
        for top in ("core", "trainer", "rollout", "reward_server", "launch")
        for p in (ROOT / top).rglob("*.py")
    }
    assert sources <= set(names) and {"launch/accelerate/cpu.yaml", "launch/accelerate/gpu.yaml"} <= set(names)
    assert {"launch/templates/slurm.sh.j2", "launch/templates/wandb_sweep.yaml"} <= set(names)
    assert {f"launch/report/{name}" for name in ("page.html", "page.css", *OWN_SCRIPTS)} <= set(names)
    assert {f"rollout/engines/{name}" for name in ("compiled_step.cpp", "compiled_draw.cpp", "vectors.h")} <= set(names)
    assert any(name.endswith("entry_points.txt") for name in names) and any(name.endswith("LICENSE") for name in names)
