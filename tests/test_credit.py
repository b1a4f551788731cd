"""`credit`: token rewards become advantages and returns, by the options of `ppo`; what the next step needs is kept."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from core.config import load
from core.metrics import lookup
from core.schema import Config
from ppo_cases import close, f64, mask_of
from trainer.batch import TrainBatch
from trainer.loop import TrainState, credit


def configured(**overrides: object) -> Config:
    least = {"model.path": "m", "data.path": "p.jsonl", "rewards.a.fn": "r.py:f", "rollout.n_samples_per_prompt": 2}
    return load(None, least | {f"ppo.{key}": value for key, value in overrides.items()}, folder=Path("/nowhere"))


def batch_of(token_rewards, mask, *, values=None, old=None, ref=None) -> TrainBatch:
    """Two samples each of prompts 5, 6, ...; policy and reference agree unless given."""
    mask = mask_of(mask)
    n, width = mask.shape
    zeros = torch.zeros(n, width, dtype=torch.float64)
    return TrainBatch(
        order=np.array([(5 + i // 2, i % 2) for i in range(n)], dtype=np.int64),
        input_ids=torch.zeros(n, width + 1, dtype=torch.int64),
        prompt_lengths=torch.ones(n, dtype=torch.int64),
        response_lengths=mask.sum(dim=1),
        response_mask=mask,
        cut=torch.zeros(n, dtype=torch.bool),
        rollout_logprobs=zeros,
        policy_version=torch.zeros(n, width, dtype=torch.int64),
        component_rewards={},
        component_mask={},
        token_rewards=f64(token_rewards),
        old_logprobs=zeros if old is None else f64(old),
        ref_logprobs=zeros if ref is None else f64(ref),
        values=zeros if values is None else f64(values),
        bootstrap_values=torch.zeros(n, dtype=torch.float64),
    )


def credited(cfg, batch, kl_coef=0.0, **kept):
    return credit(cfg, batch, kl_coef, lambda sums: sums, **kept)


TWO = ([[1.0, 0.0, 2.0], [0.0, 3.0, 9.0]], [[1, 1, 1], [1, 1, 0]])


def test_the_defaults_are_gae_with_whitening():
    # lambda 1: to go 3, 2, 2 and 3, 3; mean 2.6, squares 2 * 0.36 + 3 * 0.16 = 1.2, deviation sqrt(0.3)
    out = credited(configured(gae_lambda=1), batch_of(*TWO))
    close(out.returns, [[3.0, 2.0, 2.0], [3.0, 3.0, 0.0]])
    high, low = 0.4 / 0.3**0.5, -0.6 / 0.3**0.5
    close(out.advantages, [[high, low, low], [high, high, 0.0]], 1e-6)


@pytest.mark.parametrize(("estimator", "whitened"), [("gae", True), ("reinforce_pp", True), ("rloo", False)])
def test_whitening_is_as_published_unless_it_is_said(estimator, whitened):
    def mean_square(**options):
        out = credited(configured(estimator=estimator, **options), batch_of(*TWO))
        return float((out.advantages[out.response_mask] ** 2).sum() / 4)  # n - 1 tokens

    assert (mean_square() == pytest.approx(1, abs=1e-4)) == whitened
    assert mean_square(whiten_advantages=True) == pytest.approx(1, abs=0.3)  # rloo's are not centred before
    assert mean_square(whiten_advantages=False) != pytest.approx(1, abs=1e-2) or estimator == "rloo"


def test_samples_of_a_prompt_are_compared():
    # as tests/test_estimators.py has it; the second prompt has one response left
    report: dict[str, float] = {}
    rewards, mask = [*TWO[0], [7.0, 7.0, 7.0]], [*TWO[1], [1, 1, 1]]
    out = credited(configured(estimator="rloo"), batch_of(rewards, mask), report=report)
    close(out.advantages, [[0.0, -1.0, -1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert report == {"credit/lone_frac": 1 / 3}


def test_rewards_are_scaled_before_the_kl_is_taken_off():
    # deviation of 1, 3, 5 is 2; KL of the first token ln 2 with coefficient 0.5 is not divided
    ln2 = 0.6931471805599453
    report: dict[str, float] = {}
    out = credited(
        configured(scale_rewards="batch"),
        batch_of([[1.0, 3.0], [5.0, 8.0]], [[1, 1], [1, 0]], old=[[0.0, 0.0]] * 2, ref=[[-ln2, 0.0], [0.0, 0.0]]),
        kl_coef=0.5,
        report=report,
    )
    close(out.rewards, [[0.5 - 0.5 * ln2, 1.5], [2.5, 0.0]])
    assert report == {"credit/reward_scale": 2.0}


def test_values_are_read_in_the_unit_that_their_critic_was_trained_in():
    """Step 1: returns 3, 4 have the root mean square sqrt(12.5), which is the unit of what the critic learns. Step 2:
    it says 1 and 0, so V is sqrt(12.5) and 0; with lambda 0 the advantages are r + V_next - V."""
    cfg = configured(scale_values="running", gae_lambda=0, whiten_advantages=False)
    state, report = TrainState.fresh(cfg), {}
    unit = 12.5**0.5
    one = credited(cfg, batch_of([[3.0, 4.0]], [[1, 1]]), running=state.running, report=report)
    close(one.returns, [[3 / unit, 4 / unit]])
    assert report == {"value/scale": pytest.approx(unit), "value/explained_variance": 0.0}

    again = TrainState.fresh(cfg)
    again.restore(json.loads(json.dumps(state.to_json())))
    for running in (state.running, again.running):  # with and without a restart in between
        told: dict[str, float] = {}
        two = credited(cfg, batch_of([[1.0, 2.0]], [[1, 1]], values=[[1.0, 0.0]]), running=running, report=told)
        # in the unit of the returns: errors 1 - unit and 2 about their mean, over returns 1 and 2 about theirs
        assert told["value/explained_variance"] == pytest.approx(1 - (1 + unit) ** 2)
        close(two.advantages, [[1.0 - unit, 2.0]])
        sigma = ((25 + 1 + 4) / 4) ** 0.5  # returns 3, 4, 1, 2
        close(two.returns, [[1 / sigma, 2 / sigma]])
        assert two.values.tolist() == [[1.0, 0.0]]  # what the head says: value clip and loss are in its unit


def test_with_scaled_values_nothing_depends_on_the_size_of_the_rewards():
    cfg = configured(scale_values="running", value_lambda=1.0)
    rewards = [[[1.0, -2.0, 0.5], [0.0, 3.0, 0.0]], [[0.5, 1.0, -1.0], [2.0, 0.0, 0.0]]]
    outs = []
    for size in (1.0, 1000.0):
        running: dict = {}
        for step, values in enumerate((None, [[0.3, -0.2, 0.1], [0.4, 0.0, 0.0]])):
            scaled = [[size * x for x in row] for row in rewards[step]]
            out = credited(cfg, batch_of(scaled, TWO[1], values=values), running=running)
        outs.append(out)
    close(outs[1].returns, outs[0].returns, 1e-9)
    close(outs[1].advantages, outs[0].advantages, 1e-6)


def test_whatever_is_reported_is_in_the_table_of_metrics():
    for options in ({"scale_rewards": "batch", "scale_values": "running"}, {"estimator": "grpo"}):
        report: dict[str, float] = {}
        credited(configured(**options), batch_of(*TWO), report=report)
        assert report and all(lookup(name).name == name for name in report)
