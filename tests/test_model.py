"""The policy with its value head: the one shift between logits and tokens; agreement with the rollout engine."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models
from core.trajectory import Trajectory
from policy_reading import WAYS, policy_of, read
from rollout.engines.transformers_engine import TransformersEngine
from trainer.batch import TrainBatch

CARDS_BASE = Path(__file__).parents[1] / "examples" / "cards" / "base"


def trajectories(
    name: str, temperature: float, n: int = 12, device: str = "cpu"
) -> tuple[torch.nn.Module, list[Trajectory]]:
    """A random model of that shape, or the trained one of the cards task, and responses that its engine wrote."""
    if name == "cards-base":
        model = AutoModelForCausalLM.from_pretrained(CARDS_BASE, dtype=torch.float32).eval()
    else:
        model = tiny_models.make_model(name)
    model = model.to(device)
    engine = TransformersEngine(model, (0, 7), temperature=temperature, max_new_tokens=20)
    return model, tiny_models.roll_out(engine, n)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("name", [*tiny_models.configs(), "cards-base"])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")],
        ),
    ],
)
def test_rollout_and_learner_agree_on_every_token(device, name, temperature):
    model, rolled = trajectories(name, temperature, device=device)
    batch = TrainBatch.collate(rolled)
    out = read(policy_of(model), batch, temperature, device=device)
    difference = torch.where(batch.response_mask, out.logprobs - batch.rollout_logprobs, 0.0).abs()
    assert batch.response_mask.sum() > 60
    assert difference.max() < 1e-5
    assert ((out.entropy > 0) & (out.entropy < np.log(model.config.vocab_size)))[batch.response_mask].all()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_value_and_logprob_of_a_token_see_the_tokens_before_it_and_no_other(name):
    """Change response token t: values up to t, log-probs before t stay; the value after it moves."""
    model, rolled = trajectories(name, 1.0)
    policy = policy_of(model)
    torch.nn.init.normal_(policy.value_head.weight)
    batch = TrainBatch.collate([max(rolled, key=len)])
    t, n = 4, batch.response_mask.shape[1]
    ids = batch.input_ids.clone()
    ids[0, batch.prompt_width + t] = (ids[0, batch.prompt_width + t] + 1) % tiny_models.VOCABULARY
    old, new = read(policy, batch, 1.0), read(policy, dataclasses.replace(batch, input_ids=ids), 1.0)
    old_lp, old_v, new_lp, new_v = old.logprobs, old.values, new.logprobs, new.values
    torch.testing.assert_close(old_v[0, : t + 1], new_v[0, : t + 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(old_lp[0, :t], new_lp[0, :t], atol=1e-5, rtol=0)
    assert abs(old_lp[0, t] - new_lp[0, t]) > 1e-3 and (old_v[0, t + 1] - new_v[0, t + 1]).abs() > 1e-3
    assert old_v.shape == (1, n + 1)


def test_values_are_not_divided_by_the_temperature():
    model, rolled = trajectories("llama-tied", 1.0)
    policy = policy_of(model)
    torch.nn.init.normal_(policy.value_head.weight)
    batch = TrainBatch.collate(rolled)
    cold, hot = read(policy, batch, 0.5), read(policy, batch, 2.0)
    assert torch.equal(cold.values, hot.values) and not torch.equal(cold.logprobs, hot.logprobs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_padding_changes_nothing(name, way):
    """A row alone, and among rows that are longer on both sides: same log-probs and values."""
    model, rolled = trajectories(name, 1.0)
    policy = policy_of(model, way)
    torch.nn.init.normal_(policy.value_head.weight)
    batch = TrainBatch.collate(rolled)
    together = read(policy, batch, 1.0)
    for i in range(len(batch)):
        row = batch.rows(np.array([i]))
        alone, t = read(policy, row, 1.0), row.response_mask.shape[1]
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[i, :t], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.values[0], together.values[i, : t + 1], atol=1e-4, rtol=0)


def test_head_starts_at_zero_and_dropout_stays_off():
    model, rolled = trajectories("gpt2", 1.0)
    assert model.config.resid_pdrop > 0
    policy = policy_of(model)
    batch = TrainBatch.collate(rolled)
    first, second = read(policy, batch, 1.0), read(policy, batch, 1.0)
    assert torch.equal(first.logprobs, second.logprobs)
    assert (first.values == 0).all()
