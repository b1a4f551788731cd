"""Values that workers give while they write (`rollout.emit_values`): those of the learner, and held against them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, BloomConfig, PreTrainedModel

import tiny_models
from core.config import load
from core.faults import InvariantFault, UserError
from core.schema import Config
from core.trajectory import Trajectory
from rollout.engines.engine import Generation
from rollout.engines.sampling import Filters
from rollout.engines.transformers_engine import TransformersEngine
from trainer.batch import TrainBatch
from trainer.learner import Learner
from trainer.loop import credit
from weight_delivery import receiver_of, send

N, LONGEST = 12, 16
MODELS = [*tiny_models.configs(), "bloom"]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its state for the process; each test has its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def model(name: str, seed: int = 0) -> PreTrainedModel:
    """Those of tiny_models, and one without positions, which is written side by side."""
    if name != "bloom":
        return tiny_models.make_model(name, seed=seed)
    torch.manual_seed(seed)
    config = BloomConfig(vocab_size=tiny_models.VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def a_head(width: int = 32, seed: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((1, width), generator=generator)
    return {"value_head.weight": weight, "value_head.bias": torch.tensor([0.25])}


def engine(name: str = "llama-tied", *, values: bool = True, **more: object) -> TransformersEngine:
    """It stops at many ids, so that some responses are cut and others are not."""
    options = {"temperature": 0.8, "max_new_tokens": LONGEST, "stop": tuple(range(30))} | more
    served = TransformersEngine(model(name), values=values, **options)
    if values:
        for key, x in a_head().items():
            served.live_tensors()[key].data = x
    return served


def own_values(served: TransformersEngine, prompt_ids: np.ndarray, response_ids: np.ndarray) -> np.ndarray:
    """[T + 1] of one plain forward: before each token, and behind the last."""
    ids, head = torch.from_numpy(np.concatenate([prompt_ids, response_ids]))[None], a_head()
    with torch.no_grad():
        states = served.model.base_model(input_ids=ids).last_hidden_state[0, len(prompt_ids) - 1 :]
    return (states @ head["value_head.weight"][0] + head["value_head.bias"]).numpy()


def check(served: TransformersEngine, plain: TransformersEngine, n: int = 21) -> list[Generation]:
    asked = tiny_models.make_requests(n)
    out = served.generate(asked)
    for request, got, other in zip(asked, out, plain.generate(asked), strict=True):
        assert got.response_ids.tolist() == other.response_ids.tolist() and got.finish_reason == other.finish_reason
        np.testing.assert_allclose(got.logprobs, other.logprobs, atol=1e-5)
        want = own_values(served, request.prompt_ids, got.response_ids)
        np.testing.assert_allclose(got.values, want[:-1], atol=2e-5)
        if got.finish_reason == "length":
            assert got.bootstrap == pytest.approx(want[-1], abs=2e-5)
        else:
            assert got.bootstrap is None
        assert other.values is None and other.bootstrap is None
    assert {g.finish_reason for g in out} == {"stop", "length"}
    return out


@pytest.mark.parametrize("slots", [4, 64])
@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_a_plain_forward_and_no_id_depends_on_them(name, slots):
    check(engine(name, slots=slots), engine(name, values=False, slots=slots))


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("name", ["llama-tied", "bloom"])
def test_filters_beside_them(name, slots):
    """With one slot there are steps in which no token is drawn: the only response is full."""
    filters = Filters(top_p=0.8)
    out = check(engine(name, slots=slots, filters=filters), engine(name, values=False, slots=slots, filters=filters))
    assert all(len(g.kept) == len(g.response_ids) for g in out)


@pytest.mark.parametrize("name", ["llama-untied", "gpt2"])
def test_side_by_side_too(name):
    served, plain = engine(name), engine(name, values=False)
    served.in_slots = plain.in_slots = False
    check(served, plain)


@pytest.mark.parametrize("in_slots", [True, False])
@pytest.mark.parametrize("longest", [1, 2])
def test_a_full_response_waits_for_one_step_in_which_nothing_ends_it(longest, in_slots):
    """Every second id ends a response: one that is drawn behind the last token must not."""
    served = engine(max_new_tokens=longest, stop=tuple(range(0, tiny_models.VOCABULARY, 2)))
    served.in_slots = in_slots
    written = served.generate(tiny_models.make_requests(40))
    for g in written:
        assert len(g.response_ids) == len(g.values) <= longest
        assert (g.finish_reason == "stop") == (int(g.response_ids[-1]) % 2 == 0) == (g.bootstrap is None)
    assert {g.finish_reason for g in written} == {"stop", "length"}


def configured(**overrides: object) -> Config:
    settings = {
        **tiny_models.LEARNER_SETTINGS,
        "rollout.batch_size": N,
        "rollout.emit_values": True,
        "rollout.temperature": 0.8,
        "rollout.max_new_tokens": LONGEST,
        "ppo.mini_batch_size": N,
        "ppo.micro_batch_size": 5,
        "ppo.ppo_epochs": 1,
        "ppo.bootstrap_cut": True,
        "optim.lr": 1e-3,
        **overrides,
    }
    return load(None, settings, folder=Path("/nowhere"))


def learner(cfg: Config, name: str = "llama-tied") -> Learner:
    it = Learner(cfg, Accelerator(cpu=True), model(name), None if cfg.model.lora_rank else model(name))
    with torch.no_grad():
        for key, x in a_head().items():
            it.policy.value_head.get_parameter(key.removeprefix("value_head.")).copy_(x)
    return it


def written(served: TransformersEngine) -> list[Trajectory]:
    return tiny_models.roll_out(served, N)


def update(it: Learner, batch: TrainBatch) -> dict[str, float]:
    rewarded = batch.fill(token_rewards=batch.component_rewards["a"].float())
    return it.update(credit(it.cfg, rewarded, 0.02, it.ranks.sum))


@pytest.mark.parametrize("value", ["shared", "shared_detached"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "qwen3-untied", "bloom"])
def test_the_learner_takes_what_it_would_have_computed(name, value):
    it, trajectories = learner(configured(**{"model.value": value}), name), written(engine(name))
    batch = TrainBatch.collate(trajectories)
    taken, means = it.annotate(batch)
    own, own_means = it.annotate(batch, own=True)
    mask = batch.response_mask
    assert torch.equal(taken.old_logprobs[mask], batch.rollout_logprobs[mask])
    assert torch.equal(taken.values[mask], batch.rollout_values[mask])
    for field in ("old_logprobs", "values", "ref_logprobs", "bootstrap_values"):
        torch.testing.assert_close(getattr(taken, field), getattr(own, field), atol=3e-5, rtol=0)
    assert taken.bootstrap_values.abs().sum() > 0 and bool((taken.bootstrap_values[~batch.cut] == 0).all())
    assert means["objective/kl"] == pytest.approx(own_means["objective/kl"], abs=1e-4)
    assert means["objective/entropy"] == pytest.approx(float(-batch.rollout_logprobs[mask].mean()), rel=1e-5)
    assert not {name for name in means if name.startswith("logprob_diff")} and "logprob_diff/max" in own_means
    stats = update(it, taken)
    assert stats["logprob_diff/max"] < 3e-5 and 0 < stats["value/diff_mean"] < stats["value/diff_max"] < 3e-5
    assert stats["ppo/first_ratio_error"] < 1e-4


def test_no_forward_of_the_policy_is_left_before_the_update():
    it, batch = learner(configured()), TrainBatch.collate(written(engine()))
    calls = []
    it.policy.register_forward_pre_hook(lambda *_: calls.append(1))
    it.annotate(batch)
    assert not calls
    it.annotate(batch, own=True)
    assert calls


def off(what: str, by: float) -> Callable[[Trajectory], Trajectory]:
    return lambda t: replace(t, **{what: getattr(t, what) + np.float32(by)})


def bootstrap(to: Callable[[float], float]) -> Callable[[Trajectory], Trajectory]:
    return lambda t: t if t.rollout_bootstrap is None else replace(t, rollout_bootstrap=to(t.rollout_bootstrap))


def shifted(t: Trajectory) -> Trajectory:
    return replace(t, rollout_values=np.roll(t.rollout_values, -1))


SPOILT = {
    "log-probs": (off("rollout_logprobs", 0.01), "log-probs of rollout workers and learner differ by 0.01"),
    "log-probs a little": (off("rollout_logprobs", 3e-5), "mean over the first mini-batch"),
    "values": (off("rollout_values", 0.1), "values of rollout workers and learner differ"),
    "values of the next token": (shifted, "values of rollout workers and learner differ"),
    "a bootstrap of 0": (bootstrap(lambda x: 0.0), "values of rollout workers and learner differ"),
    "a bootstrap": (bootstrap(lambda x: x + 1), "values of rollout workers and learner differ"),
}


@pytest.mark.parametrize("name", SPOILT)
@pytest.mark.parametrize("micro", [1, 12])
def test_workers_that_compute_something_else_stop_the_first_mini_batch(name, micro):
    spoil, words = SPOILT[name]
    more = {"ppo.mini_batch_size": N // 2, "ppo.micro_batch_size": micro, "ppo.bootstrap_cut": "bootstrap" in name}
    it = learner(configured(**more))
    before = {n: x.clone() for n, x in it.export_weights().items()}
    spoilt = [spoil(t) for t in written(engine())]
    it.step = 1  # before the first step policy and reference are compared as well
    with pytest.raises(InvariantFault, match=words):
        update(it, it.annotate(TrainBatch.collate(spoilt))[0])
    assert all(torch.equal(x, before[n]) for n, x in it.export_weights().items())
    unchecked = learner(configured(**more, **{"run.checks": False}))
    update(unchecked, unchecked.annotate(TrainBatch.collate(spoilt))[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("what", ["not sent", "twice as large", "of the next token"])
def test_a_wrong_value_head_is_found_whatever_the_unit_of_rewards(what, size, dtype):
    """In bfloat16 too, where a log-prob may be off by much. The workers' head is zero until their first version."""
    cfg = configured(**{"model.dtype": dtype})
    it = Learner(cfg, Accelerator(cpu=True), model("llama-tied"), model("llama-tied"))
    with torch.no_grad():
        it.policy.value_head.weight.copy_(a_head()["value_head.weight"] * size)
    lm = model("llama-tied").to(getattr(torch, dtype))
    served = TransformersEngine(lm, tuple(range(30)), values=True, temperature=0.8, max_new_tokens=LONGEST)
    sent = it.export_weights()
    if what != "not sent":
        send(receiver_of(served.live_tensors()), sent, 1)
        served.use_weights()
    change = {"of the next token": shifted, "twice as large": lambda t: replace(t, rollout_values=2 * t.rollout_values)}
    wrong = [change.get(what, lambda t: t)(t) for t in written(served)]
    with pytest.raises(InvariantFault, match="values of rollout workers and learner differ"):
        update(it, it.annotate(TrainBatch.collate(wrong))[0])
    send(receiver_of(served.live_tensors()), sent, 2)
    served.use_weights()
    stats = update(it, it.annotate(TrainBatch.collate(written(served)))[0])
    assert stats["value/diff_mean"] < (1e-5 if dtype == "float32" else 0.02)


def test_the_reference_must_have_come_with_the_rewards_where_nothing_is_computed():
    it = Learner(configured(**{"model.reference": "reward_server"}), Accelerator(cpu=True), model("llama-tied"), None)
    scored = [replace(t, ref_logprobs=t.rollout_logprobs) for t in written(engine())]
    assert it.annotate(TrainBatch.collate(scored))[1]["objective/kl"] == 0
    with pytest.raises(AssertionError, match="no reference came with the rewards"):
        it.annotate(TrainBatch.collate([replace(scored[0], ref_logprobs=None), *scored[1:]]))


def test_a_first_mini_batch_with_none_of_the_tokens_of_this_process_says_nothing():
    it = learner(configured())
    batch, _ = it.annotate(TrainBatch.collate(written(engine())))
    blind = replace(batch, response_mask=torch.zeros_like(batch.response_mask))
    assert not {name for name in update(it, blind) if "diff" in name}


@pytest.mark.parametrize("more", [{}, {"model.lora_rank": 2}, {"model.dtype": "bfloat16"}])
@pytest.mark.parametrize("name", ["llama-tied", "qwen3-untied"])
def test_the_head_travels_with_the_policy(name, more):
    it = learner(configured(**more), name)
    served = engine(name)
    sent, live = it.export_weights(), served.live_tensors()
    assert sent["value_head.weight"].dtype == torch.float32
    assert [s.name for s in it.stream_weights().specs][-2:] == ["value_head.weight", "value_head.bias"]
    for key in a_head():
        live[key].data = torch.zeros_like(live[key])
    for version in (1, 2):
        send(receiver_of(live), sent, version)
    for key, x in a_head().items():
        assert torch.equal(served.live_tensors()[key], x)
    plain = learner(configured(**more, **{"rollout.emit_values": False}), name)
    assert sent.keys() - plain.export_weights().keys() == a_head().keys()
    for offered, receiver in ((plain.export_weights(), live), (sent, engine(name, values=False).live_tensors())):
        with pytest.raises(InvariantFault, match=r"do not fit this model at \['value_head"):
            send(receiver_of(receiver), offered, 1)


def test_what_workers_cannot_value_is_refused():
    for more, words in (
        ({"rollout.max_staleness": 1}, "rollout.max_staleness = 1 learns from what older weights wrote"),
        ({"rollout.round_tokens": 4}, "rollout.round_tokens = 4 goes on with what older weights began"),
        ({"rollout.environment": "my.tools:Tool"}, "rollout.environment = my.tools:Tool puts tokens between"),
        ({"rollout.engine": "vllm"}, "rollout.engine = vllm gives no states"),
        ({"model.value": "separate"}, "model.value = separate reads other states"),
        ({"model.value_heads": "components"}, "says several values"),
        ({"ppo.estimator": "reinforce_pp", "ppo.bootstrap_cut": False}, "ppo.estimator = reinforce_pp reads no values"),
        ({"ppo.importance_cap": 2.0}, "ppo.importance_cap = 2.0 wants the learner's log-probs"),
    ):
        with pytest.raises(UserError) as refused:
            configured(**more)
        assert words in str(refused.value) and "rollout.emit_values = true" in str(refused.value), str(refused.value)
    broken = [replace(t, rollout_values=None, rollout_bootstrap=None) for t in written(engine())]
    with pytest.raises(AssertionError, match="gave none"):
        learner(configured()).annotate(TrainBatch.collate(broken))
    with pytest.raises(AssertionError, match="responses have values"):
        TrainBatch.collate([broken[0], *written(engine())[1:]])
