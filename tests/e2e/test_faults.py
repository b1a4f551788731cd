"""Processes of a real run are killed and stopped; the numbers are those of a run in which nothing happened."""

import hashlib
import os
import signal
from pathlib import Path

import psutil
import pytest

from cards_run import Run, same_numbers

pytestmark = pytest.mark.slow

STEPS = 6
OPTIONS = ("--run.deterministic", "--run.steps", str(STEPS), "--run.eval_every", "3")


def weights(run: Run) -> str:
    return hashlib.sha256((run.folder / "final" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("quiet") / "quiet", *OPTIONS)
    assert run.end() == 0, run.words()
    return run


def test_killed_processes_change_no_number(undisturbed, tmp_path: Path):
    """SIGKILL to a rollout worker after step 1 and to the reward server after step 3.

    The same metrics and the same final weights, bit for bit, as without: no prompt was lost or trained twice, and the
    new worker wrote with the newest weights.
    """
    run = Run(tmp_path / "killed", *OPTIONS)
    run.wait_for(lambda: len(run.rows()) >= 1)
    victim = psutil.Process(run.pids()["worker-0"])
    victim.kill()
    run.wait_for(lambda: len(run.rows()) >= 3)
    server = psutil.Process(run.pids()["reward-server"])
    server.kill()
    assert run.end() == 0, run.words()

    assert not victim.is_running() and not server.is_running()
    last = run.rows()[-1]
    assert last["faults/worker_lost"] == 2
    assert "worker-0 died" in run.words() and "the reward server died" in run.words()
    same_numbers(undisturbed.rows(), run.rows())
    assert weights(run) == weights(undisturbed)


def test_a_worker_that_hangs_is_replaced_at_its_deadline(undisturbed, tmp_path: Path):
    """SIGSTOP: Ray sees nothing, the deadline does. It is the only worker, so the run waits for the new one."""
    run = Run(tmp_path / "hung", *OPTIONS, "--rollout.timeout_s", "40", "--rollout.workers", "1")
    run.wait_for(lambda: len(run.rows()) >= 2)
    os.kill(run.pids()["worker-0"], signal.SIGSTOP)
    assert run.end() == 0, run.words()
    assert "worker-0 missed its deadline" in run.words() and "worker-0.1" in run.words(), run.words()
    assert run.rows()[-1]["faults/worker_lost"] == 1
    same_numbers(undisturbed.rows(), run.rows())
    assert weights(run) == weights(undisturbed)
