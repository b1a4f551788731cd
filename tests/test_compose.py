"""docker/compose.yaml is one by the specification, keeps to our rules, and each rule refuses a file that breaks it."""

import re
from pathlib import Path

import pytest
import yaml

from compose_rules import problems
from core.config import load
from docker_rules import parse
from launch import arguments

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docker" / "compose.yaml").read_text()
STAGES = parse((ROOT / "docker" / "Dockerfile").read_text())
COMPOSE = yaml.safe_load(TEXT)


def test_the_compose_file_keeps_to_every_rule():
    assert problems(COMPOSE, STAGES) == []


@pytest.mark.parametrize(
    ("rule", "old", "new"),
    [
        ("schema", "cap_drop:", "cap_dorp:"),
        ("schema", "condition: service_healthy", "condition: healthy"),
        ("schema", "volumes:\n  runs: {}", "volumen:\n  runs: {}"),
        ("hardened", "read_only: true", "read_only: false"),
        ("hardened", "cap_drop: [ALL]", "cap_drop: [NET_RAW]"),
        ("hardened", "cap_drop: [ALL]", "cap_drop: [ALL]\n  cap_add: [SYS_ADMIN]"),
        ("hardened", "no-new-privileges:true", "seccomp:unconfined"),
        ("hardened", "init: false", 'user: "0:0"'),
        ("hardened", "init: false", "privileged: true"),
        ("ports", "pids_limit: 256", 'ports: ["8080:8080"]'),
        ("secret", "pids_limit: 256", "environment: {TOKENPPO_REWARD_TOKEN: hunter2}"),
        ("secret", "pids_limit: 256", 'environment: ["HF_TOKEN=hunter2"]'),
        (
            "secret",
            "coverage.options.token_file=/run/secrets/reward_token",
            "coverage.options.token_file=/run/secrets/x",
        ),
        ("secret", "file: ${REWARD_TOKEN_FILE:-./reward_token}", "environment: REWARD_TOKEN"),
        ("undefined", "secrets:\n  reward_token:", "secrets:\n  another:"),
        ("undefined", '["runs:/app/runs"]', '["results:/app/runs"]'),
        ("unused", "volumes:\n  runs: {}", "volumes:\n  runs: {}\n  more: {}"),
        ("volume", "runs:/app/runs", "runs:/elsewhere"),
        ("volume", "tmpfs: [/tmp]", "tmpfs: [/var/tmp]"),
        ("order", "condition: service_healthy", "condition: service_started"),
        ("address", "coverage.fn=http://reward-server:8080", "coverage.fn=http://rewards:8080"),
        ("address", "coverage.fn=http://reward-server:8080", "coverage.fn=http://reward-server:80"),
        ("target", "target: cpu", "target: gpu"),
    ],
)
def test_each_rule_refuses_what_breaks_it(rule, old, new):
    assert old in TEXT
    found = problems(yaml.safe_load(TEXT.replace(old, new)), STAGES)
    assert rule in {problem.split(":")[0] for problem in found}, found


def test_the_learner_is_a_training_on_cards_with_all_rewards_from_the_server(tmp_path):
    command, verb, *words = COMPOSE["services"]["learner"]["command"]
    assert (command, verb) == ("tokenppo", "train")
    args = arguments.parse(words)
    there = load(ROOT / args.config, args.overrides, folder=tmp_path)
    here = load(ROOT / "configs" / "cards.yaml", {}, folder=tmp_path)
    assert {name: reward.weight for name, reward in there.rewards.items()} == {
        name: reward.weight for name, reward in here.rewards.items()
    }
    assert {reward.fn for reward in there.rewards.values()} == {"http://reward-server:8080"}
    shared = re.fullmatch(r"(\d+)gb", COMPOSE["services"]["learner"]["shm_size"])
    assert shared and int(shared[1]) * 1000 >= 1.5 * there.resources.object_store_mb


def test_the_token_of_the_compose_file_stays_out_of_git_and_images():
    assert "docker/reward_token" in (ROOT / ".gitignore").read_text().split()
