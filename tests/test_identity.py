"""Identities that training must keep: what is equal, what is zero, what never moves, and which way each term pulls."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import conformance
import tiny_models
from conformance import configured, credited, distance, gradient, random_trajectories, same_bits, streams, trajectory
from core.weights import digest_of as digest_of_tensors
from core.weights import named_tensors
from rollout.engines.transformers_engine import TransformersEngine
from trainer.batch import TrainBatch
from trainer.learner import Learner

N = 8


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate():
    conformance.fresh_accelerate()
    yield
    conformance.fresh_accelerate()


def digest_of(it: Learner) -> str:
    """Of every parameter and buffer of the policy, the value head included."""
    return digest_of_tensors(named_tensors(it.policy))


def annotated(it: Learner, seed: int = 0) -> TrainBatch:
    return it.annotate(TrainBatch.collate(random_trajectories(seed, N), it.cfg.rewards))[0]


# ---------------------------------------------------------------- ratio and KL


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_without_a_step_every_ratio_of_every_epoch_is_1(name):
    """Rate 0, so no later mini-batch may see anything but the policy that wrote the batch."""
    cfg = configured(**{"ppo.ppo_epochs": 3, "ppo.mini_batch_size": 2, "rollout.temperature": 0.8})
    it = conformance.learner(cfg, name)
    means = it.update(credited(it, random_trajectories(0, N)))
    assert means["ppo/ratio_mean"] == pytest.approx(1, abs=2e-6) and abs(means["ppo/approx_kl"]) < 2e-6
    assert means["ppo/pg_clipfrac"] == means["ppo/vf_clipfrac"] == 0


def test_kl_of_a_policy_to_its_own_copy_is_0_token_by_token():
    it = conformance.learner(configured(**{"rollout.temperature": 0.6}), ref_seed=0)
    batch = credited(it, random_trajectories(1, N), kl_coef=1.0)
    assert float((batch.old_logprobs - batch.ref_logprobs).abs().max()) < 2e-6
    torch.testing.assert_close(batch.rewards, batch.token_rewards, atol=2e-6, rtol=0)


def test_the_second_epoch_is_measured_against_the_policy_that_wrote_the_batch():
    """Approx_kl over two epochs is half of what one step of a twin moved the log-probs by."""
    rows = random_trajectories(2, N)
    one, two = (
        conformance.learner(configured(**{"ppo.ppo_epochs": epochs, "optim.lr": 1e-3, "optim.schedule": "constant"}))
        for epochs in (1, 2)
    )
    batch = credited(one, rows)
    first, both = one.update(batch), two.update(batch)
    after = one.annotate(TrainBatch.collate(rows, one.cfg.rewards))[0]
    moved = float((batch.old_logprobs - after.old_logprobs)[batch.response_mask].double().mean())
    ratio = float((after.old_logprobs - batch.old_logprobs).exp()[batch.response_mask].double().mean())
    assert abs(moved) > 1e-3 and abs(first["ppo/approx_kl"]) < 1e-6
    assert both["ppo/approx_kl"] == pytest.approx(moved / 2, rel=1e-3, abs=1e-6)
    assert both["ppo/ratio_mean"] == pytest.approx((1 + ratio) / 2, rel=1e-4)


# ---------------------------------------------------------------- samples


def test_samples_of_one_prompt_differ_and_so_do_equal_prompts_of_other_numbers():
    """The same weights, prompt and run seed: (ordinal, k) alone tells responses apart, and repeats them."""
    engine = TransformersEngine(tiny_models.make_model("llama-tied"), (0,), temperature=1.0, max_new_tokens=12)
    request = replace(tiny_models.make_requests(1)[0], ordinal=3)
    asked = [replace(request, ordinal=ordinal, k=k) for ordinal in (3, 4) for k in range(4)]
    written = [tuple(g.response_ids.tolist()) for g in engine.generate(asked)]
    assert len(set(written)) == len(asked)
    assert written == [tuple(g.response_ids.tolist()) for g in engine.generate(asked)]


# ---------------------------------------------------------------- what never moves


@pytest.mark.parametrize("name", tiny_models.configs())
def test_rate_0_keeps_every_digest(name):
    it = conformance.learner(configured(**{"ppo.ppo_epochs": 2, "ppo.mini_batch_size": 4}), name)
    before = digest_of(it), digest_of_tensors(it.export_weights())
    it.update(credited(it, random_trajectories(3, N)))
    assert before == (digest_of(it), digest_of_tensors(it.export_weights()))


def test_the_reference_is_no_part_of_the_policy_and_never_moves():
    """Not one tensor is shared, and what the reference says of a batch keeps its bits over updates."""
    it = conformance.learner(configured(**{"optim.lr": 1e-2, "ppo.ppo_epochs": 3}), ref_seed=0)
    first = annotated(it)
    torch.testing.assert_close(first.old_logprobs, first.ref_logprobs, atol=2e-6, rtol=0)
    for seed in range(3):
        it.update(credited(it, random_trajectories(seed, N)))
    again = annotated(it)
    assert same_bits(first.ref_logprobs, again.ref_logprobs)
    assert float((again.old_logprobs - again.ref_logprobs).abs().max()) > 0.1


ADAPTED = {"model.lora_rank": 2, "model.lora_alpha": 8}


def test_the_reference_of_a_policy_with_an_adapter_is_the_policy_without_it():
    """One trunk serves both: what the reference says keeps its bits while the policy moves, and is that of the LM that
    the adapter was put into."""
    cfg = configured(**ADAPTED, **{"optim.lr": 1e-2, "ppo.ppo_epochs": 3})
    it = Learner(cfg, Accelerator(cpu=True), tiny_models.make_model("llama-tied"), None)
    first, plain = annotated(it), annotated(conformance.learner(configured()))
    for seed in range(3):
        it.update(credited(it, random_trajectories(seed, N)))
    again = annotated(it)
    assert same_bits(first.ref_logprobs, again.ref_logprobs)
    torch.testing.assert_close(first.ref_logprobs, plain.old_logprobs, atol=2e-6, rtol=0)
    assert float((again.old_logprobs - again.ref_logprobs).abs().max()) > 0.1


@pytest.mark.parametrize("value", ["shared", "shared_detached", "separate", "lora"])
def test_in_warm_up_the_value_function_alone_learns(value):
    """As it would without warm-up, but for what reaches a trunk that it shares: that stays as it is."""
    options = {"model.value": value, "ppo.entropy_coef": 0.1, "ppo.kl_loss_coef": 0.1}
    options |= ADAPTED if value == "lora" else {}
    warming, learning = (conformance.learner(configured(**options, **{"ppo.value_warmup_steps": n})) for n in (1, 0))
    batch = credited(warming, random_trajectories(11, N))
    only_value, both = gradient(warming, batch), gradient(learning, batch)
    own = {name for name in both if name.startswith(("value_head.", "critic.")) or ".critic." in name}
    rest = both.keys() - own
    assert rest and len(own) > (1 if value.startswith("shared") else 5)
    for name in own:
        torch.testing.assert_close(only_value[name], both[name], atol=1e-6, rtol=1e-4)
    assert any(only_value[name].any() for name in own) and any(both[name].any() for name in rest)
    assert not any(only_value[name].any() for name in rest)
    second = gradient(warming, batch)
    assert any(second[name].any() for name in rest)


@pytest.mark.parametrize(("value", "reaches"), [("shared", True), ("shared_detached", False), ("separate", False)])
def test_the_gradient_of_the_value_loss_reaches_the_trunk_of_the_policy_where_it_is_meant_to(value, reaches):
    it = conformance.learner(configured(**{"model.value": value, "ppo.vf_coef": 1.0}))
    batch = credited(it, random_trajectories(12, N))
    g = gradient(it, replace(batch, advantages=torch.zeros_like(batch.advantages)))
    assert any(x.any() for name, x in g.items() if name.startswith("lm.")) == reaches
    assert g["value_head.weight"].any()


def test_an_update_writes_into_no_stream_of_its_batch():
    """Old log-probs above all, which every epoch is measured against."""
    it = conformance.learner(configured(**{"optim.lr": 1e-2, "ppo.ppo_epochs": 3, "ppo.mini_batch_size": 4}))
    batch = credited(it, random_trajectories(4, N))
    before = {name: x.clone() for name, x in streams(batch).items()}
    assert before.keys() >= {"old_logprobs", "values", "rewards", "advantages", "returns", "rollout_logprobs"}
    it.update(batch)
    assert all(same_bits(x, before[name]) for name, x in streams(batch).items())


def test_annotating_twice_gives_the_same_bits_and_moves_nothing():
    it = conformance.learner(configured())
    before = digest_of(it)
    one, two = annotated(it), annotated(it)
    assert digest_of(it) == before
    assert all(same_bits(x, streams(two)[name]) for name, x in streams(one).items())


def test_dropout_is_off_in_every_pass_even_where_the_models_come_in_training_mode():
    """GPT-2 ships with dropout 0.1; with it neither two passes nor a pass and the plain model would agree."""
    it = conformance.learner(configured(), "gpt2", change=lambda lm: lm.train())
    assert it.policy.lm.config.attn_pdrop == it.policy.lm.config.resid_pdrop == 0.1
    still = annotated(conformance.learner(configured(), "gpt2"))
    for _ in range(2):
        batch = annotated(it)
        assert same_bits(batch.old_logprobs, still.old_logprobs)
        assert same_bits(batch.ref_logprobs, still.ref_logprobs)
        assert same_bits(batch.values, still.values)
        means = it.update(credited(it, random_trajectories(0, N)))
        assert means["ppo/ratio_mean"] == pytest.approx(1, abs=2e-6)
        assert not any(module.training for module in it.policy.modules())


# ---------------------------------------------------------------- temperature


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_the_temperature_divides_logits_of_policy_and_reference_and_no_value(temperature):
    """A head that is scaled by the temperature undoes it, in both models; values are the same numbers."""

    def scaled(lm: torch.nn.Module) -> None:
        lm.get_output_embeddings().weight.mul_(temperature)

    plain = conformance.learner(configured(), "llama-untied")
    cold = conformance.learner(configured(**{"rollout.temperature": temperature}), "llama-untied", change=scaled)
    unscaled = conformance.learner(configured(**{"rollout.temperature": temperature}), "llama-untied")
    a, b, c = annotated(plain), annotated(cold), annotated(unscaled)
    for stream in ("old_logprobs", "ref_logprobs"):
        torch.testing.assert_close(getattr(b, stream), getattr(a, stream), atol=1e-4, rtol=0)
        assert float((getattr(c, stream) - getattr(a, stream)).abs().max()) > 0.1
    assert torch.equal(b.values, a.values) and torch.equal(c.values, a.values)


def test_the_temperature_is_in_the_gradient_too():
    """d log softmax(z / T) / d z is 1 / T of that of z / T: a head scaled by T gets the gradient divided by T."""

    def scaled(lm: torch.nn.Module) -> None:
        lm.get_output_embeddings().weight.mul_(0.5)

    plain = conformance.learner(configured(**{"ppo.entropy_coef": 0.1}), "llama-untied")
    cold = conformance.learner(
        configured(**{"ppo.entropy_coef": 0.1, "rollout.temperature": 0.5}), "llama-untied", change=scaled
    )
    batch = credited(plain, random_trajectories(5, N))
    one, two = gradient(plain, batch), gradient(cold, batch)
    two["lm.lm_head.weight"] = two["lm.lm_head.weight"] * 0.5
    assert distance(one, two) < 1e-4


# ---------------------------------------------------------------- what each term of the loss leaves, and its direction


def test_without_reward_kl_and_value_there_is_no_gradient_at_all():
    """Rewards 0, the reference alike, the head at 0: every advantage and every return is 0."""
    it = conformance.learner(configured(), ref_seed=0, head_std=0.0)
    silent = [replace(t, component_rewards={c: np.zeros(len(t)) for c in "abc"}) for t in random_trajectories(6, N)]
    batch = credited(it, silent)
    for stream in (batch.rewards, batch.advantages, batch.returns):
        assert not stream.any()
    assert not any(x.any() for x in gradient(it, batch).values())


def test_reward_0_leaves_the_gradient_of_the_kl_alone():
    """The same gradient as from a component that emits -kl_coef * (old - reference), without any KL."""
    it = conformance.learner(configured(**{"rewards.a.weight": 1.0}), head_std=0.0)
    rows = random_trajectories(7, N)
    silent = [replace(t, component_rewards={c: np.zeros(len(t)) for c in "abc"}) for t in rows]
    from_kl = credited(it, silent, kl_coef=0.3)
    penalty = -0.3 * (from_kl.old_logprobs.double() - from_kl.ref_logprobs.double())
    paid = [
        replace(t, component_rewards={**t.component_rewards, "a": penalty[t.request.ordinal, : len(t)].numpy()})
        for t in silent
    ]
    assert distance(gradient(it, from_kl), gradient(it, credited(it, paid, kl_coef=0.0))) < 1e-4


def test_a_step_on_the_kl_alone_goes_towards_the_reference():
    """With gamma 0 each token pays for itself, so the squared differences to the reference must fall."""
    cfg = configured(**{"optim.lr": 1e-4, "ppo.gamma": 0.0, "ppo.vf_coef": 0.0, "ppo.whiten_advantages": False})
    it = conformance.learner(cfg, head_std=0.0)
    silent = [replace(t, component_rewards={c: np.zeros(len(t)) for c in "abc"}) for t in random_trajectories(8, N)]
    before = credited(it, silent, kl_coef=1.0)
    it.update(before)
    after, _ = it.annotate(TrainBatch.collate(silent, cfg.rewards))
    apart = [float((b.old_logprobs - b.ref_logprobs).square().sum()) for b in (before, after)]
    assert apart[1] < 0.999 * apart[0]


def test_a_step_on_the_reward_makes_rewarded_tokens_likelier_and_fined_ones_less_likely():
    cfg = configured(**{"optim.lr": 1e-4, "ppo.gamma": 0.0, "ppo.vf_coef": 0.0, "ppo.whiten_advantages": False})
    it = conformance.learner(cfg, head_std=0.0)
    rows = [
        trajectory(0, [5, 6], [7, 8, 9], rewards={"a": [0, 1, 0]}),
        trajectory(1, [6, 5], [30, 40], rewards={"a": [0, -1]}),
    ]
    before = credited(it, rows, kl_coef=0.0)
    it.update(before)
    after, _ = it.annotate(TrainBatch.collate(rows, cfg.rewards))
    moved = after.old_logprobs - before.old_logprobs
    assert moved[0, 1] > 1e-3 and moved[1, 1] < -1e-3


def test_the_value_loss_moves_values_towards_the_returns():
    """Without its weight the head of the values has no gradient."""
    rows = random_trajectories(9, N)
    still = conformance.learner(configured(**{"ppo.vf_coef": 0.0}))
    g = gradient(still, credited(still, rows))
    heads = [x for name, x in g.items() if name.startswith("value_head.")]
    assert heads and not any(x.any() for x in heads) and any(x.any() for x in g.values())
    cfg = configured(**{"ppo.vf_coef": 1.0, "optim.lr": 1e-3})
    it = conformance.learner(cfg)
    before = credited(it, rows)
    it.update(replace(before, advantages=torch.zeros_like(before.advantages)))
    after, _ = it.annotate(TrainBatch.collate(rows, cfg.rewards))
    off = [float((b.values - before.returns)[before.response_mask].square().mean()) for b in (before, after)]
    assert off[1] < 0.99 * off[0]


def test_the_entropy_bonus_raises_the_entropy():
    cfg = configured(**{"ppo.entropy_coef": 1.0, "ppo.vf_coef": 0.0, "optim.lr": 1e-4})
    it = conformance.learner(cfg)
    _, before = it.annotate(TrainBatch.collate(random_trajectories(10, N), cfg.rewards))
    batch = credited(it, random_trajectories(10, N))
    it.update(replace(batch, advantages=torch.zeros_like(batch.advantages)))
    _, after = it.annotate(TrainBatch.collate(random_trajectories(10, N), cfg.rewards))
    assert after["objective/entropy"] > before["objective/entropy"] + 1e-3
