"""Coming back: the same command goes on where a run stopped, and ends with the numbers of one that never did."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import wandb_file
from safetensors.torch import load_file
from test_command import REWARDS

import tiny_models
from cards_run import ROOT, Run, same_numbers
from core.config import load
from core.faults import UserError
from launch.run import run

STEPS = 6
# The same rewards, but that they take their time as long as a file says so.
SLOWED = REWARDS.replace(
    "def vowels(completions, **_):\n",
    """def vowels(completions, **_):
    if os.path.exists(os.path.join(os.path.dirname(__file__), "slow")):
        time.sleep(0.4)
""",
)
SLOWED = f"import os\nimport time\n{SLOWED}"


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    tiny_models.save_model(folder / "model", "gpt2")
    (folder / "rewards.py").write_text(SLOWED)
    rows = [{"prompt": f"the {w} sat", "topic": "xy"[i % 2]} for i, w in enumerate(["cat", "dog", "mat", "park"] * 3)]
    for file in ("prompts.jsonl", "held_out.jsonl"):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        f"""
model: {{path: model, dtype: float32}}
data: {{path: prompts.jsonl, eval_path: held_out.jsonl, eval_prompts: 8}}
rollout: {{workers: 1, batch_size: 16, n_samples_per_prompt: 2, chunk_size: 4, max_new_tokens: 12}}
rewards:
  vowels: {{fn: rewards.py:vowels, normalize: running}}
  brevity: {{fn: rewards.py:brevity, weight: 0.5, options: {{scale: 0.01}}}}
ppo: {{mini_batch_size: 8, micro_batch_size: 4, target_kl: 0.5, kl_horizon: 64}}
optim: {{lr: 0.001, warmup_frac: 0.2, schedule: cosine}}
log: {{trackers: [tensorboard, wandb], samples_every: 2, peer_names: verl}}
run: {{steps: {STEPS}, eval_every: 2, save_every: 1, deterministic: true}}
"""
    )
    return folder


def start(task: Path, folder: Path, *options: str) -> Run:
    return Run(folder, *options, config=task / "config.yaml")


@pytest.fixture(scope="module")
def whole(task, tmp_path_factory) -> Run:
    """With two workers; those that are compared with it have one."""
    run = start(task, tmp_path_factory.mktemp("whole") / "r", "--rollout.workers", "2")
    assert run.end(240) == 0, run.words()
    return run


def killed_after(task: Path, folder: Path, step: int, *options: str) -> Run:
    """The learner process gets SIGKILL as soon as the row of `step` is there."""
    run = start(task, folder, *options)
    run.wait_for(lambda: len(run.rows()) >= step)
    family = run.family()
    os.kill(run.pids()["learner"], signal.SIGKILL)
    assert run.end(60) == 3, run.words()
    assert "died without a word" in run.words()
    assert not psutil.wait_procs(family, timeout=15)[1]
    return run


def same_files(a: Path, b: Path) -> None:
    for part in ("final", "best"):
        for name in ("model.safetensors", "value_head.safetensors"):
            assert (a / part / name).read_bytes() == (b / part / name).read_bytes(), f"{part}/{name}"
    tensors = [load_file(folder / f"checkpoints/step-{STEPS}/learner/model.safetensors") for folder in (a, b)]
    assert all(tensors[0][name].equal(tensors[1][name]) for name in tensors[0])


@pytest.fixture(scope="module")
def resumed(task, tmp_path_factory) -> tuple[Run, Run]:
    folder = tmp_path_factory.mktemp("broken") / "r"
    # Steps of more than a second: W&B writes its file every half, and a kill takes what it has not written.
    (task / "slow").touch()
    broken = killed_after(task, folder, 3)
    (task / "slow").unlink()
    again = start(task, folder)
    assert again.end(240) == 0, again.words()
    return broken, again


@pytest.mark.slow
def test_after_sigkill_the_same_command_ends_bit_for_bit_as_an_undisturbed_run(whole, resumed):
    """Running moments, an adaptive kl_coef, a cosine schedule with warm-up, epochs that end inside a step."""
    _, again = resumed
    summary = again.summary()
    assert summary["resumed_from"] in (2, 3) and "going on from step" in again.words()
    same_numbers(again.rows(), whole.rows())
    same_files(again.folder, whole.folder)
    assert summary["eval"] == whole.summary()["eval"] and summary["steps"] == STEPS
    assert whole.summary()["resumed_from"] is None


@pytest.mark.slow
def test_trackers_go_on_under_the_same_id_with_each_step_once(whole, resumed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, again = resumed
    files = wandb_file.files(again.folder)
    recorded = [wandb_file.read(file) for file in files]
    assert len(files) == 2 and len({run.run_id for run in recorded}) == 1
    steps = [row["step"] for run in recorded for row in run.rows]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS
    rows = [row for run in recorded for row in run.rows]
    names = {name for row in rows for name in row if not name.startswith("_")}
    assert set(again.rows()[-1]) - {"timestamp"} <= names
    assert [row["step"] for row in rows if "samples._type" in row] == list(range(2, STEPS + 1, 2))
    (record,) = [a for a in recorded[-1].artifacts if a.type == "run-record"]
    kept = {entry.path: Path(entry.local_path).read_bytes() for entry in record.manifest.contents}
    assert kept.keys() == {"metrics.jsonl", "settings.json", "summary.json", "report.html"}
    for name in ("metrics.jsonl", "summary.json", "report.html"):  # whole, and of this process
        assert kept[name] == (again.folder / name).read_bytes(), name
    assert all(row["critic/score/mean"] == row["reward/total"] for row in rows if row["step"])
    events = EventAccumulator(str(again.folder / "tokenppo"))
    events.Reload()
    assert [e.step for e in events.Scalars("reward/total")] == list(range(1, STEPS + 1))
    assert [e.value for e in events.Scalars("reward/total")] == pytest.approx(
        [row["reward/total"] for row in whole.rows()]
    )


@pytest.mark.slow
def test_killed_before_its_first_checkpoint_it_begins_again(task, whole, tmp_path):
    """No row and no weight of the first try is left; here only the end has a checkpoint."""
    killed_after(task, tmp_path / "r", 2, "--run.save_every", "100")
    again = start(task, tmp_path / "r", "--run.save_every", "100")
    assert again.end(240) == 0, again.words()
    assert again.summary()["resumed_from"] == 0 and "begins again" in again.words()
    same_numbers(again.rows(), whole.rows())
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == [f"step-{STEPS}"]


@pytest.mark.slow
def test_more_steps_go_on_and_other_settings_or_prompts_are_refused(task, tmp_path):
    folder = tmp_path / "r"
    short = start(task, folder, "--run.steps", "2", "--log.trackers", "[]")
    assert short.end(240) == 0, short.words()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    refusals = {
        ("--optim.lr", "0.5"): "optim.lr = 0.5: the run in",
        ("--run.steps", "1"): "run.steps = 1: the run in",
        ("--run.resume", "never"): "run.resume = never",
    }
    for options, words in refusals.items():
        refused = start(task, folder, "--run.steps", "2", "--log.trackers", "[]", *options)
        assert refused.end(60) == 2 and words in refused.words(), refused.words()
        assert "Traceback" not in refused.words()
    where = {"run.dir": str(tmp_path), "run.name": "r", "run.steps": 3, "log.trackers": []}
    for key, file in (("data.path", "prompts.jsonl"), ("data.eval_path", "held_out.jsonl")):
        text = (task / file).read_text()
        try:
            (task / file).write_text(text.replace("cat", "dog", 1))
            if key == "data.path":
                other = start(task, folder, "--run.steps", "3", "--log.trackers", "[]")
                assert other.end(60) == 2 and "its prompts are not those" in other.words(), other.words()
            with pytest.raises(UserError, match=f"{key} = .*{file}: its prompts are not those"):
                run(load(task / "config.yaml", where))
        finally:
            (task / file).write_text(text)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before  # summary.json among them
    longer = start(task, folder, "--run.steps", "3", "--log.trackers", "[]")
    assert longer.end(240) == 0, longer.words()
    assert longer.summary()["resumed_from"] == 2 and [row["step"] for row in longer.rows()] == [1, 2, 3]


@pytest.mark.slow
def test_another_model_or_reward_under_the_old_name_does_not_go_unnoticed(task, tmp_path):
    """The configuration is the same; the KL would be against another reference, the reward another function."""
    copy = tmp_path / "task"
    shutil.copytree(task, copy)
    first = start(copy, tmp_path / "r", "--run.steps", "1", "--log.trackers", "[]")
    assert first.end(240) == 0, first.words()
    tiny_models.save_model(copy / "model", "gpt2", seed=7)
    other = start(copy, tmp_path / "r", "--run.steps", "2", "--log.trackers", "[]")
    assert other.end(120) == 2 and "not the model that the run in" in other.words(), other.words()
    tiny_models.save_model(copy / "model", "gpt2")
    (copy / "rewards.py").write_text(REWARDS + "\n# paid otherwise\n")
    paid = start(copy, tmp_path / "r", "--run.steps", "2", "--log.trackers", "[]")
    assert paid.end(240) == 0, paid.words()
    assert "warning: rewards.vowels.fn" in paid.words() and "its source is not what it was at step 1" in paid.words()
    assert paid.summary()["resumed_from"] == 1


@pytest.mark.slow
def test_one_process_goes_on_from_what_two_wrote(task, whole, tmp_path):
    """Under DDP every rank holds all: the number of ranks may change, the numbers do but by rounding."""
    short = ("--run.steps", "2", "--log.trackers", "[]")
    two = start(task, tmp_path / "r", "--accelerate", "ddp", "--rollout.workers", "2", *short)
    assert two.end(240) == 0, two.words()
    one = start(task, tmp_path / "r", "--rollout.workers", "2", "--run.steps", "3", "--log.trackers", "[]")
    assert one.end(240) == 0, one.words()
    assert one.summary()["resumed_from"] == 2 and [row["step"] for row in one.rows()] == [1, 2, 3]
    other = ("--accelerate", "zero2", "--rollout.workers", "2", "--run.steps", "4", "--log.trackers", "[]")
    sharded = start(task, tmp_path / "r", *other)
    assert sharded.end(120) == 2 and "DeepSpeed reads back only its own shards" in sharded.words(), sharded.words()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(task, whole, tmp_path):
    """One flipped bit, which torch.load and safetensors would both read without a word."""
    folder = tmp_path / "r"
    killed_after(task, folder, 4, "--run.keep_checkpoints", "3")
    saved = sorted((folder / "checkpoints").glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    file = saved[-1] / "learner" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 16
    file.write_bytes(data)
    again = start(task, folder, "--run.keep_checkpoints", "3")
    assert again.end(240) == 0, again.words()
    assert f"{saved[-1].name} is damaged" in " ".join(again.words().split())
    used = int(saved[-2].name.removeprefix("step-"))
    assert f"going on from step {used}" in again.words()
    same_numbers(again.rows(), whole.rows())
    aside = saved[-1].with_name(f"{saved[-1].name}.damaged")
    assert (aside / "learner" / "model.safetensors").read_bytes() == data  # kept as it was
    damaged = [row.get("faults/checkpoints_damaged", 0) for row in again.rows()]
    assert damaged == [0] * used + [1] * (STEPS - used)


@pytest.mark.slow
def test_where_all_checkpoints_are_damaged_nothing_is_started_or_renamed(task, tmp_path):
    folder = tmp_path / "r"
    killed_after(task, folder, 3)
    for place in (folder / "checkpoints").glob("step-*"):
        (place / "state.json").write_text("{}")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for how in ("auto", "must"):
        again = start(task, folder, "--run.resume", how)
        assert again.end(120) == 6 and "checkpoints are damaged" in again.words(), again.words()
        assert "Traceback" not in again.words()
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    nothing = start(task, tmp_path / "other", "--run.resume", "must")
    assert nothing.end(60) == 2 and "run.resume = must" in nothing.words() and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_two_learner_processes_have_one_wandb_run_and_one_writer(task, tmp_path):
    several = start(task, tmp_path / "r", "--accelerate", "ddp", "--rollout.workers", "2", "--run.steps", "2")
    assert several.end(240) == 0, several.words()
    (file,) = wandb_file.files(several.folder)
    rows = wandb_file.read(file).rows
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert sum(rows[2]["histogram/response_length.values"]) == 16  # the whole batch, of which rank 0 has a half
    tokens = sum(rows[2]["histogram/ratio.values"])
    assert tokens == round(16 * several.rows()[1]["response/length_mean"])
    assert len([p for p in (several.folder / "tokenppo").rglob("events*")]) == 1


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_its_name_and_leaves_the_last_checkpoint(task, tmp_path):
    """A file system of a few megabytes: whatever does not fit, the run says so and the checkpoint before is whole."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(small)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    code = (
        "import sys; from pathlib import Path; from trainer import checkpoint;"
        "print([(p.name, checkpoint.damage_of(p)) for p in sorted(Path(sys.argv[1]).glob('step-*'))])"
    )
    try:
        full = Run(tmp_path / "r", "--run.dir", str(small), "--log.trackers", "[]", config=task / "config.yaml")
        full.wait_for(lambda: (small / "r" / "checkpoints" / "step-2").exists())
        fill(small)
        assert full.end(120) == 6, full.words()
        assert "tokenppo: " in full.words() and "Traceback" not in full.words()
        checked = subprocess.run(
            [sys.executable, "-c", code, str(small / "r" / "checkpoints")], cwd=ROOT, capture_output=True, text=True
        )
        assert checked.returncode == 0 and "None" in checked.stdout, checked.stdout + checked.stderr
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def fill(folder: Path) -> None:
    """Until the last byte is taken."""
    with open(folder / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
