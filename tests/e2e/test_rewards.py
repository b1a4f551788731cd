"""Reward functions that this project has never seen, named on the command line, in real runs."""

import json
from pathlib import Path

import pytest

import tiny_models
from cards_run import Run

pytestmark = pytest.mark.slow

UNSEEN = """
import asyncio
from tokenppo import Span

def trl_style(prompts, completions, completion_ids, **kwargs):
    return [float(len(set(text))) for text in completions]

def spans(completions, offsets, **_):
    return [[Span(i, i + 1, 0.1) for i, c in enumerate(text) if c in "aeiou"] for text in completions]

async def asked_elsewhere(completions, topic):
    await asyncio.sleep(0.01)
    return [-0.01 * len(text) for text in completions]

def for_some(completions, topic, **_):
    return [1.0 if t == "x" else None for t in topic]

class Stateful:
    def setup(self, device):
        assert device == "cpu"
        self.bonus = 0.25
    def score(self, batch):
        return [[self.bonus] * len(ids) for ids in batch.completion_ids]
    def close(self):
        open(__file__ + ".closed", "w").close()

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(ground_truth in solution_str)}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unseen")
    tiny_models.save_model(folder / "model", "gpt2")
    (folder / "theirs.py").write_text(UNSEEN)
    rows = [
        {"prompt": f"the {w} sat", "topic": "xy"[i % 2], "ground_truth": "a"} for i, w in enumerate(["cat", "dog"] * 4)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text("""
model: {path: model, dtype: float32}
data: {path: prompts.jsonl, eval_path: prompts.jsonl, eval_prompts: 4}
rollout: {workers: 1, batch_size: 8, chunk_size: 4, max_new_tokens: 8}
rewards:
  Stateful: {fn: theirs.py:Stateful, weight: {0: 1.0, 4: 0.0}}
  safe: {fn: theirs.py:trl_style, weight: 0.5, at_least: 100.0, multiplier_lr: 0.01}
ppo: {mini_batch_size: 4, micro_batch_size: 4}
resources: {reward_servers: 2, reward_batch_size: 8}
run: {steps: 2, save_every: 1}
""")
    return folder


def test_a_component_that_cannot_be_set_up_ends_the_run_with_2_and_its_words(folder):
    (folder / "late.py").write_text(
        "class Late:\n"
        "    def setup(self, device):\n        raise OSError('no weights in nowhere')\n"
        "    def score(self, batch):\n        return [0.0] * len(batch)\n"
    )
    run = Run(folder / "runs" / "late", "--reward", f"{folder}/late.py:Late=1", config=folder / "config.yaml")
    assert run.end(300) == 2, run.words()
    last = run.words().splitlines()[-1]
    assert last.startswith("tokenppo: rewards.Late: Late.setup('cpu') raised OSError: no weights in nowhere"), (
        run.words()
    )
    assert "Traceback" not in run.words()


def test_a_file_that_nobody_has_seen_is_paid_for_from_the_command_line(folder):
    names = ["trl_style=0.5", "spans=2", "asked_elsewhere=1", "for_some"]
    options = [word for name in names for word in ("--reward", f"{folder}/theirs.py:{name}")]
    options += ["--reward", f"verl:{folder}/theirs.py:compute_score=0.3"]
    run = Run(folder / "runs" / "r", *options, config=folder / "config.yaml")
    assert run.end(300) == 0, run.words()
    rows = run.rows()
    weights = {"trl_style": 0.5, "spans": 2, "asked_elsewhere": 1, "for_some": 1, "compute_score": 0.3}
    for row in rows:
        assert {name: row[f"reward/{name}/weight"] for name in weights} == weights
        parts = [row[f"reward/{name}/weighted"] for name in [*weights, "Stateful", "safe"]]
        assert sum(parts) == pytest.approx(row["reward/total"], abs=1e-4)
        assert row["reward/for_some/raw"] == 1.0  # of those it applies to
        shares = [value for name, value in row.items() if name.endswith("/variance_share")]
        assert sum(shares) == pytest.approx(1.0, abs=1e-6) and len(shares) == 7
    # A schedule from 1 to 0 over four steps; a multiplier that rises while its mean is far below 100.
    assert [row["reward/Stateful/weight"] for row in rows] == [0.75, 0.5]
    first, second = (row["reward/safe/weight"] for row in rows)
    assert first == 0.5 and second == pytest.approx(0.5 + 0.01 * (100 - rows[0]["reward/safe/raw"]))
    state = json.loads((folder / "runs" / "r" / "checkpoints" / "step-2" / "state.json").read_text())
    third = second + 0.01 * (100 - rows[1]["reward/safe/raw"])
    assert state["train"]["multipliers"] == {"safe": pytest.approx(third)}
    assert len([name for name in run.pids() if name.startswith("reward-server")]) == 2
    assert (folder / "theirs.py.closed").exists()


def test_the_reference_may_come_with_the_rewards(folder):
    """The same KL as with a copy in the learner, step by step; the fluency component reads the same model."""
    kl = {}
    for kind in ("copy", "reward_server"):
        options = ["--model.reference", kind, "--optim.lr", "1e-3", "--rollout.temperature", "0.9"]
        options += ["--reward", "reward_server.library.models:Fluency=0.1", "--rewards.Fluency.options.model"]
        run = Run(folder / "runs" / kind, *options, str(folder / "model"), config=folder / "config.yaml")
        assert run.end(300) == 0, run.words()
        kl[kind] = [row["objective/kl"] for row in run.rows()]
    assert kl["reward_server"] == pytest.approx(kl["copy"], abs=1e-3) and abs(kl["copy"][1]) > 1e-3
