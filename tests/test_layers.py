"""The picture of who may import whom, read from the source with `ast`: imports inside functions count too.

launch -> trainer | rollout | reward_server -> core
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "core": {"core"},
    "trainer": {"core", "trainer"},
    "rollout": {"core", "rollout"},
    "reward_server": {"core", "reward_server"},
    "launch": {"core", "trainer", "rollout", "reward_server", "launch", "tokenppo"},
}
VENDORS = {
    "ray": ("rollout/worker.py", "rollout/group.py", "reward_server/server.py", "reward_server/client.py", "launch/"),
    "accelerate": (
        "trainer/learner.py",
        "trainer/weight_sender.py",
        "trainer/checkpoint.py",
        "trainer/engine_weights.py",
        "launch/",
    ),
    "deepspeed": (
        "trainer/learner.py",
        "trainer/weight_sender.py",
        "trainer/checkpoint.py",
        "trainer/engine_weights.py",
        "launch/",
    ),
    "vllm": ("rollout/engines/vllm_engine.py",),
    "wandb": ("launch/wandb_tracker.py", "launch/wandb_view.py"),
    "wandb_workspaces": ("launch/wandb_view.py",),
}
SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Top-level names of everything a file imports, at module level or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module.split(".")[0])
    return found


def test_the_walk_sees_the_sources():
    assert len(SOURCES) > 25 and "ray" in imports(ROOT / "rollout" / "group.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_layers_and_vendors(path):
    name = path.relative_to(ROOT).as_posix()
    package, found = name.split("/")[0], imports(path)
    ours = found & (set(MAY_IMPORT) | {"tokenppo", "tests", "examples"})
    assert ours <= MAY_IMPORT[package], f"{name} imports {sorted(ours - MAY_IMPORT[package])}"
    for vendor, places in VENDORS.items():
        assert vendor not in found or name.startswith(places), f"{name} imports {vendor}: only {places} may"


@pytest.mark.parametrize(
    "module", ["core.config", "core.metrics", "core.faults", "launch.cli", "launch.arguments", "launch.health"]
)
def test_what_help_needs_is_light(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip() == "[]"


def test_no_room_without_a_name_of_its_own():
    rooms = {"utils", "common", "helpers", "scripts", "misc"}
    assert not [
        p for p in ROOT.rglob("*.py") if rooms & {*p.relative_to(ROOT).parts, p.stem} and ".venv" not in p.parts
    ]
