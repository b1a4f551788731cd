"""Nothing that an extra brings is imported before it is used: what starts, starts without any."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Distribution -> the name that it is imported by, where that is another.
IMPORTED_AS = {
    "check-jsonschema": "check_jsonschema",
    "pytest-timeout": "pytest_timeout",
    "pytest-xdist": "xdist",
    "ray": "ray.tune",  # the extra is a part of what is there anyway
    "wandb-workspaces": "wandb_workspaces",
}
LIGHT = "import tokenppo, launch.cli; launch.cli.main(['--help'])"
TRAINS = "import launch.cli; launch.cli.main(['train', '--config', 'configs/cards.yaml', '--dry-run'])"
HEAVY = (
    "import launch.train, rollout.worker, reward_server.server, reward_server.components, trainer.learner, launch.run"
)
BLOCKING = """
import sys
class Without:
    # As where it is not installed: nobody finds it, and who asks first whether it is there is told that it is not.
    def __init__(self, finder):
        self._finder = finder
    def find_spec(self, name, path=None, target=None):
        blocked = any(name == n or name.startswith(n + ".") for n in {names!r})
        return None if blocked else self._finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self._finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def closure(lines: list[str]) -> set[str]:
    """Names of everything that these requirements bring, by the metadata of what is installed here."""
    found: set[str] = set()
    wanted = [Requirement(line) for line in lines]
    while wanted:
        requirement = wanted.pop()
        extras = requirement.extras or {""}
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        key = f"{canonicalize_name(requirement.name)}[{','.join(sorted(extras))}]"
        if key in found:
            continue
        found |= {key, canonicalize_name(requirement.name)}
        for line in importlib.metadata.requires(requirement.name) or []:
            further = Requirement(line)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                further.marker = None
                wanted.append(further)
    return found


def names() -> list[str]:
    """What only extras bring, as it is imported."""
    lines = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    found = {Requirement(line).name for line in lines} - {"tokenppo"}
    core = closure(PROJECT["dependencies"]) - {"ray"}
    return sorted(IMPORTED_AS.get(name, name) for name in found if canonicalize_name(name) not in core)


def without_extras(code: str) -> subprocess.CompletedProcess:
    program = BLOCKING.format(names=names()) + code
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_what_comes_anyway_is_no_extra():
    core = closure(PROJECT["dependencies"])
    assert {"torch", "transformers", "ray", "markupsafe"} <= core and not {"peft", "fastapi", "uvicorn"} & core


@pytest.mark.slow
def test_the_finder_knows_every_extra_and_blocks_it():
    assert {"vllm", "peft", "fastapi", "uvicorn", "stamina", "ray.tune", "pytest"} <= set(names())
    assert not [name for name in names() if "-" in name]
    done = without_extras("import fastapi")
    assert done.returncode == 1 and "No module named 'fastapi'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("code", [LIGHT, TRAINS], ids=["help", "dry run"])
def test_the_command_starts_without_any_extra(code):
    done = without_extras(code)
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.slow
def test_a_run_imports_no_extra():
    done = without_extras(HEAVY)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_verb_that_wants_an_extra_names_it():
    """`serve-reward` in a plain installation, which is the one that has its client's extra to name."""
    done = without_extras(
        "import launch.cli as c; sys.exit(c.main(['serve-reward', '--config', 'configs/cards.yaml', '--port', '0']))"
    )
    assert done.returncode == 2 and "pip install 'tokenppo[server]'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
