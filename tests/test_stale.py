"""Batches of an older policy: what the learner holds to what, and which policy the ratio and the KL are about."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import tiny_models
from core.config import load
from core.faults import InvariantFault
from rollout.engines.transformers_engine import TransformersEngine
from trainer.batch import TrainBatch
from trainer.learner import Learner
from trainer.loop import credit

N = 6


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its state for the process; each test has its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def learner(max_staleness: int, importance_cap: float | None = None) -> Learner:
    sizes = {"rollout.batch_size": N, "ppo.mini_batch_size": N, "ppo.micro_batch_size": 4, "ppo.ppo_epochs": 1}
    how = {"rollout.max_staleness": max_staleness, "ppo.importance_cap": importance_cap, "ppo.kl_coef": 0.5}
    cfg = load(None, tiny_models.LEARNER_SETTINGS | sizes | how, folder=Path("/nowhere"))
    return Learner(cfg, Accelerator(cpu=True), *(tiny_models.make_model("llama-tied") for _ in range(2)))


def written(age: int) -> TrainBatch:
    """By another policy than the learner's, `age` steps ago."""
    engine = TransformersEngine(tiny_models.make_model("llama-tied", scale=3.9), tuple(range(30)), max_new_tokens=8,
                                temperature=1)  # fmt: skip
    trajectories = [replace(t, policy_version=np.full(len(t), -age)) for t in tiny_models.roll_out(engine, N)]
    return TrainBatch.collate(trajectories)


def test_on_policy_other_log_probs_than_the_learners_are_a_fault_and_of_an_older_policy_they_are_none():
    with pytest.raises(InvariantFault, match="workers sample from other weights"):
        learner(0).annotate(written(age=0))
    with pytest.raises(InvariantFault, match="workers sample from other weights"):
        learner(1).annotate(written(age=0))  # it may be older, it says that it is not
    _, means = learner(1).annotate(written(age=1))
    assert not {"logprob_diff/mean", "logprob_diff/max"} & set(means)


def test_the_penalty_is_about_the_policy_that_wrote():
    it = learner(1)
    batch, means = it.annotate(written(age=1))
    mask = batch.response_mask
    of_writer = torch.where(mask, batch.rollout_logprobs - batch.ref_logprobs, 0.0)
    of_learner = torch.where(mask, batch.old_logprobs - batch.ref_logprobs, 0.0)
    assert of_learner.abs().max() < 1e-6  # the learner is the reference still, and the writer is not
    assert of_writer.abs().max() > 0.02
    assert means["objective/kl"] == pytest.approx(float(of_writer.sum()) / N, abs=1e-5)
    batch = credit(it.cfg, batch.fill(token_rewards=torch.zeros_like(batch.rollout_logprobs)), 0.5, it.ranks.sum)
    torch.testing.assert_close(batch.rewards, -0.5 * of_writer, atol=1e-6, rtol=0)


@pytest.mark.parametrize("importance_cap", [None, 2.0])
def test_the_ratio_starts_where_the_writer_or_where_the_step_began(importance_cap):
    it = learner(1, importance_cap)
    batch, _ = it.annotate(written(age=1))
    mask = batch.response_mask
    against_writer = (batch.old_logprobs - batch.rollout_logprobs)[mask].exp()
    batch = credit(it.cfg, batch.fill(token_rewards=batch.component_rewards["a"].float()), 0.0, it.ranks.sum)
    means = it.update(batch)
    if importance_cap is None:
        assert means["ppo/ratio_mean"] == pytest.approx(float(against_writer.mean()), abs=1e-5)
        assert abs(means["ppo/ratio_mean"] - 1) > 1e-3
    else:
        assert means["ppo/ratio_mean"] == pytest.approx(1, abs=1e-6)
        assert means["ppo/importance_mean"] == pytest.approx(float(against_writer.clamp(max=2.0).mean()), abs=1e-5)
