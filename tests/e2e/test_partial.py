"""Responses in rounds, in whole runs: the same numbers for any number of workers, whatever is killed, and from a
checkpoint on; and every sample is trained on once."""

import functools
from pathlib import Path

import psutil
import pyarrow.parquet
import pytest
from test_faults import weights

from cards_run import Run, same_numbers
from core.trajectory_table import from_table
from launch.trained import uids_by_step

pytestmark = pytest.mark.slow

NAME = "r"  # uids are made of it
STEPS, PROMPTS, EXTRA = 5, 32, 16
OPTIONS = ("--run.deterministic", "--run.steps", str(STEPS), "--run.save_every", "2", "--run.eval_every", "100")
OPTIONS += ("--data.eval_prompts", "8", "--rollout.batch_size", str(PROMPTS), "--ppo.mini_batch_size", "16")
OPTIONS += ("--rollout.chunk_size", "8", "--rollout.round_tokens", "10", "--rollout.extra_prompts", str(EXTRA))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("partial") / NAME, *OPTIONS)
    assert run.end() == 0, run.words()
    return run


def each_sample_once(run: Run) -> None:
    steps = uids_by_step(run.folder)
    assert [len(uids) for uids in steps.values()] == [PROMPTS] * STEPS
    assert len({uid for uids in steps.values() for uid in uids}) == PROMPTS * STEPS


def test_responses_are_left_and_gone_on_with_and_each_is_trained_on_once(undisturbed):
    rows = undisturbed.rows()
    each_sample_once(undisturbed)
    assert [row["partial/waiting"] for row in rows] == [EXTRA] * (STEPS - 1) + [0]
    assert rows[0]["staleness/mean"] == 0 and all(row["staleness/mean"] > 0 for row in rows[1:])
    assert all(row["partial/rounds"] >= 1 and 0.5 < row["partial/length_ratio"] < 2 for row in rows)
    assert rows[-1]["partial/length_ratio"] == 1 and rows[-1]["data/epochs"] == pytest.approx(PROMPTS * STEPS / 2000)
    # Where a token is of the policy that learns from it, workers and learner agree on it.
    assert all(row["logprob_diff/max"] < 1e-4 for row in rows)
    assert rows[-1]["reward/total"] > rows[0]["reward/total"] + 1


def test_a_checkpoint_has_responses_in_all_their_states(undisturbed):
    rows = from_table(pyarrow.parquet.read_table(undisturbed.folder / "checkpoints/step-4/under_way/rank-0.parquet"))
    over = [t for t in rows if t.finish_reason is not None]
    assert len(rows) == EXTRA and 0 < len(over) < EXTRA
    assert all(t.component_rewards for t in over)
    assert all(len(t) >= 10 and not t.component_rewards for t in rows if t.finish_reason is None)


def test_another_number_of_workers_a_lost_one_and_a_killed_run_change_no_number(undisturbed, tmp_path: Path):
    """The worker dies among rounds and its responses are gone on with by others; then everything is killed."""
    options = (*OPTIONS, "--rollout.workers", "3")
    run = Run(tmp_path / NAME, *options)
    run.wait_for(lambda: len(run.rows()) >= 1)
    psutil.Process(run.pids()["worker-0"]).kill()
    run.wait_for(lambda: len(run.rows()) >= 3)
    assert "worker-0 died" in run.words()
    run.kill()
    run = Run(tmp_path / NAME, *options)
    assert run.end() == 0, run.words()
    assert "going on from step 2" in run.words()
    same_numbers(undisturbed.rows(), run.rows())
    assert uids_by_step(run.folder) == uids_by_step(undisturbed.folder)
    assert weights(run) == weights(undisturbed)


@pytest.mark.long(seconds=90)
def test_rounds_are_written_ahead_and_a_run_of_two_learners_goes_on_with_one(tmp_path: Path):
    """Two ranks write one step ahead; between two rounds newer weights come in. Killed, one rank goes on with all."""
    start = functools.partial(Run, tmp_path / NAME, *OPTIONS, "--rollout.max_staleness", "1")
    run = start("--accelerate", "ddp")
    run.wait_for(lambda: len(run.rows()) >= 3)
    staleness = [row["staleness/mean"] for row in run.rows()[:3]]
    assert staleness[0] == 0 and staleness[1] >= 1 and staleness[2] > 0
    assert [row["partial/waiting"] for row in run.rows()[:3]] == [EXTRA] * 3
    run.kill()
    run = start()
    assert run.end() == 0, run.words()
    assert "going on from step 2" in run.words()
    each_sample_once(run)
