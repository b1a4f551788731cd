"""`tokenppo replay` on a run of the command itself: cards, a worker, a reward server, checkpoints, the ledger."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import replay_run as made
from cards_run import Run
from core import ledger_table
from launch.replay import replay_run

SMALL = {
    "run.steps": 3,
    "run.save_every": 1,
    "run.keep_checkpoints": 3,
    "log.ledger": 1,
    "log.trackers": "[]",
    "data.eval_prompts": 4,
    "rollout.batch_size": 32,
    "rollout.chunk_size": 8,
    "rollout.max_new_tokens": 24,
    "rollout.workers": 1,
    "rewards.consistency.normalize": "running",
    "ppo.mini_batch_size": 8,
    "ppo.micro_batch_size": 8,
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    options = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    run = Run(tmp_path_factory.mktemp("cards") / "r", "--run.deterministic", *options)
    assert run.end(500) == 0, run.words()
    return run.folder


@pytest.fixture(scope="module", autouse=True)
def torch_as_it_was():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def by_name(text: str) -> dict:
    said = json.loads(text)
    return said | {s["name"]: s for s in said["stages"]}


def replayed(run: Path, step: int, code: int) -> dict:
    """By the command, in a process of its own."""
    command = [str(Path(sys.executable).parent / "tokenppo"), "replay", str(run), "--step", str(step), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return by_name(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("step", [1, 3])
def test_an_untouched_step_of_a_run_is_equal_in_every_bit(step, recorded):
    said = replayed(recorded, step, 0)
    assert [s["verdict"] for s in said["stages"]] == ["equal"] * 8, said
    assert said["why_not_exact"] is None and said["losses and gradients"]["compared"] > 1000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_log_probs_and_values_of_workers_are_those_of_the_learners_own_forward(tmp_path):
    """With `rollout.emit_values` a step takes what workers gave; all that was made of it is equal in every bit."""
    options = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    more = ["--run.deterministic", "--rollout.emit_values", "true", "--ppo.bootstrap_cut", "true", "--run.steps", "2"]
    run = Run(tmp_path / "r", *options, *more)
    assert run.end(500) == 0, run.words()
    for row in run.rows():
        assert row["logprob_diff/max"] < 1e-4 and 0 <= row["value/diff_mean"] <= row["value/diff_max"] < 1e-3
    assert run.rows()[1]["value/diff_max"] > 0  # in the first step all values are 0
    rows = [row for table in ledger_table.read(run.folder, 2)[:1] for row in table.to_pylist()]
    assert all(row["values"] == row["rollout_values"] for row in rows)
    cut = [row["bootstrap_value"] for row in rows if row["finish_reason"] == "length"]
    assert cut and all(cut)
    said = replayed(run.folder, 2, 0)
    verdicts = {s["name"]: s["verdict"] for s in said["stages"]}
    assert verdicts.pop("log-probs and values") == "within tolerance" and set(verdicts.values()) == {"equal"}, said
    assert 0 < said["log-probs and values"]["largest"] < 1e-4 and said["why_not_exact"] is None


def one_reward(run: Path) -> None:
    def change(rows):
        dict(rows[7]["component_rewards"])["consistency"][2] += 1.0

    made.edit_ledger(run, 3, change)


CHANGES = {
    "reward": (one_reward, "rewards", "consistency"),
    "weight of the policy": (
        lambda run: made.edit_tensors(run, 2, made.move_one_weight),
        "log-probs and values",
        "old_logprobs",
    ),
    "byte of the checkpoint": (
        lambda run: made.edit_tensors(run, 2, made.move_one_weight, sealed=False),
        "inputs",
        "checkpoint step-2",
    ),
    "weight of a component": (
        lambda run: made.edit_config(run, "rewards.quality.weight", 1.5),
        "inputs",
        "rewards.quality.weight",
    ),
    "seed": (lambda run: made.edit_config(run, "run.seed", 1), "inputs", "run.seed"),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("changed", list(CHANGES))
def test_one_change_in_a_copy_names_the_stage(changed, recorded, tmp_path, capsys):
    change, stage, what = CHANGES[changed]
    run = shutil.copytree(recorded, tmp_path / "copy")
    change(run)
    if changed == "reward":
        said = replayed(run, 3, 5)
    else:
        capsys.readouterr()
        assert replay_run(run, 3, as_json=True) == 5
        said = by_name(capsys.readouterr().out)
    assert (said["first_differing"], said[stage]["first"]["what"]) == (stage, what), said
    if changed == "reward":
        uid = ledger_table.read(run, 3)[0]["sample_uid"][7].as_py()
        assert (said[stage]["first"]["uid"], said[stage]["first"]["token"]) == (uid, 2)
        assert said["losses and gradients"]["verdict"] == said["weights"]["verdict"] == "equal"
    if changed in ("weight of a component", "seed"):
        later = {"weight of a component": "weighted rewards", "seed": "losses and gradients"}[changed]
        assert said[later]["verdict"] == "differs" and said["rewards"]["verdict"] == "equal"
