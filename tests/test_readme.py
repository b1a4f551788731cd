"""What README and docs tell people to type is right: options parse, files exist, code runs."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from core.config import load
from launch import arguments
from reward_server.components import Component, ScoreRequest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """Every indented line, and every line of a shell block, that begins with a command of ours."""
    pages = [re.sub(r"\\\n\s*", "", page.read_text()) for page in PAGES]  # a line that goes on in the next is one
    lines = [line.strip() for page in pages for line in page.splitlines()]
    return [re.sub(r"\s+#.*", "", x) for x in lines if re.match(r"(tokenppo|bash|accelerate launch|python) ", x)]


def test_there_are_commands():
    assert len(commands()) > 8


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_a_command_names_files_and_options_that_exist(command, tmp_path):
    words = shlex.split(command)
    for word in words:
        if re.match(r"(launch|configs|examples|benchmarks|tests|docs)/", word) and not word.endswith(".png"):
            file = word.split(":")[0]  # a reward is file.py:function
            assert (ROOT / file).exists(), f"{file} does not exist"
    if "train" in words or "launch.train" in words:
        start = words.index("train" if "train" in words else "launch.train") + 1
        args = arguments.parse(words[start:])
        if not args.help:
            config = ROOT / args.config if args.config else None
            load(config, args.overrides, folder=tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_reward_of_the_readme_scores_as_it_says():
    (code,) = [b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "Span" in b]
    scope: dict = {}
    exec(code, scope)  # noqa: S102
    request = ScoreRequest(
        prompts=["p"],
        completions=["do NOT SHOUT ok"],
        completion_ids=[[1]],
        offsets=[np.zeros((1, 2), dtype=np.int64)],
        finish_reasons=["stop"],
        uids=["u"],
        columns={"topic": ["x"]},
    )
    (spans,) = Component("calm", scope["no_shouting"]).score(request)
    assert [tuple(s) for s in spans] == [(7, 12, -1.0)]
