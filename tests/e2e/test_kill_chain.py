"""One run that is killed again and again, after every step and inside its checkpoints, ends as one that never was.

Compared bit for bit: the rows of metrics.jsonl, the exported weights, parameters, moments of AdamW and the state of
torch's random numbers in the last checkpoint, all else that is in it, and which samples each step was trained on.
"""

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from test_command import REWARDS

import tiny_models
from cards_run import Run, same_numbers
from core.config import load
from launch import trained

STEPS = 13


def inside(*steps: int) -> dict[int, tuple[str, str]]:
    """Step -> what its process is about to do when it is killed; each leaves another state behind. After the other
    steps it is killed from outside, as soon as the row of the step is there."""
    a, b, c, d = steps
    return {
        a: ("os.fsync", f"/.step-{a}.new/learner/model.safetensors"),  # the engine's files are there, no manifest is
        b: ("open", f"/.step-{b}.new/manifest.json"),
        c: ("os.rename", f"/.step-{c}.new"),  # whole, but not under its name
        d: ("os.rename", f"/checkpoints/step-{d - 2}"),  # it is the newest; the oldest is about to be deleted
    }


# As Python's site module starts it in every process of a run whose PYTHONPATH has its folder.
SITECUSTOMIZE = """
import os, signal, sys

event, place = os.environ["KILL_BEFORE"].split(" ", 1)
fsync = os.fsync

def hook(name, args):
    if name == event and isinstance(args[0], (str, os.PathLike)) and os.fspath(args[0]).endswith(place):
        os.kill(os.getpid(), signal.SIGKILL)

def watched(descriptor):
    hook("os.fsync", (os.readlink(f"/proc/self/fd/{descriptor}"),))
    fsync(descriptor)

os.fsync = watched
sys.addaudithook(hook)
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    tiny_models.save_model(folder / "model", "gpt2")
    (folder / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"the {w} sat", "topic": "xy"[i % 2]} for i, w in enumerate(["cat", "dog", "mat", "park"] * 3)]
    for file in ("prompts.jsonl", "held_out.jsonl"):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        f"""
model: {{path: model, dtype: float32}}
data: {{path: prompts.jsonl, eval_path: held_out.jsonl, eval_prompts: 4}}
rollout: {{workers: 1, batch_size: 8, n_samples_per_prompt: 2, chunk_size: 4, max_new_tokens: 6}}
rewards:
  vowels: {{fn: rewards.py:vowels, normalize: running}}
  brevity: {{fn: rewards.py:brevity, weight: 0.5, options: {{scale: 0.01}}}}
ppo: {{mini_batch_size: 4, micro_batch_size: 4, target_kl: 0.5, kl_horizon: 64}}
optim: {{lr: 0.001, warmup_frac: 0.2, schedule: cosine}}
log: {{trackers: []}}
run: {{steps: {STEPS}, eval_every: 5, save_every: 1, deterministic: true, patience: 9}}
"""
    )
    return folder


def start(task: Path, folder: Path, *options: str) -> Run:
    return Run(folder, *options, config=task / "config.yaml")


def killed_after_row(run: Run, step: int) -> None:
    """SIGKILL to the learner as soon as the row of `step` is there; rows that its forerunner left do not count."""

    def its_own_row() -> bool:
        at_work = (run.folder / "processes.json").exists() and run.pids()["learner"] in {p.pid for p in run.family()}
        return at_work and len(run.rows()) >= step

    run.wait_for(its_own_row)
    family = run.family()
    os.kill(run.pids()["learner"], signal.SIGKILL)
    assert run.end(120) == 3 and "died without a word" in run.words(), run.words()
    left = psutil.wait_procs(family, timeout=30)[1]
    assert not [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], left


def patched(patch: pytest.MonkeyPatch, folder: Path, event: str, place: str) -> None:
    """From now on the process of a run that does `event` to a path that ends with `place` is killed in front of it."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    path = os.pathsep.join(filter(None, [str(folder / "site"), os.environ.get("PYTHONPATH")]))
    patch.setenv("PYTHONPATH", path)
    patch.setenv("KILL_BEFORE", f"{event} {place}")


def same(a: Any, b: Any) -> bool:
    """Two trees of what torch.load gives, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("kills", "within"),
    [(6, inside(3, 4, 5, 6)), pytest.param(12, inside(3, 6, 9, 12), marks=pytest.mark.long(seconds=700))],
    ids=["6", "12"],
)
def test_killed_after_every_step_and_inside_checkpoints_a_run_ends_bit_for_bit_as_an_undisturbed_one(
    kills, within, task, tmp_path, monkeypatch
):
    """Once after each of the first `kills` steps, or inside the checkpoint of it."""
    whole = start(task, tmp_path / "whole" / "r")
    assert whole.end(240) == 0, whole.words()

    folder = tmp_path / "broken" / "r"
    for step in range(1, kills + 1):
        if step in within:
            found = {p.name for p in (folder / "checkpoints").iterdir()}
            with monkeypatch.context() as patch:
                patched(patch, tmp_path, *within[step])
                run = start(task, folder)
                assert run.end(240) == 3 and "died without a word" in run.words(), run.words()
            there = {p.name for p in (folder / "checkpoints").iterdir()}
            last = f"step-{step}" if step == kills else f".step-{step}.new"
            # Its forerunner may have been killed between a new checkpoint and the deletion of the oldest.
            undeleted = found & {f"step-{step - 3}"} if f"step-{step - 1}" in found else set()
            assert there == {f"step-{step - 2}", f"step-{step - 1}", last} | undeleted
            assert len(run.rows()) == step
            continue
        run = start(task, folder)
        killed_after_row(run, step)

    again = start(task, folder, "--run.resume", "must")
    assert again.end(240) == 0, again.words()
    assert again.summary()["resumed_from"] == kills  # the checkpoint that it died behind counts
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {f"step-{STEPS - 1}", f"step-{STEPS}"}

    same_numbers(again.rows(), whole.rows())
    last = [run.folder / "checkpoints" / f"step-{STEPS}" for run in (whole, again)]
    models = [load_file(place / "learner" / "model.safetensors") for place in last]
    assert same(*models) and len(models[0]) > 10
    assert same(*(torch.load(place / "learner" / "optimizer.bin") for place in last))
    # Python's and NumPy's own generators are nobody's: no run seeds or asks them, so any two processes differ in them.
    generators = [torch.load(place / "learner" / "random_states_0.pkl", weights_only=False) for place in last]
    assert generators[0]["torch_manual_seed"].equal(generators[1]["torch_manual_seed"])
    states = [json.loads((place / "state.json").read_text()) for place in last]
    for key in ("step", "train", "prompts", "stopping", "trained", "eval", "reference", "inputs"):
        assert states[0][key] == states[1][key], key
    for part in ("final", "best"):
        for name in ("model.safetensors", "value_head.safetensors"):
            assert (whole.folder / part / name).read_bytes() == (folder / part / name).read_bytes(), f"{part}/{name}"

    uids = [trained.uids_by_step(run.folder) for run in (whole, again)]
    assert uids[0] == uids[1] and list(uids[0]) == list(range(1, STEPS + 1))
    each = Counter(uid for of_step in uids[1].values() for uid in of_step)
    assert set(each.values()) == {1} and len(each) == 8 * STEPS == states[1]["trained"]["samples"]


@pytest.mark.slow
def test_patience_is_exact_over_a_resume_and_a_stopped_run_is_finished(task, tmp_path, monkeypatch):
    """A reward that no longer improves; killed between the best evaluation and the end that patience makes, and again
    between the checkpoint of that end and the last weights."""
    options = (
        "--run.eval_every",
        "1",
        "--run.patience",
        "3",
        "--optim.lr",
        "1e-12",
        "--run.best_metric",
        "-reward/total",
    )
    whole = start(task, tmp_path / "whole" / "r", *options)
    assert whole.end(240) == 0, whole.words()
    summary = whole.summary()
    stopped_at = summary["steps"]
    assert summary["stopped"] == "patience" and summary["limit"] == 3 and 4 <= stopped_at < STEPS
    assert summary["eval"]["best"]["step"] == stopped_at - 3 and (whole.folder / "final" / "config.json").exists()
    assert "by run.patience = 3" in whole.words()
    assert (whole.folder / "checkpoints" / f"step-{stopped_at}").is_dir()

    broken = start(task, tmp_path / "broken" / "r", *options)
    killed_after_row(broken, stopped_at - 1)
    with monkeypatch.context() as patch:
        patched(patch, tmp_path, "os.mkdir", "/.final.new")
        at_the_end = start(task, tmp_path / "broken" / "r", *options)
        assert at_the_end.end(240) == 3, at_the_end.words()
    assert not (tmp_path / "broken" / "r" / "final").exists()
    again = start(task, tmp_path / "broken" / "r", *options)
    assert again.end(240) == 0, again.words()
    same_numbers(again.rows(), whole.rows())
    assert again.summary()["stopped"] == "patience" and again.summary()["eval"] == summary["eval"]

    once_more = start(task, tmp_path / "broken" / "r", *options)
    assert once_more.end(60) == 0 and "raise --run.patience" in once_more.words(), once_more.words()


@pytest.mark.slow
def test_kl_above_its_bound_ends_two_learner_processes_together(task, tmp_path):
    """The bound is met by the first step that has any KL at all; both ranks end, and neither hangs."""
    run = start(task, tmp_path / "r", "--accelerate", "ddp", "--run.max_kl", "1e-9", "--optim.lr", "0.01")
    assert run.end(240) == 0, run.words()
    summary, rows = run.summary(), run.rows()
    assert summary["stopped"] == "max_kl" and summary["limit"] == 1e-9 and summary["steps"] == len(rows) < STEPS
    assert rows[-1]["objective/kl"] > 1e-9 and not any(row["objective/kl"] > 1e-9 for row in rows[:-1])
    uids = trained.uids_by_step(run.folder)
    assert [len(of_step) for of_step in uids.values()] == [8] * len(rows)  # of both ranks
    assert load(run.folder / "config.yaml").run.max_kl == 1e-9
