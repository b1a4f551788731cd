"""Jobs of a real SLURM with two nodes: they train, do not collide, save before their time is over, leave nothing."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import slurm_cluster
import tiny_models
from cards_run import ROOT
from slurm_cluster import Cluster
from trainer import checkpoint

pytestmark = pytest.mark.slow

TOKENPPO = str(Path(sys.executable).parent / "tokenppo")
CARDS = {  # of configs/cards.yaml, small enough for a test
    "run.steps": "2",
    "data.eval_prompts": "4",
    "rollout.batch_size": "16",
    "rollout.chunk_size": "8",
    "rollout.max_new_tokens": "16",
    "ppo.mini_batch_size": "8",
    "ppo.micro_batch_size": "8",
    "resources.object_store_mb": "80",
    "log.trackers": "[]",
}


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    if (why := slurm_cluster.absent()) is not None:
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="sl"))
    cluster = Cluster(folder)
    try:
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    tiny_models.save_model(folder / "model", "gpt2")
    (folder / "rewards.py").write_text(
        "def brief(completion_ids, **_):\n    return [-0.1 * len(x) for x in completion_ids]"
    )
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"the {w} sat"}) + "\n" for w in ("cat", "dog"))
    )
    (folder / "config.yaml").write_text(
        """
model: {path: model, dtype: float32}
data: {path: prompts.jsonl}
rollout: {workers: 1, batch_size: 4, chunk_size: 4, max_new_tokens: 6}
rewards: {brief: {fn: rewards.py:brief}}
ppo: {mini_batch_size: 4, micro_batch_size: 4}
run: {steps: 100000, save_every: 1}
resources: {object_store_mb: 80}
log: {trackers: [], ledger: 0}
"""
    )
    return folder


def submit(slurm: Cluster, cwd: Path, *options: str) -> str:
    """`tokenppo submit slurm` in `cwd`; the number of the job."""
    command = [TOKENPPO, "submit", "slurm", *options]
    environ = slurm.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("Submitted batch job "), done.stdout
    return done.stdout.split()[-1]


def rows(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def words(cwd: Path) -> str:
    return "".join(f"== {file.name}\n{file.read_text(errors='replace')}" for file in sorted(cwd.glob("*.log")))


@pytest.mark.long(seconds=220)
def test_two_jobs_train_on_both_nodes_at_once_and_leave_no_process(slurm, task, tmp_path):
    """The cards task and another, on the same two nodes: no port, folder or token of one is in the way of the other."""
    cards = ["--config", str(ROOT / "configs" / "cards.yaml"), "--run.name", "one"]
    cards += [word for key, value in CARDS.items() for word in (f"--{key}", value)]
    tiny = ["--config", str(task / "config.yaml"), "--run.name", "other", "--run.steps", "2"]
    names, where = ("one", "other"), ("--nodes", "2", "--cpus-per-node", "2", "--time", "20")
    numbers = [submit(slurm, tmp_path, *options, *where) for options in (cards, tiny)]
    for number in numbers:
        slurm.wait_for(lambda number=number: slurm.job(number)["JobState"] != "PENDING", 60)
    together = [slurm.job(number) for number in numbers]
    assert [(job["JobState"], job["NodeList"]) for job in together] == [("RUNNING", "n[1-2]")] * 2
    for number in numbers:
        slurm.ended(number, 400)
    for name, number in zip(names, numbers, strict=True):
        job, folder = slurm.job(number), tmp_path / "runs" / name
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), words(tmp_path)
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["exit"], summary["steps"]) == (0, 2) and (folder / "final").is_dir()
        said = (tmp_path / f"{name}-{number}-node0.log").read_text()
        assert "step 2/2" in said, said
        if name == "one":  # which has two rollout workers
            seats = [line for line in said.splitlines() if line.startswith("node ")]
            assert len(seats) == 2 and "learner 0 + worker 0" in seats[0] and ": worker 1" in seats[1], said
        assert (tmp_path / f"{name}-{number}-node1.log").exists()
    assert not list((tmp_path / "runs" / ".meet").iterdir())
    _, alive = psutil.wait_procs(slurm.family(), timeout=30)
    assert not alive


def test_it_saves_before_its_time_is_over_goes_on_and_ends_when_cancelled(slurm, task, tmp_path):
    """One job through all of it: the time limit, `scontrol requeue`, `scancel`."""
    folder = tmp_path / "runs" / "long"
    # SLURM may send the signal up to a minute early: it comes when the job has run for one to two minutes.
    limit = ["--time", "4", "--save-before", "160"]
    number = submit(slurm, tmp_path, "--config", str(task / "config.yaml"), "--nodes", "2", "--cpus-per-node", "2",
                    *limit, "--run.name", "long")  # fmt: skip
    slurm.wait_for(lambda: int(slurm.job(number)["Restarts"]) == 1, 240)
    said = words(tmp_path)
    assert "saved before the time limit; queued again" in said and "paused after step" in said, said
    paused = json.loads((folder / "summary.json").read_text())
    assert paused["exit"] == 8 and checkpoint.steps_saved(folder / "checkpoints")[0] == paused["steps"]

    slurm.wait_for(lambda: rows(folder)[-1]["step"] > paused["steps"], 180)
    slurm.ask("scontrol", "requeue", number)
    slurm.wait_for(lambda: int(slurm.job(number)["Restarts"]) == 2, 60)
    before = rows(folder)[-1]["step"]
    slurm.wait_for(lambda: rows(folder)[-1]["step"] > before, 180)
    assert [row["step"] for row in rows(folder)] == list(range(1, rows(folder)[-1]["step"] + 1))

    family = slurm.family()
    slurm.ask("scancel", number)
    assert slurm.ended(number, 60)["JobState"] == "CANCELLED"
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not [p for p in alive if p.is_running() and p in slurm.family()], words(tmp_path)
    last = checkpoint.latest(folder / "checkpoints")
    assert last.step >= before and not last.damaged


@pytest.mark.long(seconds=110)
def test_nodes_for_rollouts_may_be_a_component_of_their_own(slurm, task, tmp_path):
    """A heterogeneous job, whose plan wants more of one kind of node than of the other."""
    number = submit(slurm, tmp_path, "--config", str(task / "config.yaml"), "--nodes", "2", "--cpus-per-node", "2",
                    "--rollout-nodes", "1", "--time", "20", "--run.name", "apart", "--run.steps", "1")  # fmt: skip
    assert slurm.ended(number, 240)["JobState"] == "COMPLETED", words(tmp_path)
    assert json.loads((tmp_path / "runs" / "apart" / "summary.json").read_text())["exit"] == 0


def test_what_is_wrong_is_said_before_anything_is_queued(slurm, task, tmp_path):
    wrong = {
        "--sbatch": (["--sbatch", "partition=nowhere"], "sbatch refuses: sbatch: error: invalid partition specified"),
        "--nodes": (["--nodes", "0"], "--nodes 0: wants a whole number of at least 1"),
        "--run.name": (["--run.name", "$(id)"], "run.name = $(id): must begin with a letter or digit"),
        "--rewards": (["--rewards.brief.fn", "absent.py:f"], "there is no file"),
    }
    for options, line in wrong.values():
        command = [TOKENPPO, "submit", "slurm", "--config", str(task / "config.yaml"), *options]
        environ = slurm.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and line in done.stderr and done.stdout == "", (options, done.stderr)
    assert slurm.ask("squeue", "--noheader") == "" and os.listdir(tmp_path) == []
