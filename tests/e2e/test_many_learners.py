"""Several learner processes, for real: gloo and DeepSpeed ZeRO-2 on the CPU, whole runs through the command."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

import tiny_models
from cards_run import ROOT, Run

FILES = ROOT / "launch" / "accelerate"
ENGINES = {"cpu": (1, "NO"), "ddp": (2, "MULTI_CPU"), "zero2": (2, "DEEPSPEED")}


def stored_batch(folder: Path, engine: str, model: str, cases: list[dict], *, file: Path | None = None) -> list[dict]:
    """What one update makes of the stored batch in each case, as rank 0 saw it."""
    out = folder / f"{engine}.json"
    command = [sys.executable, "-P", "-m", "launch.accelerate_launch", "--quiet"]
    command += ["--config_file", str(file or FILES / f"{engine}.yaml"), "--num_cpu_threads_per_process", "1"]
    command += [str(Path(__file__).parent / "stored_batch.py"), str(out), json.dumps({"model": model, "cases": cases})]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(out.read_text())
    assert (answer["ranks"], answer["engine"]) == ENGINES[engine]
    return answer["results"]


def farthest(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(np.array(a[name]) - np.array(b[name])).max()) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama-tied", "gpt2"])
def test_one_stored_batch_under_every_engine(tmp_path, model):
    """Gradients, losses and metrics within 1e-5 in fp32, for micro-batches of 1, 2 and 4 and for uneven shards."""
    whole = {"micro": 4, "shards": [6, 6]}
    cases = [whole, {"micro": 1, "shards": [9, 3]}, {"micro": 2, "shards": [12, 0]}, {"micro": 4, "shards": [5, 7]}]
    want, *got = stored_batch(tmp_path, "cpu", model, [whole, *(case | {"shards": [12]} for case in cases)])
    biggest = max(max(map(abs, values)) for values in want["gradients"].values())
    assert biggest > 0.05  # there is something to compare
    got += stored_batch(tmp_path, "ddp", model, cases)
    got += stored_batch(tmp_path, "zero2", model, cases[1:3])
    if model == "llama-tied":
        zero1 = tmp_path / "zero1.yaml"
        zero1.write_text((FILES / "zero2.yaml").read_text().replace("zero_stage: 2", "zero_stage: 1"))
        got += stored_batch(tmp_path, "zero2", model, [cases[1]], file=zero1)
    for result in got:
        assert farthest(result["gradients"], want["gradients"]) < 1e-5, result["case"]
        for name, value in want["means"].items():
            assert result["means"][name] == pytest.approx(value, abs=1e-5), (result["case"], name)


@pytest.mark.slow
def test_the_schedule_and_the_clip_are_the_same_under_every_engine(tmp_path):
    """Six steps of a rate that falls to 0, clipped: AdamW blows up rounding, a wrong rate or clip is far larger."""
    case = {"micro": 4, "shards": [5, 7], "mini": 4, "epochs": 2, "max_grad_norm": 0.5, "steps": 1}
    results = {engine: stored_batch(tmp_path, engine, "llama-tied", [case])[0] for engine in ENGINES}
    for engine in ("ddp", "zero2"):
        assert farthest(results[engine]["parameters"], results["cpu"]["parameters"]) < 3e-4
        for name, value in results["cpu"]["means"].items():
            assert results[engine]["means"][name] == pytest.approx(value, abs=1e-4), (engine, name)
    assert results["cpu"]["means"]["optim/lr"] < 2e-4


REWARDS = """
import os

def vowels(completions, **_):
    return [sum(c in "aeiou" for c in text) / 10 for text in completions]

def fails_once_marked(completions, n, **_):
    if os.path.exists(os.path.join(os.path.dirname(__file__), "fail")) and max(n) >= 12:
        raise ValueError("this rank alone gets such a prompt")
    return [0.0] * len(completions)
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    tiny_models.save_model(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"the {w} sat", "n": i} for i, w in enumerate(["cat", "dog", "mat", "park"] * 4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        """
model: {path: model, dtype: float32}
data: {path: prompts.jsonl, eval_path: prompts.jsonl, eval_prompts: 10, shuffle: false}
rollout: {batch_size: 24, chunk_size: 4, max_new_tokens: 12, workers: 2}
rewards:
  vowels: {fn: rewards.py:vowels, normalize: running}
  watched: {fn: rewards.py:fails_once_marked, weight: 0}
ppo: {mini_batch_size: 12, micro_batch_size: 4, target_kl: 1.0, kl_horizon: 100}
optim: {lr: 0.0001}
log: {trackers: []}
resources: {collective_timeout_s: 120}
run: {steps: 3, eval_every: 2, save_every: 1}
"""
    )
    return folder


def run(task: Path, folder: Path, engine: str, *options: str) -> Run:
    return Run(folder, "--accelerate", engine, *options, config=task / "config.yaml")


@pytest.fixture(scope="module")
def by_one(task, tmp_path_factory) -> list[dict]:
    one = run(task, tmp_path_factory.mktemp("one") / "r", "cpu")
    assert one.end(240) == 0, one.words()
    return one.rows()


def same_training(rows: list[dict], wanted: list[dict]) -> None:
    """The same samples, and numbers that differ by rounding only."""
    assert len(rows) == len(wanted)
    for row, want in zip(rows, wanted, strict=True):
        decided_by_clocks = ("time/", "perf/", "faults/", "timestamp")
        for name in want:
            if not name.startswith(decided_by_clocks) and want[name] is not None:
                assert row[name] == pytest.approx(want[name], abs=1e-4 * max(abs(want[name]), 0.1)), (row["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("ddp", []),
        ("zero2", []),
        # What model.dtype is where nobody says.
        pytest.param("zero2", ["--model.dtype", "bfloat16"], marks=pytest.mark.long(seconds=90)),
        ("ddp", ["--rollout.workers", "1"]),  # rank 1 is a guest of rank 0
        # Six chunks over three ranks, two workers: a guest of rank 0 here too.
        pytest.param("ddp", ["--num-processes", "3"], marks=pytest.mark.long(seconds=100)),
        ("ddp", ["--rollout.chunk_size", "24"]),  # one chunk: rank 1 has no row in any step
    ],
    ids=["ddp", "zero2", "zero2-bf16", "guest", "three", "empty"],
)
def test_a_whole_run_trains_as_one_process_does(task, by_one, tmp_path, engine, options):
    """Normalisers, the KL controller, evaluations and counts are global; uneven and empty shards do not hang."""
    several = run(task, tmp_path / "r", engine, *options)
    assert several.end(300) == 0, several.words()
    rows = several.rows()
    # Another chunk is another batch of the engine, and bf16 other numbers: those runs only have to pass their checks.
    if not {"--rollout.chunk_size", "--model.dtype"} & set(options):
        same_training(rows, by_one)
    assert [row["step"] for row in rows] == [1, 2, 3] and several.words().count("step 1/3") == 1
    assert not psutil.pid_exists(several.pids()["learner-1"])


@pytest.mark.slow
def test_a_sharded_run_goes_on_where_it_was_killed(task, tmp_path, monkeypatch):
    """SIGKILL of one rank: named, exit 3, all processes gone. The same command goes on and ends as if nothing was.

    Also where the kill left the lock at which every later start of DeepSpeed waits. The other was asked to pause once.
    """
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "pause").touch()
    paused = run(task, tmp_path / "whole", "zero2")
    assert paused.end(300) == 8 and paused.summary()["steps"] == 1, paused.words()
    assert "tokenppo: paused after step 1" in paused.words() and "Traceback" not in paused.words()
    whole = run(task, tmp_path / "whole", "zero2")
    assert whole.end(300) == 0 and whole.summary()["resumed_from"] == 1, whole.words()
    broken = run(task, tmp_path / "broken", "zero2")
    broken.wait_for(lambda: len(broken.rows()) >= 2)
    family = broken.family()
    os.kill(broken.pids()["learner-1"], signal.SIGKILL)
    assert broken.end(60) == 3, broken.words()
    assert "Traceback" not in broken.words() and "tokenppo: " in broken.words()
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive
    abandoned = tmp_path / "compiled" / "cpu_adam" / "lock"
    abandoned.parent.mkdir(parents=True)
    abandoned.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    again = run(task, tmp_path / "broken", "zero2")
    assert again.end(300) == 0, again.words()
    assert f"removed {abandoned}" in again.words()
    assert not [*(tmp_path / "compiled").rglob("*.so")]  # without offload DeepSpeed compiles nothing
    assert again.summary()["resumed_from"] in (1, 2)
    same_training(again.rows(), whole.rows())


@pytest.mark.slow
def test_a_fault_of_one_rank_ends_all_with_its_words(task, tmp_path):
    folder = task / "fail"
    folder.write_text("")
    try:
        failing = run(task, tmp_path / "r", "ddp")
        assert failing.end(240) == 4, failing.words()
    finally:
        folder.unlink()
    (said,) = [line for line in failing.words().splitlines() if line.startswith("tokenppo: ")]  # by rank 0 alone
    assert said == failing.words().splitlines()[-1]
    assert "learner rank 1: " in said and "this rank alone gets such a prompt" in said
    assert "Traceback" not in failing.words() and failing.summary()["exit"] == 4


@pytest.mark.slow
def test_launches_that_would_not_reduce_gradients_are_refused(task, tmp_path):
    """As accelerate makes them in silence: one process for two, an FSDP file, steps that divide the loss."""
    file = (FILES / "ddp.yaml").read_text()
    launches = {
        "MULTI_CPU": (file.replace("MULTI_GPU", "MULTI_CPU") + "use_cpu: true\n", "asked for 2 learner processes"),
        "FSDP": (file.replace("MULTI_GPU", "FSDP") + "fsdp_config: {fsdp_version: 2}\n", "FSDP: on a CPU"),
        "steps": (
            (FILES / "zero2.yaml").read_text().replace("accumulation_steps: 1", "accumulation_steps: 4"),
            "gradient_accumulation_steps = 4",
        ),
        "init": (
            (FILES / "zero3.yaml").read_text().replace("zero3_init_flag: false", "zero3_init_flag: true"),
            "zero3_init_flag = true",
        ),
    }
    for name, (text, words) in launches.items():
        (tmp_path / f"{name}.yaml").write_text(text)
        refused = run(task, tmp_path / name, str(tmp_path / f"{name}.yaml"))
        assert refused.end(60) == 2, (name, refused.words())
        ours = [line for line in refused.words().splitlines() if line.startswith("tokenppo: ")]
        assert len(ours) == 1 and words in ours[0], refused.words()
        assert "Traceback" not in refused.words() and not (tmp_path / name).exists()
