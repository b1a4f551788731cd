"""A learner on one host, rollouts on another, and the cable between them cut: for 5 s, for good, and with a new node.

The same tiny run each time, its numbers bit for bit those of a run in which nothing happened.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from two_hosts import HERE, PORT, THERE, TwoHosts, refuse_without_namespaces

import tiny_models
from cards_run import Run, same_numbers

pytestmark = pytest.mark.slow

CUT_S = 5.0
DEADLINE_S = 180
STEPS = 16
OPTIONS = {
    "model.dtype": "float32",
    "rollout.batch_size": 16,
    "rollout.chunk_size": 4,
    "rollout.max_new_tokens": 8,
    "rollout.workers": 2,
    "rollout.timeout_s": DEADLINE_S,
    "sync.timeout_s": DEADLINE_S,
    "ppo.mini_batch_size": 16,
    "ppo.ppo_epochs": 1,
    "log.trackers": "[]",
    "log.ledger": 0,
    "run.steps": STEPS,
    "run.deterministic": "true",
    "resources.device": "cpu",
    "resources.ray_address": f"{HERE}:{PORT}",
}


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    refuse_without_namespaces()
    with tempfile.TemporaryDirectory(prefix="two", ignore_cleanup_errors=True) as folder:
        two = TwoHosts(Path(folder))
        try:
            two.build()
            two.add_node()
            yield two
        finally:
            two.close()


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    tiny_models.save_model(folder / "model", "gpt2")
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "the cat {i}"}}\n' for i in range(16)))
    (folder / "r.py").write_text(
        "def varied(completion_ids, **_):\n    return [0.1 * len(set(x)) for x in completion_ids]\n"
    )
    return folder


def started(hosts: TwoHosts, task: Path, folder: Path, **options: object) -> Run:
    values = {
        "model.path": task / "model",
        "data.path": task / "prompts.jsonl",
        "rewards.varied.fn": f"{task}/r.py:varied",
    }
    values |= OPTIONS | {name.replace("__", "."): value for name, value in options.items()}
    given = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    train = [str(Path(sys.executable).parent / "tokenppo"), "train"]
    train += ["--run.dir", str(folder.parent), "--run.name", folder.name]
    return Run(folder, *given, command=hosts.command(*train))


def test_numbers_are_those_of_an_undisturbed_run_whether_the_cable_is_cut_for_a_while_or_for_good(
    hosts, task, tmp_path
):
    quiet = started(hosts, task, tmp_path / "quiet")
    quiet.wait_for(lambda: quiet.rows())
    assert {"worker-0", "reward-server", "learner"} <= {
        n for n, pid in quiet.pids().items() if pid in hosts.pids_here()
    }
    assert quiet.pids()["worker-1"] in hosts.pids_there()
    assert quiet.end() == 0, quiet.words()
    assert f"node {HERE}: learner 0 + worker 0\nnode {THERE}: worker 1\n" in quiet.words(), quiet.words()

    run = started(hosts, task, tmp_path / "cut")
    run.wait_for(lambda: run.rows())
    hosts.cut()
    before = len(run.rows())
    time.sleep(CUT_S)
    after = len(run.rows())
    hosts.mend()
    assert after <= before + 2 < STEPS - 4, "the run does not need its worker there: nothing is tested"
    run.wait_for(lambda: len(run.rows()) >= after + 2)
    assert run.rows()[-1].get("faults/worker_lost", 0) == 0, run.words()
    hosts.cut()
    cut_at = time.monotonic()
    assert len(run.rows()) < STEPS - 1, "the run was over before the second cut"
    assert run.end() == 0, run.words()
    assert time.monotonic() - cut_at < DEADLINE_S
    assert f"worker-1 on node {THERE}, which Ray has lost, died while" in run.words(), run.words()
    assert run.rows()[-1]["faults/worker_lost"] == 1
    same_numbers(quiet.rows(), run.rows())


@pytest.mark.long(seconds=120)
def test_a_run_that_may_lose_no_worker_ends_by_the_name_of_the_node_that_it_lost(hosts, task, tmp_path):
    hosts.mend()
    hosts.remove_node()
    hosts.add_node()
    options = {"rollout__workers": 1, "rollout__max_worker_losses": 0, "rollout__placement": "apart"}
    run = started(hosts, task, tmp_path / "apart", run__steps=100000, **options)
    run.wait_for(lambda: run.rows())
    assert f"node {HERE}: learner 0\nnode {THERE}: worker 0\n" in run.words(), run.words()
    hosts.cut()
    cut_at = time.monotonic()
    assert run.end() == 3, run.words()
    assert time.monotonic() - cut_at < DEADLINE_S
    last = run.words().splitlines()[-1]
    assert last.startswith(f"tokenppo: worker-0 on node {THERE}, which ") and "Look at that node" in last
    assert json.loads((run.folder / "summary.json").read_text())["exit"] == 3
