"""The options of the algorithm in a real update of a tiny model: what is off moves nothing, what is on is reported."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import tiny_models
from core.config import load
from core.metrics import lookup
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


def updated(**options: object) -> tuple[Learner, dict[str, float]]:
    """A learner after one update, and what it reports."""
    sizes = {"rollout.batch_size": N, "ppo.mini_batch_size": N, "ppo.micro_batch_size": 4, "ppo.ppo_epochs": 1}
    sizes |= {"rollout.n_samples_per_prompt": 2, "optim.lr": 1e-3}
    ppo = {f"ppo.{key}": value for key, value in options.items()}
    cfg = load(None, tiny_models.LEARNER_SETTINGS | sizes | ppo, folder=Path("/nowhere"))
    engine = TransformersEngine(tiny_models.make_model("llama-tied"), tuple(range(30)), max_new_tokens=8, temperature=1)
    models = (tiny_models.make_model("llama-tied") for _ in range(2))
    it = Learner(cfg, Accelerator(cpu=True), *models)
    batch, _ = it.annotate(TrainBatch.collate(tiny_models.roll_out(engine, N)))
    batch.order[:, 0] //= 2  # as if two samples had one prompt
    batch = credit(cfg, batch.fill(token_rewards=batch.component_rewards["a"].float()), 0.02, it.ranks.sum)
    return it, it.update(batch)


@pytest.mark.parametrize("estimator", ["reinforce_pp", "rloo", "grpo"])
def test_without_a_critic_the_policy_learns_and_the_value_head_stays(estimator):
    it, means = updated(estimator=estimator)
    assert not it.policy.value_head.weight.any() and not it.policy.value_head.bias.any()
    assert means["optim/grad_norm"] > 0 and "loss/value" not in means
    fresh = tiny_models.make_model("llama-tied").state_dict()
    assert any(not torch.equal(x, fresh[name]) for name, x in it.policy.lm.state_dict().items())


def test_every_term_of_the_loss_is_reported():
    _, means = updated(kl_loss_coef=0.1, importance_cap=2.0, entropy_coef=0.01, scale_values="running")
    assert all(lookup(name).name == name for name in means)
    # before the first step: policy and reference are one model, workers and learner agree, all ratios are 1
    assert means["loss/kl"] == pytest.approx(0, abs=1e-6)
    assert means["ppo/importance_mean"] == pytest.approx(1, abs=1e-4) and means["ppo/importance_capped_frac"] == 0
    assert means["loss/value"] == pytest.approx(0.5, abs=1e-4)  # of values 0 and returns of root mean square 1
    assert means["loss/entropy"] > 0
