"""What README, AGENTS.md and docs/ tell people to type, collected from the pages themselves."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = ("indented", "", "sh", "bash", "console", "shell")
_COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:tokenppo|bash|accelerate launch|python|source|docker|sbatch|ray|pip|curl)(?: |$)"
)
_INLINE = re.compile(r"`((?:tokenppo|bash|accelerate launch|python|source|docker|sbatch) [^`]+)`")

# What a sentence names without the arguments that it would be run with.
MENTIONS = {
    *("tokenppo train", "tokenppo replay", "tokenppo eval", "tokenppo submit"),
    *("tokenppo submit slurm", "tokenppo submit ray", "tokenppo submit k8s", "tokenppo sweep"),
    *("tokenppo check-reward", "tokenppo watch", "tokenppo health"),
    *("tokenppo train --config", "accelerate launch -m launch.train"),
    *("docker run", "docker build", "docker stop", "docker ps", "docker run --shm-size"),
}


@dataclass(frozen=True)
class Command:
    page: str
    text: str  # on one line, without the remark behind it


def commands() -> list[Command]:
    """Commands of all pages in the order of the pages, each text once: lines of blocks, and those in a sentence."""
    found: dict[str, Command] = {}
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        for text in _of_page(re.sub(r"\\\n\s*", "", page.read_text())):
            if text not in MENTIONS:
                found.setdefault(text, Command(name, text))
    return list(found.values())


def _of_page(page: str) -> list[str]:
    found: list[str] = []
    for kind, lines in _parts(page):
        if kind == "text":
            found += [text for line in lines for text in _INLINE.findall(line)]
        elif kind in SHELL and not any("+--" in line for line in lines):  # with boxes it is a picture
            found += [re.sub(r"\s+#.*", "", line) for line in lines if _COMMAND.match(line)]
    return found


def _parts(page: str) -> list[tuple[str, list[str]]]:
    """Runs of lines of one kind: `text`, `indented` by four columns after a blank line, or the language of a fence."""
    parts: list[tuple[str, list[str]]] = [("text", [])]
    fence = None
    for line in page.splitlines():
        if line.startswith("```"):
            fence = None if fence is not None else line[3:].strip()
            parts.append(("text" if fence is None else fence, []))
            continue
        kind, lines = parts[-1]
        if fence is None and line:
            wanted = (
                "indented" if line.startswith("    ") and (kind == "indented" or not lines or not lines[-1]) else "text"
            )
            if wanted != kind:
                parts.append((wanted, []))
        parts[-1][1].append(line.strip())
    return parts


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)
