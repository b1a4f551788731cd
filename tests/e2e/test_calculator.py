"""Turns in real processes: the calculator is learnt, ids do not depend on the workers, a tool that hangs is named."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cards_run import ROOT, Run
from core.config import load
from core.faults import EnvironmentFault
from core.schema import Config
from core.trajectory import Trajectory
from launch import build, cluster

pytestmark = pytest.mark.slow
CONFIG = ROOT / "configs" / "calculator.yaml"


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """The questions and the base model, as the script of the example makes them."""
    folder = tmp_path_factory.mktemp("calculator") / "task"
    command = [sys.executable, str(ROOT / "examples" / "calculator" / "make.py"), "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


def places(task: Path) -> dict[str, str]:
    names = {"model.path": "base", "data.path": "train.jsonl", "data.eval_path": "heldout.jsonl"}
    return {key: str(task / name) for key, name in names.items()}


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long(seconds=120))])
def test_the_policy_learns_to_call_and_to_copy(seed, task, tmp_path):
    """Sums that no reward component tells: right answers come from right calls, and from results that are copied."""
    options = [word for key, value in places(task).items() for word in (f"--{key}", value)]
    run = Run(tmp_path / "calculator", *options, "--run.seed", str(seed), config=CONFIG)
    assert run.end() == 0, run.words()
    evals, rows = run.summary()["eval"], run.rows()
    assert evals["before"]["accuracy"] < 0.3
    assert evals["after"]["accuracy"] > evals["before"]["accuracy"] + 0.35
    assert rows[-1]["response/turns_mean"] > rows[0]["response/turns_mean"] + 0.2 > 1
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-3)
    assert max(row["logprob_diff/max"] for row in rows) < 1e-4


@pytest.fixture(scope="module")
def cfg(task):
    cfg = load(CONFIG, places(task) | {"rollout.batch_size": 64, "rollout.chunk_size": 16, "ppo.mini_batch_size": 64})
    cluster.prepare_environment()
    with cluster.ray_session(cfg):
        yield cfg


def written(cfg: Config, **rollout: object) -> list[Trajectory]:
    cfg = cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update=rollout)})
    tokenizer = build.load_tokenizer(cfg.model.path)
    prompts, _ = build.prompt_streams(cfg, tokenizer)
    group, rewards = build.rollouts(cfg, tokenizer, "cpu", print), build.reward_client(cfg, None, print)
    try:
        rewards.wait_ready()
        group.wait_ready()
        return rewards.collect(group.start(prompts.take(64), rewards.submit).result()[0])
    finally:
        group.close()
        rewards.close()


def test_tokens_of_the_calculator_are_nobodys_and_ids_do_not_depend_on_the_workers(cfg):
    one, two = written(cfg, workers=1, chunk_size=64), written(cfg, workers=2, chunk_size=16, slots=5)
    tokenizer = build.load_tokenizer(cfg.model.path)
    for a, b in zip(one, two, strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist() and a.action_mask.tolist() == b.action_mask.tolist()
        np.testing.assert_allclose(a.rollout_logprobs, b.rollout_logprobs, atol=1e-5)
    called = [t for t in one if not t.action_mask.all()]
    assert 10 < len(called) < 60
    for t in called:
        text = tokenizer.decode(t.response_ids, skip_special_tokens=True)
        said = [tokenizer.decode(t.response_ids[at : at + 2]) for at in np.flatnonzero(~t.action_mask)[::2]]
        assert said == re.findall(r" result \d+", text)
        assert [int(a) + int(b) for a, b in re.findall(r" calc (\d+) \+ (\d+) result", text)] == [
            int(x.split()[1]) for x in said
        ]
        assert t.action_mask[-1] and not t.rollout_logprobs[~t.action_mask].any()
        assert not any(x[~t.action_mask].any() for x in t.component_rewards.values())
        row = t.request.columns
        right = text.endswith(f" answer {row['a'] + row['b']}")
        assert t.component_rewards["answer"].sum() == (1.0 if right else -1.0)


def test_a_tool_that_hangs_is_named_with_its_sample_within_its_deadline(cfg, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\nclass Slow:\n    def step(self, turns, columns):\n        time.sleep(600)\n"
    )
    began = time.monotonic()
    with pytest.raises(EnvironmentFault, match=r"slow.py:Slow: sample [0-9a-f]{32}, turn 1: no answer within 2 s"):
        written(cfg, environment=f"{tmp_path}/slow.py:Slow", environment_timeout_s=2.0)
    assert time.monotonic() - began < 120  # the start of the workers is most of it


def test_a_run_with_a_tool_that_raises_ends_with_one_line(task, tmp_path):
    (tmp_path / "e.py").write_text("class Broken:\n    def step(self, turns, columns):\n        return columns['c']\n")
    options = [word for key, value in places(task).items() for word in (f"--{key}", value)]
    options += ["--rollout.environment", f"{tmp_path}/e.py:Broken"]
    run = Run(tmp_path / "broken", *options, config=CONFIG)
    assert run.end() == 2, run.words()
    assert "e.py:3, in step)" in json.loads((run.folder / "summary.json").read_text())["error"]
    assert re.search(
        r"tokenppo: rollout.environment = .*e.py:Broken: sample \w{32}, turn 1: raised KeyError: 'c'", run.words()
    )
