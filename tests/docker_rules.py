"""What a Dockerfile of ours must keep to, checked on its text: a host without an engine can refuse a bad one."""

import functools
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TARGETS = ("cpu", "cuda", "reward-server")
TRAINING = ("cpu", "cuda")  # these write runs
LABELS = ("title", "description", "licenses", "source", "version", "revision")
SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|(ACCESS|PRIVATE)_?KEY|AUTH)(_|$)", re.I)
PINNED = re.compile(r"[^\s:@]+(?::\d+/[^\s:@]+)?(:v?\d+\.\d+\.\d+[^\s@]*)?(@sha256:[0-9a-f]{64})?")


@dataclass(frozen=True)
class Instruction:
    word: str  # FROM, RUN, ...
    text: str  # what follows it, joined to one line
    line: int

    @property
    def flags(self) -> dict[str, str]:
        """--from=x and the like, which stand before everything else."""
        found: dict[str, str] = {}
        for part in self.text.split():
            if not part.startswith("--"):
                break
            name, _, value = part[2:].partition("=")
            found[name] = value
        return found

    @property
    def body(self) -> str:
        return re.sub(r"^(--\S+\s+)+", "", self.text)

    @property
    def exec_form(self) -> list[str] | None:
        return json.loads(self.body) if self.body.startswith("[") else None


@dataclass
class Stage:
    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


def parse(text: str) -> list[Stage]:
    """The stages of a Dockerfile. Raises ValueError for what this reader does not know (heredocs, other escapes)."""
    stages: list[Stage] = []
    whole, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*#", line) or (not line.strip() and not whole):
            continue
        start = start if whole else number
        whole += line.strip().removesuffix("\\") + " "
        if line.rstrip().endswith("\\"):
            continue
        word, _, rest = whole.strip().partition(" ")
        whole = ""
        if "<<" in rest:
            raise ValueError(f"line {start}: a heredoc, which this reader does not know")
        found = Instruction(word.upper(), rest.strip(), start)
        if found.word == "FROM":
            base, *alias = re.split(r"\s+as\s+", found.body, flags=re.I)
            stages.append(Stage(alias[0] if alias else str(len(stages)), base, [found]))
        elif stages:
            stages[-1].instructions.append(found)
        elif found.word != "ARG":
            raise ValueError(f"line {start}: {found.word} before the first FROM")
    return stages


def lineage(stages: list[Stage], name: str) -> list[Instruction]:
    """All instructions that make a stage, those of the stages it is built upon first."""
    by_name = {stage.name: stage for stage in stages}
    out: list[Instruction] = []
    while name in by_name:
        out = by_name[name].instructions + out
        name = by_name[name].base
    return out


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore keeps a path of the context out: the last pattern that fits it or its folder wins."""
    out = False
    for pattern in patterns:
        if _regex(pattern.removeprefix("!")).fullmatch(path):
            out = not pattern.startswith("!")
    return out


@functools.cache
def _regex(pattern: str) -> re.Pattern:
    regex = re.escape(pattern.strip("/")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*\*", ".*")
    regex = regex.replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    return re.compile(f"{regex}(/.*)?")


def _files(path: Path, root: Path, patterns: list[str]) -> Iterator[Path]:
    """The files of the context in `path`. Folders that no exception looks into are not entered, as Docker does it."""
    inside = path.relative_to(root).as_posix()
    out = path != root and ignored(inside, patterns)
    if path.is_file():
        yield from [] if out else [path]
    elif not out or any(p.startswith((f"!{inside}/", "!**")) for p in patterns):
        for entry in sorted(path.iterdir()):
            yield from _files(entry, root, patterns)


def patterns_of(dockerignore: Path) -> list[str]:
    lines = dockerignore.read_text().splitlines() if dockerignore.exists() else []
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def copied(instruction: Instruction, root: Path, patterns: list[str]) -> tuple[list[Path], list[str]]:
    """(files of the context that a COPY takes, sources of it that give nothing)."""
    words = instruction.exec_form or shlex.split(instruction.body)
    files: list[Path] = []
    nothing: list[str] = []
    for source in words[:-1]:
        found = [root] if source == "." else sorted(root.glob(source.strip("/")))
        inside = [p for f in found for p in _files(f, root, patterns)]
        files += inside
        nothing += [] if inside else [source]
    return files, nothing


def problems(text: str, root: Path) -> list[str]:
    """Everything that is wrong with the Dockerfile `text` whose context is `root`, one line each."""
    return list(_problems(parse(text), root))


def _problems(stages: list[Stage], root: Path) -> Iterator[str]:
    names = [stage.name for stage in stages]
    patterns = patterns_of(root / ".dockerignore")
    for stage in stages:
        earlier = names[: names.index(stage.name)]
        if stage.base not in [*earlier, "scratch"]:
            match = PINNED.fullmatch(stage.base)
            if not match or not any(match.groups()):
                yield f"pin: FROM {stage.base} is no full version; write image:1.2.3 or a digest"
        for instruction in stage.instructions:
            yield from _of_instruction(instruction, names, root, patterns)
    for target in TARGETS:
        if target not in names:
            yield f"target: there is no stage {target}"
            continue
        made_by = lineage(stages, target)
        users = [i.body for i in made_by if i.word == "USER"]
        if not users or users[-1].split(":")[0] in ("root", "0"):
            yield f"user: {target} ends as {users[-1] if users else 'root'}"
        checks = [i.body for i in made_by if i.word == "HEALTHCHECK"]
        if not checks or checks[-1].upper() == "NONE":
            yield f"health: {target} has no HEALTHCHECK"
        if target in TRAINING and not [i for i in made_by if i.word == "VOLUME"]:
            yield f"volume: {target} has no VOLUME for runs"
        if not [i for i in made_by if i.word == "ENTRYPOINT" and i.exec_form]:
            yield f"entrypoint: {target} has no ENTRYPOINT in exec form, so signals would end in a shell"
        if not [i for i in made_by if i.word == "CMD" and i.exec_form]:
            yield f"command: {target} has no CMD in exec form"
        yield from _of_labels(target, made_by)
        yield from _of_size(target, made_by)


def labels(made_by: list[Instruction]) -> dict[str, str]:
    """The last part of the name of each OCI label -> its value as it is written."""
    pairs = [pair.partition("=") for i in made_by if i.word == "LABEL" for pair in shlex.split(i.body)]
    return {key.removeprefix("org.opencontainers.image."): value for key, _, value in pairs}


def _of_labels(target: str, made_by: list[Instruction]) -> Iterator[str]:
    found = labels(made_by)
    yield from (f"label: {target} has no org.opencontainers.image.{name}" for name in LABELS if not found.get(name))
    arguments = {pair.partition("=")[0] for i in made_by if i.word == "ARG" for pair in shlex.split(i.body)}
    for name in ("revision", "source"):
        if name in found and found[name] not in {f"${argument}" for argument in arguments}:
            yield f"label: {target}: {name} is not of this build; give it by an ARG"
    words = [i.word for i in made_by]
    if "ARG" in words and "COPY" in words[words.index("ARG") :]:
        yield f"label: {target}: an ARG before COPY makes the layers behind it anew for each commit"


def _of_size(target: str, made_by: list[Instruction]) -> Iterator[str]:
    """What only builds stays in the stage that builds."""
    for instruction in made_by:
        if instruction.word == "RUN" and re.search(
            r"\bpip3?\b.*\binstall\b|docker/venv\.sh|launch/install\.sh", instruction.body
        ):
            yield f"layers: line {instruction.line}: {target} installs by pip; copy .venv from a stage that did"


def _of_instruction(instruction: Instruction, names: list[str], root: Path, patterns: list[str]) -> Iterator[str]:
    at, body = f"line {instruction.line}", instruction.body
    if instruction.word == "ADD":
        yield f"add: {at}: ADD unpacks and downloads; use COPY"
    if instruction.word == "COPY" and "from" not in instruction.flags:
        yield from (f"copy: {at}: {s} is not in the context" for s in copied(instruction, root, patterns)[1])
    if instruction.word == "COPY" and (source := instruction.flags.get("from")) is not None and source not in names:
        yield f"copy: {at}: there is no stage {source}"
    if instruction.word in ("ARG", "ENV"):
        pairs = shlex.split(body)
        keys = [pair.partition("=")[0] for pair in pairs] if "=" in body or instruction.word == "ARG" else pairs[:1]
        yield from (f"secret: {at}: {key} would stay in the image" for key in keys if SECRET.search(key))
    if instruction.word == "RUN":
        if re.search(r"\b(curl|wget)\b.*\|\s*(sudo\s+)?\S*sh\b|sh\b.*<\(\s*(curl|wget)|\$\((curl|wget)", body):
            yield f"pipe: {at}: runs what it downloads, unseen"
        if re.search(r"\bsudo\b", body):
            yield f"sudo: {at}: an image needs none"
        for command in re.split(r"&&|;|\|\|", body):
            if re.search(r"\bapt(-get)?\b.*\binstall\b", command) and "--no-install-recommends" not in command:
                yield f"apt: {at}: install without --no-install-recommends"
        if re.search(r"\bapt(-get)?\s+(-\S+\s+)*update\b", body) and not re.search(
            r"rm -rf /var/lib/apt/lists/\*", body
        ):
            yield f"apt: {at}: the lists stay in the layer; remove /var/lib/apt/lists/* in the same RUN"
        for command in re.split(r"&&|;|\|\|", body):
            if not re.search(r"\bpip3?\b.*\binstall\b", command):
                continue
            if "--no-cache-dir" not in command:
                yield f"pip: {at}: install without --no-cache-dir"
            if "--require-hashes" not in command and not {"--no-deps", "--no-build-isolation"} <= set(command.split()):
                yield f"hash: {at}: installs what no lock names; --require-hashes, or --no-deps --no-build-isolation"
