"""A target of docker/Dockerfile without docker: COPY and RUN of its stages, in a folder that stands for /app."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

from docker_rules import Instruction, Stage, copied, lineage, parse, patterns_of

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
PASSED_ON = (
    "PIP_",
    "SSL_",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
)
PASSED_ON += ("HTTPS_PROXY", "NO_PROXY")


def environment(stages: list[Stage], stage: str, app: Path, home: Path, path: str) -> dict[str, str]:
    """What a process of this stage sees: its ENV lines, an empty home, and of this machine how pip reaches packages."""
    seen = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON)}
    seen |= {"HOME": str(home), "PATH": path}
    for instruction in lineage(stages, stage):
        if instruction.word == "ENV":
            for pair in shlex.split(instruction.body):
                name, _, value = pair.partition("=")
                seen[name] = value.replace("/app", str(app)).replace("$PATH", seen["PATH"])
    return seen


def copy(instruction: Instruction, app: Path) -> None:
    """COPY from the context; what is copied is exactly what .dockerignore lets through."""
    for file in copied(instruction, ROOT, patterns_of(ROOT / ".dockerignore"))[0]:
        target = app / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)


def make(target: str, app: Path, home: Path, path: str) -> dict[str, str]:
    """Do the steps of `<target>-venv` and `target` that concern /app; returns the environment of the finished image."""
    stages = parse(DOCKERFILE.read_text())
    app.mkdir(parents=True)
    home.mkdir(parents=True, exist_ok=True)
    (builder,) = (stage for stage in stages if stage.name == f"{target}-venv")
    for instruction in builder.instructions:
        if instruction.word == "COPY":
            copy(instruction, app)
        elif instruction.word == "RUN":
            environ = environment(stages, builder.name, app, home, path)
            subprocess.run(["sh", "-c", instruction.body], cwd=app, env=environ, check=True, timeout=900)
    (final,) = (stage for stage in stages if stage.name == target)
    for instruction in final.instructions:
        if instruction.word == "COPY" and "from" in instruction.flags:
            assert (instruction.flags["from"], instruction.body) == (builder.name, "/app/.venv .venv")
            keep_only(app / ".venv")
        elif instruction.word == "COPY":
            copy(instruction, app)
    return environment(stages, target, app, home, path)


def keep_only(kept: Path) -> None:
    """What else the builder left beside `kept` is not in the image."""
    for path in kept.parent.iterdir():
        if path != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# What docker/compose.yaml asks an engine for, but for the user: a root that nothing can write to, a /tmp and a home in
# memory, of which only the latter may hold programs, a volume, no capability and no way to gain one.
CONTAINED = """
scratch=$1; shift
mount -t tmpfs -o noexec,nosuid,nodev tmpfs "$scratch/tmp"
mount -t tmpfs -o nosuid,nodev,mode=0700 tmpfs "$scratch/home"
mount --bind "$scratch/runs" "$scratch/runs"
mount -o remount,ro,bind /
exec setpriv --no-new-privs --bounding-set -all --inh-caps -all "$@"
"""


def contained(words: list[str], scratch: Path, environ: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """(command, environment) of a process of an image as CONTAINED has it; root alone can start it, on Linux."""
    for name in ("tmp", "home", "runs"):
        (scratch / name).mkdir(parents=True)
    inside = environ | {"HOME": str(scratch / "home"), "TMPDIR": str(scratch / "tmp")}
    unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", CONTAINED, "sh", str(scratch)]
    return [*unshare, *words], inside


def command(target: str, word: str) -> list[str]:
    """The words of CMD or HEALTHCHECK of a target."""
    (found,) = (i for i in lineage(parse(DOCKERFILE.read_text()), target) if i.word == word)
    return json.loads(found.body[found.body.index("[") :])
