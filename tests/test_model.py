"""The policy with its value head: the one shift between logits and tokens; agreement with the rollout engine."""

import numpy as np
import pytest
import torch

import tiny_models
from core.trajectory import PromptRequest, Trajectory, sample_uid
from rollout.engines.transformers_engine import TransformersEngine
from trainer.batch import TrainBatch
from trainer.model import PolicyWithValueHead, run_policy


def trajectories(name: str, temperature: float, n: int = 12) -> tuple[torch.nn.Module, list[Trajectory]]:
    rng = np.random.default_rng(3)
    model = tiny_models.make_model(name)
    asked = [
        PromptRequest(
            ordinal=i,
            k=0,
            sample_uid=sample_uid("t", i, 0),
            prompt_ids=rng.integers(1, tiny_models.VOCABULARY, size=2 + i % 5),
            columns={"prompt": ""},
            seed=0,
        )
        for i in range(n)
    ]
    engine = TransformersEngine(model, (0, 7), temperature=temperature, max_new_tokens=20)
    out = []
    for request, g in zip(asked, engine.generate(asked), strict=True):
        t = len(g.response_ids)
        out.append(
            Trajectory(
                request=request,
                response_ids=g.response_ids,
                rollout_logprobs=g.logprobs,
                action_mask=np.ones(t, dtype=bool),
                token_offsets=np.zeros((t, 2), dtype=np.int64),
                policy_version=np.zeros(t, dtype=np.int64),
                finish_reason=g.finish_reason,
                finished_at=0.0,
                component_rewards={"a": np.arange(t, dtype=np.float64)},
                component_mask={"a": np.ones(t, dtype=bool)},
            )
        )
    return model, out


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("name", tiny_models.configs())
def test_rollout_and_learner_agree_on_every_token(name, temperature):
    model, rolled = trajectories(name, temperature)
    batch = TrainBatch.collate(rolled)
    with torch.no_grad():
        out = run_policy(PolicyWithValueHead(model).eval(), batch, temperature, with_entropy=True)
    difference = torch.where(batch.response_mask, out.logprobs - batch.rollout_logprobs, 0.0).abs()
    assert batch.response_mask.sum() > 60
    assert difference.max() < 1e-5
    assert ((out.entropy > 0) & (out.entropy < np.log(tiny_models.VOCABULARY)))[batch.response_mask].all()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_value_and_logprob_of_a_token_see_the_tokens_before_it_and_no_other(name):
    """Change response token t: values up to t, log-probs before t stay; the value after it moves."""
    model, rolled = trajectories(name, 1.0)
    policy = PolicyWithValueHead(model).eval()
    torch.nn.init.normal_(policy.value_head.weight)
    batch = TrainBatch.collate([max(rolled, key=len)])
    t, n = 4, batch.response_mask.shape[1]
    changed = batch.input_ids.clone()
    changed[0, batch.prompt_width + t] = (changed[0, batch.prompt_width + t] + 1) % tiny_models.VOCABULARY
    with torch.no_grad():
        args = (batch.prompt_lengths, batch.response_lengths, n, 1.0)
        (old_lp, old_v, _), (new_lp, new_v, _) = policy(batch.input_ids, *args), policy(changed, *args)
    torch.testing.assert_close(old_v[0, : t + 1], new_v[0, : t + 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(old_lp[0, :t], new_lp[0, :t], atol=1e-5, rtol=0)
    assert abs(old_lp[0, t] - new_lp[0, t]) > 1e-3 and (old_v[0, t + 1] - new_v[0, t + 1]).abs() > 1e-3
    assert old_v.shape == (1, n + 1)


def test_values_are_not_divided_by_the_temperature():
    model, rolled = trajectories("llama-tied", 1.0)
    policy = PolicyWithValueHead(model).eval()
    torch.nn.init.normal_(policy.value_head.weight)
    batch = TrainBatch.collate(rolled)
    with torch.no_grad():
        cold, hot = run_policy(policy, batch, 0.5), run_policy(policy, batch, 2.0)
    assert torch.equal(cold.values, hot.values) and not torch.equal(cold.logprobs, hot.logprobs)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_padding_changes_nothing(name):
    """A row alone, and among rows that are longer on both sides: same log-probs and values."""
    model, rolled = trajectories(name, 1.0)
    policy = PolicyWithValueHead(model).eval()
    torch.nn.init.normal_(policy.value_head.weight)
    batch = TrainBatch.collate(rolled)
    with torch.no_grad():
        together = run_policy(policy, batch, 1.0)
        for i in range(len(batch)):
            row = batch.rows(np.array([i]))
            alone, t = run_policy(policy, row, 1.0), row.response_mask.shape[1]
            torch.testing.assert_close(alone.logprobs[0], together.logprobs[i, :t], atol=1e-5, rtol=0)
            torch.testing.assert_close(alone.values[0], together.values[i, : t + 1], atol=1e-4, rtol=0)


def test_head_starts_at_zero_and_dropout_stays_off():
    model, rolled = trajectories("gpt2", 1.0)
    assert model.config.resid_pdrop > 0
    policy = PolicyWithValueHead(model).eval()
    batch = TrainBatch.collate(rolled)
    first, second = run_policy(policy, batch, 1.0), run_policy(policy, batch, 1.0)
    assert torch.equal(first.logprobs, second.logprobs)
    assert (first.values == 0).all()
