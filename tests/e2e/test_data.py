"""Mixture, balance, curriculum, rows left out and augmentation in real runs: the same after a kill and on two ranks."""

import json
import os
import signal
from pathlib import Path

import pytest

import tiny_models
from cards_run import Run, same_numbers

REWARDS = """
def seen(completions, prompts, dataset, n, extra):
    # Rows of even number have no signal; the others pay by what was written.
    return [0.0 if i % 2 == 0 else len(text) / 10 for i, text in zip(n, completions)]

def number(completions, n, **_):
    return [float(i) for i in n]
"""
AUGMENT = """
def fn(row, rng):
    return row | {"prompt": f"{row['prompt']} {['cat', 'dog', 'mat'][rng.integers(3)]}", "extra": int(rng.integers(99))}
"""
NAMES = ("data/epochs", "data/no_signal_frac", "data/rows_left_out", "reward/number/raw")


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    tiny_models.save_model(folder / "model", "gpt2")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "augment.py").write_text(AUGMENT)
    for first, file in ((0, "a"), (10, "b")):
        rows = [
            {"prompt": f"the park {i}", "n": first + i, "kind": "xxy"[i % 3], "level": i % 4, "extra": 0}
            for i in range(10)
        ]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        """
model: {path: model, dtype: float32}
data:
  mixture: {a.jsonl: 2, b.jsonl: 1}
  balance_column: kind
  difficulty_column: level
  curriculum_epochs: 2
  measure_difficulty: true
  skip_solved: 1
  augment: augment.py:fn
  eval_frac: 0.2
rollout: {batch_size: 16, n_samples_per_prompt: 2, chunk_size: 4, max_new_tokens: 8}
rewards:
  seen: {fn: rewards.py:seen}
  number: {fn: rewards.py:number, weight: 0}
ppo: {mini_batch_size: 8, micro_batch_size: 4}
optim: {lr: 0.0001}
log: {trackers: []}
run: {steps: 6, eval_every: 6, save_every: 1, deterministic: true}
"""
    )
    return folder


@pytest.fixture(scope="module")
def whole(task, tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("whole") / "r", config=task / "config.yaml")
    assert run.end(240) == 0, run.words()
    return run


@pytest.mark.slow
def test_rows_without_signal_leave_and_rewards_get_the_dataset(whole):
    rows = whole.rows()
    left = [row["data/rows_left_out"] for row in rows]
    assert left == sorted(left) and left[-1] >= 4 and rows[0]["data/no_signal_frac"] > 0
    assert rows[-1]["data/no_signal_frac"] < rows[0]["data/no_signal_frac"]  # the even ones are gone
    assert "training prompts too" not in whole.words()


@pytest.mark.slow
def test_a_run_that_was_killed_draws_the_same_rows_bit_for_bit(task, whole, tmp_path):
    broken = Run(tmp_path / "r", config=task / "config.yaml")
    broken.wait_for(lambda: len(broken.rows()) >= 3)
    os.kill(broken.pids()["learner"], signal.SIGKILL)
    assert broken.end(60) == 3, broken.words()
    again = Run(tmp_path / "r", config=task / "config.yaml")
    assert again.end(240) == 0, again.words()
    assert again.summary()["resumed_from"] in (2, 3, 4)
    same_numbers(again.rows(), whole.rows())
    for name in ("model.safetensors", "value_head.safetensors"):
        assert (again.folder / "final" / name).read_bytes() == (whole.folder / "final" / name).read_bytes()
    source = (task / "augment.py").read_text()
    try:
        (task / "augment.py").write_text(source.replace("99", "98"))
        other = Run(tmp_path / "r", "--run.steps", "7", config=task / "config.yaml")
        assert other.end(120) == 2 and "data.augment = " in other.words(), other.words()
        assert "its source is not what the run in" in other.words()
    finally:
        (task / "augment.py").write_text(source)


@pytest.mark.slow
def test_two_learner_processes_and_one_worker_draw_the_same_rows(task, whole, tmp_path):
    options = ("--accelerate", "ddp", "--rollout.workers", "1", "--run.deterministic", "false")
    several = Run(tmp_path / "r", *options, config=task / "config.yaml")
    assert several.end(300) == 0, several.words()
    for row, want in zip(several.rows(), whole.rows(), strict=True):
        assert {n: row[n] for n in NAMES} == pytest.approx({n: want[n] for n in NAMES}), row["step"]
