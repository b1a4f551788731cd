"""docker/*.lock: what the images install is exact, hashed, names no place, and is what pyproject.toml asks for."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from docker_rules import parse

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = ("lora", "server")  # of the images that train
PYTHON = {"cpu": "3.11", "cuda": "3.12", "reward-server": "3.11", "build": "3.11"}
LINE = re.compile(r"([a-z0-9-]+)==(\S+?)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")


def wanted(*extras: str) -> list[Requirement]:
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def pins(text: str) -> dict[str, str]:
    """Name -> version of every line. Raises ValueError for anything that is no release with a hash."""
    if rest := LINE.sub("", text):
        raise ValueError(f"no release with a hash: {rest[:200]!r}")
    found = [(name, version) for name, version, _ in LINE.findall(text)]
    if len(found) != len(dict(found)):
        raise ValueError("a name stands there twice")
    return dict(found)


def unmet(lock: dict[str, str], requirements: list[Requirement], python: str) -> list[str]:
    """What a lock lacks or has in a version that is not wanted."""
    environment = {"sys_platform": "linux", "python_version": python, "python_full_version": f"{python}.0"}
    out = []
    for requirement in requirements:
        version = lock.get(canonicalize_name(requirement.name))
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            out.append(f"{requirement}: the lock has {version}")
    return out


def read(name: str) -> str:
    return (ROOT / "docker" / f"{name}.lock").read_text()


def listed(name: str) -> list[Requirement]:
    lines = (ROOT / "docker" / f"{name}.in").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("name", PYTHON)
def test_each_line_is_a_release_with_a_hash_and_names_no_place(name):
    assert pins(read(name))
    assert "://" not in read(name) and "index" not in read(name)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_an_image_that_trains_has_what_pyproject_asks_for(name):
    assert unmet(pins(read(name)), wanted(*EXTRAS), PYTHON[name]) == []


@pytest.mark.parametrize("name", ["cpu", "cuda", "reward-server", "build"])
def test_the_tools_that_build_are_locked_too(name):
    build = [Requirement(line) for line in PROJECT["build-system"]["requires"]]
    assert unmet(pins(read(name)), [*build, *listed("build")], PYTHON[name]) == []


def test_the_reward_server_has_a_part_of_the_learner_s_releases():
    assert unmet(pins(read("reward-server")), listed("reward-server"), "3.11") == []
    ours = {str(requirement) for requirement in wanted("server")}
    assert {str(requirement) for requirement in listed("reward-server")} <= ours, "bounds of its own"
    assert pins(read("reward-server")).items() <= pins(read("cpu")).items()
    assert pins(read("build")).items() <= pins(read("reward-server")).items()
    assert not {"torch", "ray", "accelerate", "deepspeed", "transformers"} & pins(read("reward-server")).keys()


def test_each_target_has_its_own_build_of_torch():
    (tested,) = re.findall(r"torch==(\S+)", (ROOT / "launch" / "install.sh").read_text())
    (locked,) = re.findall(r"^torch=(\S+)", (ROOT / "docker" / "lock.sh").read_text(), re.M)
    cpu, cuda = pins(read("cpu")), pins(read("cuda"))
    assert (locked, cpu["torch"], cuda["torch"]) == (tested, f"{tested}+cpu", tested)
    assert not [name for name in cpu if name.startswith("nvidia-")] and "nvidia-nccl-cu13" in cuda
    shared = cpu.keys() & cuda.keys() - {"torch"}
    assert {name: cpu[name] for name in shared} == {name: cuda[name] for name in shared}


def test_the_images_use_their_locks():
    stages = {stage.name: stage for stage in parse((ROOT / "docker" / "Dockerfile").read_text())}
    for target in ("cpu", "cuda"):
        for stage in (f"{target}-venv", target):
            assert any(f"LOCK=docker/{target}.lock" in i.body for i in stages[stage].instructions if i.word == "ENV")
        version = re.search(r"python:(3\.\d+)", stages["slim-system"].base)
        assert version and version[1] == PYTHON["cpu"]
    installs = re.findall(r"^pip=\((.*)\)$", (ROOT / "docker" / "venv.sh").read_text(), re.M)
    assert installs and all("--require-hashes" in words for words in installs)


@pytest.mark.parametrize(
    "text",
    [
        "torch==2.13.0\n",
        f"torch>=2.13.0 \\\n    --hash=sha256:{'0' * 64}\n",
        f"torch==2.13.0 \\\n    --hash=md5:{'0' * 32}\n",
        f"--index-url https://example.org\ntorch==1 \\\n    --hash=sha256:{'0' * 64}\n",
        f"torch @ file:///x \\\n    --hash=sha256:{'0' * 64}\n",
        f"a==1 \\\n    --hash=sha256:{'0' * 64}\n" * 2,
    ],
)
def test_what_is_no_release_with_a_hash_is_refused(text):
    with pytest.raises(ValueError):
        pins(text)


def test_a_lock_that_is_behind_pyproject_is_found_out():
    lock = pins(read("cpu"))
    assert unmet(lock | {"accelerate": "1.14.0"}, wanted(), "3.11") == ["accelerate>=1.15: the lock has 1.14.0"]
    assert unmet({k: v for k, v in lock.items() if k != "xxhash"}, wanted(), "3.11") == [
        "xxhash>=3.5: the lock has None"
    ]


def test_the_lowest_releases_are_bounds_of_pyproject():
    """launch/lowest.sh takes the lowest that is allowed: what has no lower bound would be a release from long ago."""
    unbounded = [
        str(requirement)
        for requirement in wanted("lora", "server", "tune", "workspaces")
        if not any(specifier.operator == ">=" for specifier in requirement.specifier)
    ]
    assert unbounded == []
    script = (ROOT / "launch" / "lowest.sh").read_text()
    assert all(f"--extra {extra}" in script for extra in ("lora", "server", "tune", "workspaces"))
    named = re.findall(r"[a-z_]+", re.search(r"for name in (.*?); do", script, re.S)[1].replace("\\", " "))
    assert len(named) > 15 and all((ROOT / "tests" / f"test_{name}.py").exists() for name in named)
