"""Sweeps as they are typed: trials side by side in folders of their own, failures named, the same command goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_command import REWARDS

import tiny_models

SCALE = "rewards.brevity.options.scale"


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    pytest.importorskip("ray.tune", reason="wants the extra tune")
    folder = tmp_path_factory.mktemp("task")
    tiny_models.save_model(folder / "model", "gpt2")
    (folder / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"the {word} sat"} for word in ["cat", "dog", "mat", "park"] * 2]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        """
model: {path: model, dtype: float32}
data: {path: prompts.jsonl, eval_path: prompts.jsonl, eval_prompts: 4}
rollout: {workers: 1, batch_size: 8, n_samples_per_prompt: 2, chunk_size: 4, max_new_tokens: 6}
rewards:
  vowels: {fn: rewards.py:vowels}
  brevity: {fn: rewards.py:brevity, weight: 0.5, options: {scale: 0.01}}
ppo: {mini_batch_size: 8, micro_batch_size: 8}
run: {steps: 1, deterministic: true}
log: {trackers: [], ledger: 0}
"""
    )
    return folder


def command(task: Path, grid: str, *options: str) -> list[str]:
    words = [str(Path(sys.executable).parent / "tokenppo"), "sweep", "--config", "config.yaml", "--grid", grid]
    return [*words, "-o", "out", *options]


def folder_of(task: Path, value: str) -> Path:
    return task / "out" / f"{SCALE}-{value}"


@pytest.mark.slow
def test_a_failing_trial_ends_no_other_and_a_larger_grid_trains_what_is_new(task):
    """In the folder of the task, with relative paths, as one would."""
    first = subprocess.run(
        command(task, f"{SCALE}=boom,0.01", "--jobs", "2"), cwd=task, capture_output=True, text=True, timeout=300
    )
    assert first.returncode == 4, first.stdout + first.stderr
    said = first.stderr.splitlines()  # ours alone, whatever Ray and Tune have to say
    assert len(said) == 5 and all(line.split(": ")[0].startswith((SCALE, str(task))) for line in said), first.stderr
    lines = first.stdout.splitlines()
    assert lines[0].split() == [SCALE, "eval/reward/total", "best", "steps", "seconds"]
    assert lines[1].split()[0] == "0.01" and lines[1].split()[3] == "1" and len(lines) == 3
    assert lines[2].split()[0] == "boom" and "exit 4: " in lines[2] and "brevity" in lines[2]
    done = (folder_of(task, "0.01") / "summary.json").read_bytes()

    again = subprocess.run(
        command(task, f"{SCALE}=0.01,0.02", "--json"), cwd=task, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "2 trials, 1 finished already" in again.stderr and again.stderr.count(": begins") == 1
    told = json.loads(again.stdout)
    assert told == json.loads((task / "out" / "sweep.json").read_text())
    assert [trial["exit"] for trial in told["trials"]] == [0, 0] and told["metric"] == "eval/reward/total"
    assert (folder_of(task, "0.01") / "summary.json").read_bytes() == done
    for trial in told["trials"]:  # each was trained with the settings that it is told with
        rows = [json.loads(row) for row in (task / "out" / trial["name"] / "metrics.jsonl").read_text().splitlines()]
        row = rows[-1]
        assert trial["last"] == row["eval/reward/total"] and trial["steps"] == 1
        scale = float(trial["settings"][SCALE])
        assert row["reward/brevity/raw"] == pytest.approx(-scale * row["response/length_mean"])
    assert told["trials"][0]["last"] >= told["trials"][1]["last"]


@pytest.mark.slow
def test_ctrl_c_ends_the_trials_in_order_and_leaves_nothing(task):
    process = subprocess.Popen(
        command(task, f"{SCALE}=0.03", "--", "--run.steps", "1000"),
        cwd=task,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    rows = folder_of(task, "0.03") / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (rows.exists() and rows.stat().st_size):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no step was made"
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=90)[0]
    assert process.returncode == 130, said
    assert "Traceback" not in said, said
    assert json.loads((rows.parent / "summary.json").read_text())["exit"] == 130
    assert not psutil.wait_procs(family, timeout=15)[1]
