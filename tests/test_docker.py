"""The Dockerfile keeps to its rules, and each rule refuses a Dockerfile that breaks it."""

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from docker_rules import TARGETS, copied, ignored, labels, lineage, parse, patterns_of, problems
from launch import verbs

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docker" / "Dockerfile").read_text()
PATTERNS = patterns_of(ROOT / ".dockerignore")
LABELS = "LABEL " + " ".join(
    f'org.opencontainers.image.{n}="x"' for n in ("title", "description", "licenses", "version")
)
TAIL = f"""VOLUME /runs
USER 10001
HEALTHCHECK CMD ["true"]
ENTRYPOINT ["tini", "--"]
CMD ["true"]
ARG REVISION SOURCE
{LABELS} org.opencontainers.image.revision="$REVISION" org.opencontainers.image.source="$SOURCE"
"""
GOOD = f"""# a comment
FROM python:3.11.14-slim AS system
RUN apt-get update \\
    # inside
    && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
FROM system AS builder
RUN pip install --no-cache-dir --require-hashes -r x
FROM system AS cpu
COPY app.py .
RUN true
{TAIL}
FROM nvidia/cuda:12.8.1-base AS cuda
COPY --from=system /x /x
{TAIL}
FROM system AS reward-server
{TAIL.replace("VOLUME /runs", "")}"""


def test_the_dockerfile_keeps_to_every_rule():
    assert problems(TEXT, ROOT) == []


@pytest.fixture
def context(tmp_path) -> Path:
    (tmp_path / "app.py").write_text("")
    (tmp_path / "kept_out.txt").write_text("")
    (tmp_path / ".dockerignore").write_text("kept_out.txt\n")
    return tmp_path


def test_the_small_good_one_has_no_problem(context):
    assert problems(GOOD, context) == []


@pytest.mark.parametrize(
    ("rule", "old", "new"),
    [
        ("pin", "python:3.11.14-slim", "python"),
        ("pin", "python:3.11.14-slim", "python:latest"),
        ("pin", "python:3.11.14-slim", "python:3.11-slim"),
        ("pin", "python:3.11.14-slim", "registry:5000/python"),
        ("pin", "FROM system AS cpu", "FROM later AS cpu"),
        ("target", "AS cuda", "AS gpu"),
        ("target", "AS cpu", "AS gpu"),
        ("user", "USER 10001", "USER root"),
        ("user", "USER 10001", "USER 0:0"),
        ("user", "USER 10001", "USER 10001\nUSER root"),
        ("user", "USER 10001\n", ""),
        ("health", 'HEALTHCHECK CMD ["true"]\n', ""),
        ("health", 'HEALTHCHECK CMD ["true"]', "HEALTHCHECK NONE"),
        ("volume", "VOLUME /runs\n", ""),
        ("entrypoint", 'ENTRYPOINT ["tini", "--"]', "ENTRYPOINT tini --"),
        ("add", "COPY app.py .", "ADD https://example.org/app.py ."),
        ("copy", "COPY app.py .", "COPY absent.py ."),
        ("copy", "COPY app.py .", "COPY kept_out.txt ."),
        ("copy", "--from=system", "--from=sistem"),
        ("secret", "COPY app.py .", "ARG HF_TOKEN"),
        ("secret", "COPY app.py .", "ENV A=1 WANDB_API_KEY=x"),
        ("secret", "COPY app.py .", "ENV DB_PASSWORD hunter2"),
        ("pipe", "RUN true", "RUN curl -s https://example.org/x | bash"),
        ("pipe", "RUN true", "RUN bash <(wget -O- https://example.org/x)"),
        ("sudo", "RUN true", "RUN sudo true"),
        ("apt", " --no-install-recommends", ""),
        ("apt", " && rm -rf /var/lib/apt/lists/*", ""),
        ("apt", " && rm -rf /var/lib/apt/lists/*", "\nRUN rm -rf /var/lib/apt/lists/*"),
        ("pip", "--no-cache-dir ", ""),
        ("hash", "--require-hashes ", ""),
        ("hash", "--require-hashes ", "--no-deps "),
        ("layers", "RUN true", "RUN pip install --no-cache-dir --require-hashes -r x"),
        ("layers", "RUN true", "RUN bash docker/venv.sh docker/cpu.lock"),
        ("command", 'CMD ["true"]\nARG', "CMD true\nARG"),
        ("label", "org.opencontainers.image.licenses", "licences"),
        ("label", '"$REVISION"', '"1234abc"'),
        ("label", '"$SOURCE"', '"https://example.org"'),
        ("label", "COPY app.py .", "ARG X\nCOPY app.py ."),
        ("target", "AS reward-server", "AS rewards"),
    ],
)
def test_each_rule_refuses_what_breaks_it(context, rule, old, new):
    assert old in GOOD
    found = problems(GOOD.replace(old, new), context)
    assert found and {problem.split(":")[0] for problem in found} == {rule}, found


def test_a_digest_is_a_pin(context):
    assert problems(GOOD.replace("python:3.11.14-slim", f"python@sha256:{'0' * 64}"), context) == []


@pytest.mark.parametrize("text", ["RUN true\n", "FROM a:1.2.3\nRUN <<EOF\ntrue\nEOF\n"])
def test_what_the_reader_does_not_know_is_no_pass(text):
    with pytest.raises(ValueError, match="line"):
        parse(text)


@pytest.mark.parametrize(
    ("path", "patterns", "out"),
    [
        ("a/b.py", ["a"], True),
        ("a/b.py", ["*.py"], False),
        ("a/b.py", ["**/*.py"], True),
        ("b.py", ["**/*.py"], True),
        ("a/__pycache__/x", ["*", "!a", "**/__pycache__"], True),
        ("a/x", ["*", "!a"], False),
        ("ab/x", ["*", "!a"], True),
        ("a/x", ["!a", "*"], True),
    ],
)
def test_the_last_pattern_that_fits_decides(path, patterns, out):
    assert ignored(path, patterns) is out


@pytest.mark.parametrize(
    "path",
    [".git/config", ".venv/bin/python", "runs/demo/metrics.jsonl", "core/__pycache__/x.pyc", ".ruff_cache/x"]
    + ["tests/test_ppo.py", ".env", "launch/.env", "id.pem", "launch/tls.key", "wandb/run", "notes.txt"],
)
def test_what_has_no_place_in_an_image_stays_out(path):
    assert ignored(path, PATTERNS)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_holds_every_file_that_the_command_and_the_demo_read(target):
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("which files are ours is git's to say, and there is no git, or no repository, here")
    (copy,) = [i for i in lineage(parse(TEXT), target) if i.word == "COPY" and "from" not in i.flags]
    inside = {p.relative_to(ROOT).as_posix() for p in copied(copy, ROOT, PATTERNS)[0]}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout.split()
    ours = ("core/", "trainer/", "rollout/", "reward_server/", "launch/", "configs/", "examples/")
    wanted = [name for name in tracked if name.startswith(ours)]
    assert "pyproject.toml" in inside and not [name for name in wanted if name not in inside]
    assert not [name for name in inside if name.startswith(("tests/", "docs/", "."))]


@pytest.mark.parametrize("target", TARGETS)
def test_labels_say_what_pyproject_says(target):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = labels(lineage(parse(TEXT), target))
    assert (found["version"], found["licenses"]) == (project["version"], project["license"])


def test_the_reward_server_asks_for_a_token_where_others_reach_it():
    (command,) = [i.exec_form for i in lineage(parse(TEXT), "reward-server") if i.word == "CMD"]
    verb, args = verbs.parse(command[1:])
    assert command[0] == "tokenppo" and verb.name == "serve-reward" and args.host == "0.0.0.0"
    assert args.token_file.startswith("/run/secrets/")
    health = [i.body for i in lineage(parse(TEXT), "reward-server") if i.word == "HEALTHCHECK"][0]
    assert f"'127.0.0.1', {args.port}," in health and "'/healthz'" in health
    made_by = lineage(parse(TEXT), "reward-server")
    assert not [i for i in made_by if "g++" in i.body], "a compiler has no work in it"
    assert not [i for i in made_by if i.word == "COPY" and i.body == ". ."], "nor have weights and data of examples"


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_targets_are_made_alike(target):
    """What concerns a user of the image is the same in both: user, volume, health, entry point."""
    words = ("USER", "VOLUME", "HEALTHCHECK", "ENTRYPOINT", "WORKDIR")
    here, there = ([(i.word, i.text) for i in lineage(parse(TEXT), t) if i.word in words] for t in (target, "cpu"))
    assert here == there and ("USER", "10001:10001") in here
    (check,) = (text for word, text in here if word == "HEALTHCHECK")
    assert check.endswith('CMD ["tokenppo", "health"]')
