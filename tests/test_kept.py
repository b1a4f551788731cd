"""Kept ids in the learner: log-probs, entropies, reference and gradients are over what the engine drew from."""

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import tiny_models
from core.config import load
from core.faults import InvariantFault, UserError
from core.schema import Config
from core.trajectory import KeptTokens, Trajectory
from rollout.engines.sampling import Filters
from rollout.engines.transformers_engine import TransformersEngine
from rollout.weight_receiver import WeightReceiver
from trainer import fused_head
from trainer.batch import TrainBatch
from trainer.fused_head import loss_of_tokens, score
from trainer.kept import KeptSets
from trainer.learner import Learner
from trainer.loop import credit
from trainer.model import PolicyWithValueHead, inputs_of
from weight_delivery import send

N = 12
NUCLEUS = Filters(top_p=0.9)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its state for the process; each test has its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def configured(n: int = N, **overrides: object) -> Config:
    settings = {
        **tiny_models.LEARNER_SETTINGS,
        "rollout.batch_size": n,
        "rollout.top_p": 0.9,
        "ppo.mini_batch_size": n,
        "ppo.micro_batch_size": 5,
        "ppo.ppo_epochs": 1,
        "optim.lr": 1e-3,
    }
    return load(None, settings | overrides, folder=Path("/nowhere"))


def engine(
    name: str = "llama-tied", temperature: float = 1.0, filters: Filters | None = NUCLEUS, slots: int = 64
) -> TransformersEngine:
    stop = tuple(range(30))  # many, so that lengths differ
    settings = {"temperature": temperature, "max_new_tokens": 16, "slots": slots}
    return TransformersEngine(tiny_models.make_model(name), stop, filters=filters, **settings)


def learner(cfg: Config, name: str = "llama-tied") -> Learner:
    ref = None if cfg.reference == "adapter" else tiny_models.make_model(name)
    return Learner(cfg, Accelerator(cpu=True), tiny_models.make_model(name), ref)


def credited(cfg: Config, it: Learner, batch: TrainBatch) -> TrainBatch:
    return credit(cfg, batch.fill(token_rewards=batch.component_rewards["a"].float()), 0.02, it.ranks.sum)


def whole_logits(model: torch.nn.Module, t: Trajectory) -> torch.Tensor:
    """[T, V] of one row alone, by transformers' own forward."""
    ids = torch.from_numpy(np.concatenate([t.request.prompt_ids, t.response_ids]))
    return model(input_ids=ids[None]).logits[0, len(t.request.prompt_ids) - 1 : -1]


def masked_log_softmax(logits: torch.Tensor, kept: KeptTokens, temperature: float) -> torch.Tensor:
    left_out = ~torch.from_numpy(kept.dense(logits.shape[-1]))
    return (logits / temperature).masked_fill(left_out, -torch.inf).log_softmax(-1)


# ------------------------------------------------------------------------------------------------------ the fused head


def made_up(m: int = 37, h: int = 8, v: int = 23) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer, states, tokens and [m, v] bool: between one and all ids of each, the token among them."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(h, v, dtype=torch.float64)
    states = torch.randn(m, h, dtype=torch.float64, requires_grad=True)
    token, keep = torch.randint(0, v, (m,)), torch.rand(m, v) < torch.rand(m, 1)
    keep[0], keep[1] = False, True
    keep[torch.arange(m), token] = True
    return layer, states, token, keep


def sets(keep: torch.Tensor) -> KeptSets:
    tokens = KeptTokens.of([row.nonzero()[:, 0].numpy() for row in keep])
    return KeptSets.of([tokens], torch.ones(1, len(keep), dtype=torch.bool), torch.device("cpu"))


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("chunk", [1, 5, 37, 100])
def test_the_fused_head_is_autograd_over_masked_logits(monkeypatch, chunk, temperature, with_entropy):
    monkeypatch.setattr(fused_head, "chunk_size", lambda n_vocab, device: chunk)
    layer, states, token, keep = made_up()
    weights = torch.randn(len(token), dtype=torch.float64)

    def token_loss(logprobs, entropy, at):
        loss = (-weights[at] * (logprobs + 2).exp()).sum()
        return loss if entropy is None else loss - 5 * (entropy * (1 + weights[at] ** 2)).sum(), {}

    logp = (layer(states) / temperature).masked_fill(~keep, -torch.inf).log_softmax(-1)
    picked = logp[torch.arange(len(token)), token]
    entropy = -(logp.exp() * logp.masked_fill(~keep, 0.0)).sum(-1)
    want, _ = token_loss(picked, entropy if with_entropy else None, slice(None))
    leaves = [states, *layer.parameters()]
    wanted = torch.autograd.grad(want, leaves)
    got, _ = loss_of_tokens(
        layer, states, token, temperature, lambda *a: token_loss(*a), with_entropy=with_entropy, kept=sets(keep)
    )
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    for a, b in zip(torch.autograd.grad(got, leaves), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    logprobs, entropies = score(layer, states, token, temperature, sets(keep))
    torch.testing.assert_close(logprobs, picked.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(entropies, entropy.detach(), atol=1e-12, rtol=0)


def test_what_is_left_out_gets_a_gradient_of_0_and_one_kept_id_is_certain():
    """Ids that no token may be drawn from: their rows of the weight and bias do not move at all, not by rounding."""
    layer, states, token, keep = made_up()
    keep[:, 20:] = False
    token = torch.where(token >= 20, keep.double().argmax(-1), token)
    keep[torch.arange(len(token)), token] = True
    loss, _ = loss_of_tokens(
        layer, states, token, 0.7, lambda lp, e, at: (lp.sum() + 3 * e.sum(), {}), with_entropy=True, kept=sets(keep)
    )
    loss.backward()
    assert not layer.weight.grad[20:].any() and not layer.bias.grad[20:].any() and layer.weight.grad[:20].any()
    assert torch.isfinite(layer.weight.grad).all() and torch.isfinite(states.grad).all()
    alone = keep.sum(-1) == 1
    assert alone.any() and not states.grad[alone].any()
    logprobs, entropy = score(layer, states, token, 0.7, sets(keep))
    assert not logprobs[alone].any() and not entropy[alone].any()


@pytest.mark.parametrize("form", ["packed", "padded", "own logits"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_gradients_of_a_model_are_those_of_plain_autograd_over_masked_logits(name, form):
    """float64, in every way in which the learner reads a model; each row alone on the other side."""
    rows = tiny_models.roll_out(engine(name, 0.8), 6)
    policy = PolicyWithValueHead(tiny_models.make_model(name).double(), configured().model).eval()
    assert policy.reader.packed
    policy.reader.fused = form != "own logits"
    batch = TrainBatch.collate(rows)
    inputs = inputs_of(batch, torch.device("cpu"), packed=form == "packed")
    if form != "packed":  # the padded ways want the model's own attention
        policy.lm.set_attn_implementation("sdpa")
    weights = torch.from_numpy(np.random.default_rng(0).normal(size=len(inputs.token)))

    def token_loss(logprobs, entropy, at):
        return (weights[at] * logprobs).sum() - 0.3 * (weights[at] ** 2 * entropy).sum(), {}

    loss, *_ = policy(inputs, 0.8, token_loss, with_entropy=True)
    parameters = [p for p in policy.lm.parameters() if p.requires_grad]
    got = torch.autograd.grad(loss, parameters)
    plain, want, start = tiny_models.make_model(name).double(), 0.0, 0
    for t in sorted(rows, key=lambda t: t.order):
        logp = masked_log_softmax(whole_logits(plain, t), t.kept, 0.8)
        picked = logp[torch.arange(len(t)), torch.from_numpy(t.response_ids)]
        dense = torch.from_numpy(t.kept.dense(logp.shape[-1]))
        entropy = -(logp.exp() * logp.masked_fill(~dense, 0.0)).sum(-1)
        want = want + token_loss(picked, entropy, slice(start, start + len(t)))[0]
        start += len(t)
    torch.testing.assert_close(loss, want, atol=1e-12, rtol=1e-12)
    for a, b in zip(got, torch.autograd.grad(want, list(plain.parameters())), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12 * max(1.0, float(b.abs().max())), rtol=0)


# --------------------------------------------------------------------------------------------------------- the learner


@pytest.mark.parametrize("filters", [None, NUCLEUS], ids=["all", "top_p"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
def test_a_thousand_responses_before_and_after_a_weight_sync(name, temperature, filters):
    """At most 1e-5 on any token between what the engine told and one forward of the learner; the ratio is 1."""
    n, top_p = 1024, 1.0 if filters is None else 0.9
    settings = {"rollout.temperature": temperature, "rollout.top_p": top_p, "ppo.micro_batch_size": 128}
    cfg, served = configured(n, **settings), engine(name, temperature, filters, slots=256)
    it = learner(cfg, name)
    batch, means = it.annotate(TrainBatch.collate(tiny_models.roll_out(served, n)))
    assert batch.response_lengths.unique().numel() > 10
    assert means["logprob_diff/max"] <= 1e-5
    stats = it.update(credited(cfg, it, batch))
    assert stats["ppo/ratio_mean"] == pytest.approx(1, abs=1e-5) and abs(stats["ppo/approx_kl"]) < 1e-6
    send(WeightReceiver(served.live_tensors), it.export_weights(), 1)
    served.use_weights()
    again, means = it.annotate(TrainBatch.collate(tiny_models.roll_out(served, n)))
    assert means["logprob_diff/max"] <= 1e-5
    assert (again.old_logprobs - again.ref_logprobs).abs().max() > 1e-3  # the engine has other weights than at first


@pytest.mark.parametrize("reference", ["copy", "adapter", "offload"])
def test_the_reference_is_over_the_same_ids_and_the_entropy_too(reference):
    """By hand, one row after the other: log-probs of the base model over the kept ids, after the policy has moved."""
    lora = {"model.lora_rank": 4, "optim.lr": 0.1} if reference == "adapter" else {"optim.lr": 0.01}
    cfg = configured(**{"model.reference": reference, **lora})
    it, rows = learner(cfg), sorted(tiny_models.roll_out(engine(), N), key=lambda t: t.order)
    batch, means = it.annotate(TrainBatch.collate(rows))
    base, entropies = tiny_models.make_model("llama-tied"), []
    for t, ref in zip(rows, batch.ref_logprobs, strict=True):
        with torch.no_grad():
            logp = masked_log_softmax(whole_logits(base, t), t.kept, 1.0)
        picked = logp[torch.arange(len(t)), torch.from_numpy(t.response_ids)]
        torch.testing.assert_close(ref[: len(t)], picked, atol=1e-5, rtol=0)
        entropies.append(-torch.nan_to_num(logp.exp() * logp).sum(-1))
    assert means["objective/entropy"] == pytest.approx(float(torch.cat(entropies).mean()), abs=1e-5)
    it.update(credited(cfg, it, batch))
    it.cfg = configured(**{"model.reference": reference, **lora, "run.checks": False})  # the rollout is an old one
    again, means = it.annotate(TrainBatch.collate(rows))
    torch.testing.assert_close(again.ref_logprobs, batch.ref_logprobs, atol=1e-6, rtol=0)
    assert (again.old_logprobs - batch.old_logprobs).abs().max() > 1e-3


def test_caps_clips_and_kl_in_the_loss_work_on_them():
    """Ratio and importance weight are 1 and every KL 0 at the first update, under all filters together."""
    filters = {"rollout.top_k": 60, "rollout.top_p": 0.95, "rollout.min_p": 0.01}
    losses = {"ppo.importance_cap": 2.0, "ppo.kl_loss_coef": 0.1, "ppo.entropy_coef": 0.01, "ppo.dual_clip": 3.0}
    cfg = configured(**filters, **losses)
    it = learner(cfg)
    rows = tiny_models.roll_out(engine(filters=Filters(**cfg.rollout.filters)), N)
    batch, means = it.annotate(TrainBatch.collate(rows))
    stats = it.update(credited(cfg, it, batch))
    assert stats["ppo/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert stats["ppo/importance_mean"] == pytest.approx(1, abs=1e-5)
    assert stats["loss/kl"] == pytest.approx(0, abs=1e-6) and means["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert stats["loss/entropy"] == pytest.approx(means["objective/entropy"], abs=1e-5)


def test_the_numbers_do_not_depend_on_the_micro_batch():
    found = []
    for micro in (1, 5, 12):
        cfg = configured(**{"ppo.micro_batch_size": micro, "ppo.entropy_coef": 0.01})
        it = learner(cfg)
        batch, _ = it.annotate(TrainBatch.collate(tiny_models.roll_out(engine(), N)))
        found.append(it.update(credited(cfg, it, batch)))
        AcceleratorState._reset_state(reset_partial_state=True)
    for key in ("loss/policy", "loss/entropy", "optim/grad_norm"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-4, abs=1e-6) == found[2][key], key


def test_an_engine_that_says_not_what_it_kept_is_refused():
    rows = [dataclasses.replace(t, kept=None) for t in tiny_models.roll_out(engine(), N)]
    with pytest.raises(UserError, match="rollout.top_p = 0.9: this rollout engine does not say which tokens it kept"):
        learner(configured()).annotate(TrainBatch.collate(rows))


def test_kept_ids_that_were_not_those_of_the_engine_stop_the_run():
    """What the checks are for: the sets of another nucleus, wider by a few ids."""
    rows = tiny_models.roll_out(engine(), N)
    wider = [
        dataclasses.replace(t, kept=KeptTokens.of([np.unique([*t.kept[i], 3, 4, 5]) for i in range(len(t))]))
        for t in rows
    ]
    with pytest.raises(InvariantFault, match="rollout workers and learner differ"):
        learner(configured()).annotate(TrainBatch.collate(wider))


# --------------------------------------------------------------------------------------------------------- the records


def test_kept_tokens_by_hand():
    kept = KeptTokens.of([np.array([4, 9, 250]), np.array([13])])
    assert kept.ids.tolist() == [4, 9, 250, 13] and kept.starts.tolist() == [0, 3, 4] and len(kept) == 2
    assert kept.ids.dtype == np.int32 and kept[0].tolist() == [4, 9, 250] and kept[1].tolist() == [13]
    every = np.array([True, True])
    assert kept.hold(np.array([9, 13]), every) and not kept.hold(np.array([13, 9]), every)
    assert not kept.hold(np.array([9]), every[:1])
    assert kept.hold(np.array([9, 7]), np.array([True, False]))  # nothing was drawn for a token of an environment
    assert kept.dense(251).nonzero()[1].tolist() == kept.ids.tolist()
    assert len(KeptTokens.of([])) == 0


def test_a_trajectory_keeps_them_on_its_way_and_refuses_those_of_another():
    (a,) = tiny_models.roll_out(engine(), 1)
    back = pickle.loads(pickle.dumps(dataclasses.replace(a, component_rewards={}, component_mask={}), protocol=5))
    scored = back.scored({"a": np.zeros(len(a))}, {"a": np.ones(len(a), dtype=bool)}, scored_at=1.0)
    assert scored.kept.ids.tolist() == a.kept.ids.tolist() and scored.kept.starts.tolist() == a.kept.starts.tolist()
    with pytest.raises(AssertionError, match="not among those it was drawn from"):
        dataclasses.replace(a, kept=KeptTokens.of([np.array([i + 1]) for i in a.response_ids.tolist()]))


def test_a_batch_picks_the_sets_of_its_rows_and_of_the_tokens_that_are_scored():
    rows = tiny_models.roll_out(engine(), 5)
    masked = dataclasses.replace(rows[2], action_mask=np.arange(len(rows[2])) % 2 == 0)
    batch = TrainBatch.collate([*rows[:2], masked, *rows[3:]][::-1])
    part = batch.rows(np.array([3, 2]))
    assert [k.ids.tolist() for k in part.kept] == [rows[3].kept.ids.tolist(), rows[2].kept.ids.tolist()]
    inputs = inputs_of(part, torch.device("cpu"), packed=True)
    want = [*(rows[3].kept[t] for t in range(len(rows[3]))), *(rows[2].kept[t] for t in range(0, len(rows[2]), 2))]
    assert [x.nonzero()[:, 0].tolist() for x in inputs.kept.keep(slice(0, 99), 320)] == [x.tolist() for x in want]
    assert inputs.token.tolist() == [*rows[3].response_ids.tolist(), *rows[2].response_ids[::2].tolist()]
    idle = inputs_of(batch.idle(), torch.device("cpu"), packed=True)
    assert len(idle.token) == 0 and idle.kept is None
    with pytest.raises(AssertionError, match="1 of 2 responses have kept tokens"):
        TrainBatch.collate([rows[0], dataclasses.replace(rows[1], kept=None)])
