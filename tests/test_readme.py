"""What README and docs tell people to type is right: options parse, files exist, code runs."""

import ast
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import documented
from core.config import load
from launch import arguments
from reward_server.components import Component, ScoreRequest

ROOT = Path(__file__).parents[1]
TEXTS = [command.text for command in documented.commands()]


def test_the_collector_knows_a_command_from_a_picture_and_a_sentence():
    assert "bash launch/demo.sh" in TEXTS and "source .venv/bin/activate" in TEXTS
    assert any(text.startswith("tokenppo submit ") for text in TEXTS)
    assert any(text.startswith("docker build ") for text in TEXTS)
    assert "tokenppo eval runs/demo --against base" in TEXTS  # in a sentence
    assert not any("Ray (started" in text or "results:" in text for text in TEXTS)


@pytest.mark.parametrize("command", TEXTS)
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


@pytest.mark.parametrize("page", documented.PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_path_of_one_batch_names_what_is_there():
    """docs/architecture.md: file and function of each stage, as the code has them."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    stages = re.findall(r"^    (\w+/\w+\.py) +([\w.]+) ", page, re.M)
    assert len(stages) > 12
    for file, name in stages:
        tree: ast.AST = ast.parse((ROOT / file).read_text())
        for part in name.split("."):
            defined = [node for node in ast.iter_child_nodes(tree) if getattr(node, "name", None) == part]
            assert defined, f"{file} has no {name}"
            (tree,) = defined


def test_the_reward_of_the_readme_scores_as_it_says():
    (code,) = [block for block in documented.blocks(ROOT / "README.md", "python") if "Span" in block]
    scope: dict = {}
    exec(code, scope)  # noqa: S102
    request = ScoreRequest(
        prompts=["p"],
        completions=["do NOT SHOUT ok"],
        prompt_ids=[[1]],
        completion_ids=[[1]],
        offsets=[np.zeros((1, 2), dtype=np.int64)],
        finish_reasons=["stop"],
        uids=["u"],
        columns={"topic": ["x"]},
    )
    (spans,) = Component("calm", scope["no_shouting"]).begin(request)
    assert [tuple(s) for s in spans] == [(7, 12, -1.0)]
