"""Alignment, against a plain loop: each response alone, without padding, through the model itself, token by token.

`read` is the oracle. It knows nothing of batches or packing: it takes one trajectory, asks models of its own for the
logits of its ids, and follows DESIGN.md section 7 with Python numbers. Reward placement, masks, the state that a value
belongs to, KL, the bootstrap and GAE of the code must say the same for every token.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

import conformance
from conformance import EOS, KL_COEF, configured, credited, random_trajectories, trajectory
from core.schema import Config
from core.trajectory import Trajectory
from trainer.batch import TrainBatch
from trainer.learner import Learner

N = 12  # responses of a batch


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate():
    conformance.fresh_accelerate()
    yield
    conformance.fresh_accelerate()


@dataclass
class Reading:
    """One response as the oracle has it: a list entry for each response token, 0 where a tool wrote it."""

    token_rewards: list[float] = field(default_factory=list)
    old_logprobs: list[float] = field(default_factory=list)
    ref_logprobs: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)


OF_MODELS = ("old_logprobs", "ref_logprobs", "values")
STREAMS = (*OF_MODELS, "token_rewards", "rewards", "advantages", "returns")
LIMIT = {"gpt2": 1e-6, "llama-tied": 2e-4}  # GPT-2 in float64, but token rewards are kept in float32
LIMIT_OF_MODELS = {"gpt2": 1e-12, "llama-tied": 2e-4}
models_and_widths = pytest.mark.parametrize(
    ("name", "wide"), [("gpt2", True), ("llama-tied", False)], ids=["gpt2 in float64", "llama in float32"]
)


def limit(name: str, stream: str) -> float:
    return (LIMIT_OF_MODELS if stream in OF_MODELS else LIMIT)[name]


def log_softmax(row: list[float], temperature: float) -> list[float]:
    scaled = [x / temperature for x in row]
    top = max(scaled)
    norm = top + math.log(math.fsum(math.exp(x - top) for x in scaled))
    return [x - norm for x in scaled]


@torch.no_grad()
def look(it: Learner, lm: torch.nn.Module, ids: list[int]) -> tuple[list[list[float]], list[float]]:
    """Logits after each id and the value of the state that ends with it."""
    out = lm(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return out.logits[0].tolist(), it.policy.value_head(out.hidden_states[-1][0]).squeeze(-1).tolist()


def read(it: Learner, models: tuple[torch.nn.Module, torch.nn.Module], t: Trajectory, kl_coef: float) -> Reading:
    """`models`: what `models_of` gives."""
    cfg: Config = it.cfg
    lm, ref_lm = models
    prompt, response = t.request.prompt_ids.tolist(), t.response_ids.tolist()
    logits, values = look(it, lm, prompt + response)
    ref_logits, _ = look(it, ref_lm, prompt + response)
    reading = Reading()
    for i, token in enumerate(response):
        before = len(prompt) + i - 1  # the last id that the policy has seen when it chooses response token i
        logp = log_softmax(logits[before], cfg.rollout.temperature)
        if not t.action_mask[i]:
            for name in (*STREAMS, "entropy"):
                getattr(reading, name).append(0.0)
            continue
        ref_logp = log_softmax(ref_logits[before], cfg.rollout.temperature)
        total = 0.0
        for name, spec in cfg.rewards.items():
            if t.component_mask[name][i]:
                total += spec.weight * t.component_rewards[name][i]
        reading.token_rewards.append(total)
        reading.old_logprobs.append(logp[token])
        reading.ref_logprobs.append(ref_logp[token])
        reading.values.append(values[before])
        reading.entropy.append(-math.fsum(math.exp(x) * x for x in logp))
        reading.rewards.append(total - kl_coef * (logp[token] - ref_logp[token]))
        reading.advantages.append(0.0)
        reading.returns.append(0.0)
    own = [i for i in range(len(response)) if t.action_mask[i]]
    next_value = values[-1] if t.finish_reason == "length" and cfg.ppo.bootstrap_cut else 0.0
    next_advantage = 0.0
    for i in reversed(own):
        delta = reading.rewards[i] + cfg.ppo.gamma * next_value - reading.values[i]
        next_advantage = delta + cfg.ppo.gamma * cfg.ppo.gae_lambda * next_advantage
        next_value = reading.values[i]
        reading.advantages[i] = next_advantage
        reading.returns[i] = next_advantage + reading.values[i]
    return reading


def models_of(it: Learner, name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Policy and reference as transformers made them, with the weights that the policy has now: the learner's own LM
    was switched to attention over segments, these were not."""
    lm, ref_lm = (conformance.tiny_models.make_model(name, seed=seed).to(it.policy.lm.dtype) for seed in (0, 1))
    lm.load_state_dict(it.policy.lm.state_dict())
    return lm, ref_lm


SETTINGS = {
    "plain": {},
    "cold": {"rollout.temperature": 0.7, "ppo.gamma": 0.9},
    "hot and bootstrapped": {"rollout.temperature": 1.4, "ppo.gamma": 0.97, "ppo.bootstrap_cut": True},
}


@models_and_widths
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_stream_of_every_token_is_what_the_loop_says(name, wide, setting):
    """10 batches of 12 responses, each with prompts and lengths of its own."""
    cfg = configured(**SETTINGS[setting], **{"ppo.whiten_advantages": False, "ppo.micro_batch_size": 5})
    it = conformance.learner(cfg, name, wide=wide)
    models = models_of(it, name)
    for seed in range(10 if wide else 4):
        rows = random_trajectories(seed, N)
        batch = credited(it, rows)
        assert batch.order.tolist() == [[i, 0] for i in range(N)]
        for t in rows:
            reading, row = read(it, models, t, KL_COEF), t.request.ordinal
            assert batch.response_mask[row].tolist() == t.action_mask.tolist() + [False] * (
                batch.response_mask.shape[1] - len(t)
            )
            for stream in STREAMS:
                got, want = getattr(batch, stream)[row].tolist(), getattr(reading, stream)
                for i, x in enumerate(want):
                    assert got[i] == pytest.approx(x, abs=limit(name, stream) * max(1, abs(x))), (stream, seed, row, i)
                assert not any(got[len(t) :]), f"{stream} is not 0 behind response {row}"
                assert not any(x for x, own in zip(got, t.action_mask, strict=False) if not own), stream


@models_and_widths
def test_after_an_update_the_streams_are_those_of_the_new_weights(name, wide):
    """Nothing of the old ones is kept: neither a cast of the head nor a prompt that was read before."""
    cfg = configured(**{"optim.lr": 1e-3, "ppo.whiten_advantages": False, "ppo.vf_coef": 1.0})
    it = conformance.learner(cfg, name, wide=wide)
    rows = random_trajectories(0, N)
    before = credited(it, rows)
    it.update(before)
    after, models = credited(it, rows), models_of(it, name)
    assert float((after.old_logprobs - before.old_logprobs).abs().max()) > 1e-2
    for t in rows:
        reading, row = read(it, models, t, KL_COEF), t.request.ordinal
        for stream in STREAMS:
            got, want = getattr(after, stream)[row, : len(t)].tolist(), getattr(reading, stream)
            assert got == pytest.approx(want, abs=limit(name, stream) * max(1, *map(abs, want))), (stream, row)


def test_the_metrics_of_annotate_are_sums_over_tokens_of_the_policy():
    """KL in nats per response, entropy and log-prob difference per token of the policy; nothing else is counted."""
    it = conformance.learner(configured(**{"rollout.temperature": 0.7}), "gpt2", wide=True)
    models = models_of(it, "gpt2")
    rows = random_trajectories(3, N)
    _, means = it.annotate(TrainBatch.collate(rows, it.cfg.rewards))
    readings = [read(it, models, t, 0.0) for t in rows]
    n = sum(int(t.action_mask.sum()) for t in rows)
    kl = sum(a - b for r in readings for a, b in zip(r.old_logprobs, r.ref_logprobs, strict=True))
    apart = [
        abs(x - float(y))
        for r, t in zip(readings, rows, strict=True)
        for x, y, own in zip(r.old_logprobs, t.rollout_logprobs, t.action_mask, strict=True)
        if own
    ]
    assert means["objective/kl"] == pytest.approx(kl / N, rel=1e-5)
    assert means["objective/entropy"] == pytest.approx(sum(sum(r.entropy) for r in readings) / n, rel=1e-5)
    assert means["logprob_diff/mean"] == pytest.approx(sum(apart) / n, rel=1e-5)
    assert means["logprob_diff/max"] == pytest.approx(max(apart), rel=1e-5)


def test_whitening_is_over_the_tokens_of_the_policy_and_comes_after_the_returns():
    """Returns are those of the raw advantages; what is whitened has mean 0 and deviation 1."""
    it = conformance.learner(configured(), "gpt2", wide=True)
    models = models_of(it, "gpt2")
    rows = random_trajectories(4, N)
    batch = credited(it, rows)
    readings = {t.request.ordinal: (t, read(it, models, t, KL_COEF)) for t in rows}
    raw = [a for t, r in readings.values() for a, own in zip(r.advantages, t.action_mask, strict=True) if own]
    mean = math.fsum(raw) / len(raw)
    deviation = math.sqrt(math.fsum((a - mean) ** 2 for a in raw) / (len(raw) - 1))
    for row, (t, reading) in readings.items():
        for i, own in enumerate(t.action_mask):
            if own:
                want = (reading.advantages[i] - mean) / deviation
                assert float(batch.advantages[row, i]) == pytest.approx(want, abs=1e-5)
                assert float(batch.returns[row, i]) == pytest.approx(reading.returns[i], abs=1e-5)


def test_the_losses_at_the_first_step_are_the_means_of_the_formula():
    """Policy loss -mean(A) and half the mean square of V - return, over the tokens of the policy in the whole batch."""
    it = conformance.learner(configured(**{"ppo.whiten_advantages": False}), "gpt2", wide=True)
    models = models_of(it, "gpt2")
    rows = random_trajectories(5, N)
    means = it.update(credited(it, rows))
    own = [
        (reading.advantages[i], reading.values[i] - reading.returns[i])
        for t in rows
        for reading in [read(it, models, t, KL_COEF)]
        for i in range(len(t))
        if t.action_mask[i]
    ]
    assert means["loss/policy"] == pytest.approx(-math.fsum(a for a, _ in own) / len(own), rel=1e-5)
    assert means["loss/value"] == pytest.approx(0.5 * math.fsum(d * d for _, d in own) / len(own), rel=1e-5)


@pytest.mark.parametrize("cut", [False, True])
def test_an_eos_token_is_an_action_though_it_pads_too(cut):
    """A reward on it alone makes it likelier, whether it ended the response or stands in a cut one."""
    cfg = configured(**{"ppo.whiten_advantages": False, "optim.lr": 1e-3})
    it = conformance.learner(cfg, head_std=0.0)
    rows = [trajectory(0, [5, EOS, 6], [9, EOS], cut=cut, rewards={"a": [0, 1]}), trajectory(1, [5] * 9, [9] * 9)]
    before = credited(it, rows, kl_coef=0)
    assert before.response_mask[0].tolist() == [True, True] + [False] * 7
    assert float(before.advantages[0, 1]) == pytest.approx(0.7)
    it.update(before)
    after, _ = it.annotate(TrainBatch.collate(rows, cfg.rewards))
    assert float(after.old_logprobs[0, 1]) > float(before.old_logprobs[0, 1]) + 1e-3


def test_a_token_that_a_tool_wrote_has_no_gradient():
    """Its log-prob is no part of the loss, whatever reward stands on it; the model reads it all the same."""
    it = conformance.learner(configured(**{"ppo.whiten_advantages": False, "ppo.vf_coef": 0.0}), "gpt2", wide=True)
    actions = [True, False, False, True]
    rewards = {"a": [0.0, 5.0, 5.0, 0.0]}
    batch = credited(it, [trajectory(0, [5, 6], [9, 8, 7, 6], actions=actions, rewards=rewards)], kl_coef=0)
    silent = credited(it, [trajectory(0, [5, 6], [9, 8, 7, 6], actions=actions)], kl_coef=0)
    assert batch.response_mask[0].tolist() == actions
    assert conformance.distance(conformance.gradient(it, batch), conformance.gradient(it, silent)) == 0


@torch.no_grad()
def test_the_value_of_a_token_is_that_of_the_state_before_it():
    """Without a model in between: a head that reads positions, so V_t must be P - 1 + t, counted from the prompt."""
    position = torch.nn.Parameter(torch.zeros(256, 32, dtype=torch.float64))
    position[:, 0] = torch.arange(256, dtype=torch.float64)

    def counts_only(lm: torch.nn.Module) -> None:
        for block in lm.transformer.h:  # nothing but the embedding of the position reaches the end
            for layer in (block.attn.c_proj, block.mlp.c_proj):
                layer.weight.zero_()
                layer.bias.zero_()
        lm.transformer.wte.weight.zero_()
        lm.transformer.ln_f = torch.nn.Identity()

    cfg = configured(**{"ppo.bootstrap_cut": True})
    it = conformance.learner(cfg, "gpt2", wide=True, change=counts_only)
    it.policy.lm.transformer.wpe.weight.copy_(position)
    it.policy.value_head.weight.zero_()
    it.policy.value_head.weight[0, 0] = 1.0
    it.policy.value_head.bias.zero_()
    rows = [trajectory(0, [5] * 3, [1, 2], cut=True), trajectory(1, [5] * 8, [3] * 6), trajectory(2, [5], [4] * 4)]
    batch, _ = it.annotate(TrainBatch.collate(rows, cfg.rewards))
    assert batch.values[0, :2].tolist() == [2.0, 3.0] and float(batch.bootstrap_values[0]) == 4.0
    assert batch.values[1, :6].tolist() == [7.0, 8.0, 9.0, 10.0, 11.0, 12.0] and float(batch.bootstrap_values[1]) == 0
    assert batch.values[2, :4].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_the_reward_of_a_response_is_conserved():
    """What the components emitted on tokens of the policy, weighted, is what GAE reads before KL."""
    it = conformance.learner(configured())
    for seed in range(5):
        rows = random_trajectories(seed, N)
        batch = credited(it, rows)
        for t in rows:
            want = math.fsum(
                spec.weight * float(np.where(t.action_mask & t.component_mask[c], t.component_rewards[c], 0).sum())
                for c, spec in it.cfg.rewards.items()
            )
            assert float(batch.token_rewards[t.request.ordinal].sum()) == pytest.approx(want, abs=1e-5)
