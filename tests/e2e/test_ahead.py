"""Batches written one step ahead: the same numbers in each run, whatever is killed, and from a checkpoint on."""

from pathlib import Path

import psutil
import pytest
from test_faults import weights

from cards_run import Run, same_numbers

pytestmark = pytest.mark.slow

STEPS = 8
OPTIONS = ("--run.deterministic", "--run.steps", str(STEPS), "--run.save_every", "4", "--run.eval_every", "6")
OPTIONS += ("--rollout.max_staleness", "1")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("ahead") / "quiet", *OPTIONS)
    assert run.end() == 0, run.words()
    return run


def test_tokens_are_as_old_as_configured_and_fresh_behind_a_checkpoint(undisturbed):
    rows = undisturbed.rows()
    assert [row["staleness/mean"] for row in rows] == [0, 1, 1, 1, 0, 1, 1, 1]
    # Only tokens of the current policy can be held to the learner's own log-probs.
    assert [row.get("logprob_diff/max") is None for row in rows] == [bool(row["staleness/mean"]) for row in rows]
    assert rows[-1]["reward/total"] > rows[0]["reward/total"] + 2


def test_a_killed_worker_changes_no_number(undisturbed, tmp_path: Path):
    run = Run(tmp_path / "killed", *OPTIONS)
    run.wait_for(lambda: len(run.rows()) >= 1)
    psutil.Process(run.pids()["worker-0"]).kill()
    assert run.end() == 0, run.words()
    assert "worker-0 died" in run.words()
    same_numbers(undisturbed.rows(), run.rows())
    assert weights(run) == weights(undisturbed)


def test_a_killed_run_goes_on_from_its_checkpoint_bit_for_bit(undisturbed, tmp_path: Path):
    """Killed while it had taken prompts ahead and a batch was in flight."""
    run = Run(tmp_path / "resumed", *OPTIONS)
    run.wait_for(lambda: len(run.rows()) >= 6)
    run.kill()
    run = Run(tmp_path / "resumed", *OPTIONS)
    assert run.end() == 0, run.words()
    assert "going on from step 4" in run.words()
    same_numbers(undisturbed.rows(), run.rows())
    assert weights(run) == weights(undisturbed)


def test_ctrl_c_ends_a_run_that_writes_ahead(tmp_path: Path):
    run = Run(tmp_path / "stopped", "--rollout.max_staleness", "2", "--run.steps", "500")
    run.wait_for(lambda: len(run.rows()) >= 2)
    family = run.family()
    run.interrupt()
    assert run.end(40) == 130, run.words()
    assert "Traceback" not in run.words()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


@pytest.mark.long(seconds=90)
def test_two_learners_write_ahead(tmp_path: Path):
    run = Run(tmp_path / "two", "--accelerate", "ddp", *OPTIONS)
    assert run.end() == 0, run.words()
    assert [row["staleness/mean"] for row in run.rows()] == [0, 1, 1, 1, 0, 1, 1, 1]
