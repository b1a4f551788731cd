"""The command from end to end on a random model, in seconds: files, exit codes, processes, the script interface."""

import json
import math
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_models
import tokenppo
from cards_run import ROOT, Run, same_numbers
from core import ledger_table
from core.diagnosis import Diagnosis, Facts
from core.faults import RewardFault, UserError
from core.metrics import lookup

SHORT = {"max_new_tokens": 8}
REWARDS = """
from tokenppo import Span

def vowels(completions, **_):
    return [[Span(i, i + 1, 0.1) for i, c in enumerate(text) if c in "aeiou"] for text in completions]

def brevity(completion_ids, scale, **_):
    return [-scale * len(ids) for ids in completion_ids]

def topic(topic, **_):
    return [1.0 if t == "x" else None for t in topic]

def asks(completions, answer):
    return [0.0] * len(completions)

def broken(completions, **_):
    return [float("nan") for _ in completions]
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    tiny_models.save_model(folder / "model", "gpt2")
    (folder / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"the {w} sat", "topic": "xy"[i % 2]} for i, w in enumerate(["cat", "dog", "mat", "park"] * 4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        """
model: {path: model, dtype: float32}
data: {path: prompts.jsonl, eval_path: prompts.jsonl, eval_prompts: 8}
rollout: {batch_size: 16, n_samples_per_prompt: 2, chunk_size: 4, max_new_tokens: 12}
rewards:
  vowels: {fn: rewards.py:vowels}
  brevity: {fn: rewards.py:brevity, weight: 0.5, options: {scale: 0.01}}
  topic: {fn: rewards.py:topic, weight: 0}
ppo: {mini_batch_size: 8, micro_batch_size: 4}
optim: {lr: 0.001}
run: {steps: 3, eval_every: 2}
log: {ledger: 1}
"""
    )
    return folder


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("runs")
    for name in ("core", "launch", "rollout"):  # a user's folders of the same names, where the user stands
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('a stranger was imported')")
    run = Run(folder / "first", config=task / "config.yaml")
    assert run.end(180) == 0, run.words()
    return run


def test_it_says_what_it_does_and_where_the_results_are(finished):
    words = finished.words()
    assert "step 3/3" in words and str(finished.folder) in words and "Traceback" not in words


def test_one_object_per_step_with_names_of_the_table(finished):
    rows = finished.rows()
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        for name in set(row) - {"step", "timestamp"}:
            lookup(name)
    assert [any(k.startswith("eval/") for k in row) for row in rows] == [False, True, True]
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert abs(rows[0]["ppo/ratio_mean"] - 1) < 0.05 and rows[2]["staleness/mean"] == 0
    assert 0 <= rows[0]["ppo/first_ratio_error"] < 1e-4 and rows[0]["response/reward_std"] > 0
    assert rows[0]["reward/topic/weighted"] == 0 and rows[0]["reward/topic/raw"] == 1  # None counts for nothing
    assert rows[0]["reward/total"] == pytest.approx(
        rows[0]["reward/vowels/weighted"] + rows[0]["reward/brevity/weighted"], abs=1e-5
    )


def test_the_summary_has_the_evaluations_and_the_exit_code(finished):
    summary = finished.summary()
    assert summary["exit"] == 0 and summary["steps"] == 3
    assert set(summary["eval"]) == {"before", "after", "best"}
    assert summary["eval"]["after"]["reward/total"] == finished.rows()[-1]["eval/reward/total"]
    assert summary["eval"]["before"]["topic"] == 1 and summary["seconds"]["whole_run"] > 0
    doctor = Diagnosis(Facts(components=2))
    for row in finished.rows():
        doctor.add(row["step"], {name: math.nan if x is None else x for name, x in row.items()})
    assert summary["verdicts"] == [asdict(verdict) for verdict in doctor.verdicts]


@pytest.mark.parametrize("which", ["best", "final"])
def test_weights_load_with_from_pretrained(finished, which):
    folder = finished.folder / which
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "gpt2" and tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert load_file(folder / "value_head.safetensors")["weight"].abs().sum() > 0


def test_the_ledger_holds_every_token_of_every_step(finished):
    for row in finished.rows():
        table, (said,) = ledger_table.read(finished.folder, row["step"])
        assert table.num_rows == 16 and said["weights"] == {"vowels": 1.0, "brevity": 0.5, "topic": 0.0}
        lines = table.to_pylist()
        total = sum(sum(line["token_rewards"]) for line in lines) / 16
        assert total == pytest.approx(row["reward/total"], abs=1e-5)
        assert sum(len(line["clipped"]) for line in lines) == pytest.approx(16 * row["response/length_mean"])
        for line in lines:
            weighted = np.sum([values for _, values in line["weighted"]], axis=0)
            np.testing.assert_allclose(weighted, line["token_rewards"], atol=1e-6)
            assert set(line["policy_version"]) == {row["step"] - 1}
            spans = zip(line["offset_starts"], line["offset_ends"], strict=True)
            assert line["tokens"] == [line["response_text"][a:b] for a, b in spans]  # two may share a character
        assert "faults/ledger_missed" not in row


def test_tensorboard_holds_the_same_numbers(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = list(finished.folder.rglob("events.out.tfevents.*"))
    assert events
    for file in events:
        reader = EventAccumulator(str(file))
        reader.Reload()
        if "reward/total" in reader.Tags()["scalars"]:
            got = [(e.step, e.value) for e in reader.Scalars("reward/total")]
            assert got == [(row["step"], pytest.approx(row["reward/total"], rel=1e-6)) for row in finished.rows()]
            break
    else:
        pytest.fail("no event file has reward/total")


def test_a_finished_run_says_so_and_how_to_go_on_and_nothing_in_it_changes(task, finished):
    before = {p: p.read_bytes() for p in finished.folder.rglob("*") if p.is_file()}
    again = Run(finished.folder, config=task / "config.yaml")
    assert again.end(60) == 0
    words = again.words()
    assert "finished after 3 steps" in words and "after (step 3): reward" in words and "--run.name" in words
    never = Run(finished.folder, "--run.resume", "never", config=task / "config.yaml")
    assert never.end(60) == 2
    assert never.words().startswith("tokenppo: run.resume = never") and never.words().count("\n") == 1
    assert {p: p.read_bytes() for p in finished.folder.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_eval_repeats_the_last_evaluation(finished):
    """The same weights, prompts and seed: what `after` says comes out of final/ again."""
    metrics = tokenppo.evaluate(finished.folder)["metrics"]
    after = finished.summary()["eval"]["after"]
    got = {name: metric["policy"]["value"] for name, metric in metrics.items() if not name.startswith("objective/")}
    assert got == {name: pytest.approx(value, abs=1e-5) for name, value in after.items() if name != "step"}


@pytest.mark.slow
def test_accelerate_launch_is_the_same_thing(task, finished, tmp_path):
    """The line that users have in their job scripts; and two identical runs have identical numbers."""
    command = [str(Path(sys.executable).parent / "accelerate"), "launch"]
    command += ["--config_file", "launch/accelerate/cpu.yaml", "-m", "launch.train"]
    command += ["--config", str(task / "config.yaml"), "--run.dir", str(tmp_path), "--run.name", "first"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
    same_numbers(finished.rows(), rows)


def test_dry_run_prints_the_plan_and_writes_nothing(task, tmp_path):
    command = [sys.executable, "-m", "tokenppo", "train", "--config", str(task / "config.yaml"), "--dry-run"]
    done = subprocess.run(
        [*command, "--run.dir", str(tmp_path / "runs")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "8 prompts x 2 samples = 16 responses",
        "2 epochs x 2 mini-batches of 8",
        "MiB for weights, gradients, AdamW and reference",
        "12 optimizer steps",
    ):
        assert words in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.path", "absent.jsonl"], ["data.path", "absent.jsonl", "no such file"]),
        (["--model.path", "./absent"], ["model.path", "no such folder"]),
        (["--rewards.vowels.fn", "absent.py:fn"], ["rewards.vowels.fn", "absent.py"]),
        (["--rewards.vowels.fn", "REWARDS:vowel"], ["rewards.vowels.fn", "did you mean", "vowels"]),
        (["--rewards.vowels.fn", "REWARDS:asks"], ["rewards.vowels.fn", "wants answer", "topic"]),
        (["--rewards.topic.fn", "REWARDS:asks", "--rewards.topic.options.scal", "2"], ["rewards.topic", "`scal`"]),
    ],
)
def test_what_cannot_work_is_found_by_a_dry_run(task, tmp_path, options, words):
    options = [word.replace("REWARDS", f"{task}/rewards.py") for word in options]
    command = [sys.executable, "-m", "tokenppo", "train", "--config", str(task / "config.yaml"), "--dry-run"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert not [w for w in words if w not in done.stderr], done.stderr


def test_help_is_quick_and_lists_every_key():
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "tokenppo", "train", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "--ppo.gae_lambda" in done.stdout and "--rewards.NAME.weight" in done.stdout
    assert time.perf_counter() - started < 10  # 0.4 s alone; a torch import would take more than this under load


@pytest.mark.slow
def test_a_score_that_is_no_number_stops_the_run_with_names(task, tmp_path):
    options = ("--rollout.workers", "1", "--rewards.broken.fn", str(task / "rewards.py:broken"))
    run = Run(tmp_path / "nan", *options, config=task / "config.yaml")
    assert run.end(180) == RewardFault.exit_code
    last = run.words().strip().splitlines()[-1]
    assert last.startswith("tokenppo:") and "broken" in last and "nan" in last
    assert run.summary()["exit"] == RewardFault.exit_code


@pytest.mark.slow
def test_interrupt_ends_every_process_within_ten_seconds(task, tmp_path):
    run = Run(tmp_path / "stopped", "--run.steps", "100000", config=task / "config.yaml")
    run.wait_for(lambda: len(run.rows()) >= 2)
    family = run.family()
    assert len(family) > 5  # learner, Ray's own, two workers, the reward server
    assert run.process.pid == psutil.Process(run.pids()["learner"]).ppid()  # nobody between the two, for one learner
    started = time.monotonic()
    run.interrupt()
    assert run.end(30) == 130
    _, alive = psutil.wait_procs(family, timeout=10 - (time.monotonic() - started))
    assert not alive, f"left after 10 s: {alive}"
    assert run.summary()["exit"] == 130 and run.rows()[-1]["step"] == len(run.rows())


@pytest.mark.slow
def test_killing_the_command_leaves_no_orphan(task, tmp_path):
    run = Run(tmp_path / "killed", "--run.steps", "100000", config=task / "config.yaml")
    run.wait_for(lambda: len(run.rows()) >= 1)
    family = run.family()
    run.process.kill()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, f"left after 30 s: {alive}"


@pytest.mark.slow
def test_train_from_a_script(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def polite(completions, **_):
        return [float("please" in text) for text in completions]

    got = tokenppo.train(
        model={"path": str(task / "model"), "dtype": "float32"},
        prompts=["the cat sat", {"prompt": "the dog ran", "topic": "x"}],
        rewards={"polite": polite, "vowels": {"fn": f"{task}/rewards.py:vowels", "weight": 0.5}},
        optim={"lr": 1e-4},
        rollout={"workers": 1, "batch_size": 4, "max_new_tokens": 6},
        ppo={"mini_batch_size": 4},
        run={"steps": 2, "name": "script", "eval_every": 1},
        log={"trackers": []},
    )
    assert got.summary["eval"] == {} and got.summary["steps"] == 2  # no held-out prompts, no evaluation
    assert got.folder == tmp_path / "runs" / "script" and got.summary["exit"] == 0
    assert (got.folder / "final" / "model.safetensors").exists()
    assert json.loads((got.folder / "prompts.jsonl").read_text().splitlines()[0]) == {"prompt": "the cat sat"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_runs_of_another_dtype_follow_each_other_in_one_process(task, tmp_path, monkeypatch, dtype):
    """As in a notebook, and the default dtype from end to end: the checks of the run are on."""
    monkeypatch.chdir(tmp_path)
    got = tokenppo.train(
        model={"path": str(task / "model"), "dtype": dtype},
        prompts=["the cat sat", "the dog ran"],
        held_out=["the mat"],
        rewards={"short": {"fn": f"{task}/rewards.py:brevity", "options": {"scale": 0.1}}},
        optim={"lr": 1e-3},
        rollout={"batch_size": 8, "max_new_tokens": 8, "n_samples_per_prompt": 2},
        ppo={"mini_batch_size": 4},
        run={"steps": 2, "name": dtype},
        log={"trackers": []},
    )
    assert got.summary["exit"] == 0 and got.summary["steps"] == 2 and got.summary["eval"]["after"]["step"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(rewards={"a": "nowhere.py:fn"}), "nowhere.py"),
        (dict(rewards={"a": len}, optim={"lrr": 1}), "optim.lr?"),
        (dict(rewards={"a": len}, model="./absent"), "model.path"),
        (dict(rewards={"a": len}), "rollout.max_new_tokens = 512: the model's window is 256"),
        (dict(rewards={"a": len}, prompts=[], rollout=SHORT), "no rows"),
        (dict(rewards={"a": len}, prompts=[3], rollout=SHORT), "row 1"),
    ],
)
def test_mistakes_in_a_script_are_user_errors_and_leave_nothing(task, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    call = {"model": str(task / "model"), "prompts": ["the cat"]} | arguments
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        tokenppo.train(**call)
    assert not list(tmp_path.iterdir())
