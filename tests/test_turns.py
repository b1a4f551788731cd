"""Responses of several turns: who wrote which token, that the policy's log-probs see what an environment wrote, and
that no id depends on the company. The environment is called here; tests/test_environment.py has it in its process.

Legend: T response tokens.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import conformance
import tiny_models
from core.faults import EnvironmentFault
from core.trajectory import Trajectory
from rollout.engines.sampling import Filters
from rollout.engines.transformers_engine import TransformersEngine
from rollout.environment import EnvironmentSpec
from rollout.offsets import OffsetMapper
from rollout.turns import Turns, Written
from trainer import fused_head
from trainer.batch import TrainBatch
from trainer.evaluate import evaluation_rows, evaluation_sums
from trainer.loop import credit, rollout_sums, turns_of

STOP = tuple(range(60))  # so that a random model ends its turns
TOKENIZER = tiny_models.make_tokenizer()
MAPPED = OffsetMapper(TOKENIZER)


class Echo:
    """Answers the first `n` turns with a text of the prompt and the turn, of one to five tokens."""

    def __init__(self, n: int = 99) -> None:
        self.n, self.seen = n, []

    def step(self, turns: list[str], columns: dict[str, Any], uid: str) -> str | None:
        self.seen.append((uid, list(turns)))
        turn = len(turns) // 2 + 1
        return None if turn > self.n else " the cat sat on the mat"[: 4 * (1 + (len(turns[-1]) + turn) % 5)]


def turns(
    environment: Any, name: str = "llama-tied", *, max_turns: int = 4, max_new_tokens: int = 40, slots: int = 64
) -> Turns:
    engine = TransformersEngine(
        tiny_models.make_model(name), STOP, temperature=0.9, max_new_tokens=max_new_tokens, slots=slots
    )
    spec = EnvironmentSpec(
        name="e.py:E",
        load=Echo,
        timeout_s=1.0,
        start_timeout_s=1.0,
        max_turns=max_turns,
        max_new_tokens=max_new_tokens,
    )
    made = Turns(engine, TOKENIZER, spec)
    made._environment = environment
    return made


def runs(mask: np.ndarray) -> list[tuple[bool, int, int]]:
    """(whose, start, stop) of each run of equal entries."""
    edges = [0, *(np.flatnonzero(np.diff(mask.astype(int))) + 1).tolist(), len(mask)]
    return [(bool(mask[a]), a, b) for a, b in zip(edges, edges[1:], strict=False)]


@pytest.mark.parametrize("in_slots", [True, False])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_logprobs_are_those_of_one_forward_over_all_that_stands_there(name, in_slots):
    """Of the policy's tokens alone; where the environment wrote they are 0, and ids are the tokenizer's."""
    echo = Echo()
    it = turns(echo, name)
    it._engine.in_slots = in_slots
    asked = tiny_models.make_requests(16)
    written, many = it.write(asked), 0
    answers = {
        (uid, len(said) // 2): Echo().step(said, {}, uid) for uid, said in echo.seen
    }  # what was said after each turn
    for request, w in zip(asked, written, strict=True):
        ids = torch.from_numpy(np.concatenate([request.prompt_ids, w.response_ids]))[None]
        with torch.no_grad():
            logits = it._engine.model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1].double() / 0.9
        want = logits.log_softmax(-1).gather(-1, torch.from_numpy(w.response_ids)[:, None])[:, 0].numpy()
        assert np.abs(want - w.logprobs)[w.action_mask].max() < 1e-5
        assert not w.logprobs[~w.action_mask].any()
        parts = runs(w.action_mask)
        assert parts[0][0] and parts[-1][0]  # it begins and ends with the policy's
        for number, (own, a, b) in enumerate(parts):
            if not own:
                text = answers[request.sample_uid, number // 2]
                assert w.response_ids[a:b].tolist() == TOKENIZER.encode(text, add_special_tokens=False)
                assert w.response_ids[a - 1] in STOP and w.action_mask[a - 1]  # the stop token is an action
        many += len(parts) > 3
    assert many > 3


def same(a: list[Written], b: list[Written]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.response_ids.tolist() == y.response_ids.tolist() and x.finish_reason == y.finish_reason
        assert x.action_mask.tolist() == y.action_mask.tolist()
        np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-5)


def test_ids_depend_neither_on_slots_nor_on_the_chunk():
    asked = tiny_models.make_requests(12)
    want = turns(Echo()).write(asked)
    assert len({len(w.response_ids) for w in want}) > 4
    for n in (1, 3, 5):
        same(turns(Echo(), slots=n).write(asked), want)
    for size in (1, 5):
        it = turns(Echo())
        same([w for i in range(0, 12, size) for w in it.write(asked[i : i + size])], want)
    same(turns(Echo()).write(asked[::-1])[::-1], want)


def test_with_a_filter_nothing_was_drawn_for_what_the_environment_wrote():
    """And a trajectory with such tokens is whole: the policy's are among those that they were drawn from."""
    it = turns(Echo())
    it._engine.filters = Filters(top_p=0.8)
    masked = 0
    for w in it.write(tiny_models.make_requests(8)):
        sizes = np.diff(w.kept.starts)
        assert len(sizes) == len(w.response_ids)
        assert (sizes[w.action_mask] > 0).all() and not sizes[~w.action_mask].any()
        assert w.kept.hold(w.response_ids, w.action_mask)
        masked += int((~w.action_mask).sum())
    assert masked > 10


def test_without_an_environment_it_is_what_the_engine_writes():
    asked = tiny_models.make_requests(6)
    it = turns(None)
    it._spec = None
    for w, g in zip(it.write(asked), it._engine.generate(asked), strict=True):
        assert w.response_ids.tolist() == g.response_ids.tolist() and w.logprobs.tolist() == g.logprobs.tolist()
        assert w.action_mask.all() and w.finish_reason == g.finish_reason


@pytest.mark.parametrize("max_turns", [1, 2, 3])
def test_the_environment_is_not_asked_after_the_last_turn(max_turns):
    echo = Echo()
    written = turns(echo, max_turns=max_turns).write(tiny_models.make_requests(12))
    assert max(sum(own for own, _, _ in runs(w.action_mask)) for w in written) == max_turns
    assert all(len(said) // 2 + 1 < max_turns for _, said in echo.seen)
    assert all(w.action_mask[-1] and w.finish_reason == "stop" for w in written if w.response_ids[-1] in STOP)


def test_none_ends_the_response_where_the_turn_ended():
    written = turns(Echo(1)).write(tiny_models.make_requests(12))
    assert {sum(own for own, _, _ in runs(w.action_mask)) for w in written} <= {1, 2}
    assert {w.finish_reason for w in written if len(w.response_ids) < 40} == {"stop"}


class Long:
    """An observation of `n` tokens."""

    def __init__(self, n: int) -> None:
        self.n = n

    def step(self, turns: list[str], columns: dict[str, Any], uid: str) -> str:
        return "\x01" * self.n  # one token a byte


@pytest.mark.parametrize("room", [0, 1, 2])
def test_an_observation_that_leaves_no_room_is_left_out_and_the_response_is_cut(room):
    asked = tiny_models.make_requests(1)
    (first,) = turns(Echo(), max_turns=1).write(asked)
    n = len(first.response_ids)
    assert first.finish_reason == "stop" and n < 30
    (w,) = turns(Long(40 - n - room)).write(asked)
    if room == 0:
        assert w.response_ids.tolist() == first.response_ids.tolist()
        assert w.finish_reason == "length" and w.action_mask.all()
    else:
        assert not w.action_mask[n : 40 - room].any() and w.action_mask[40 - room :].all()
        assert len(w.response_ids) > 40 - room


def test_the_environment_sees_the_text_turn_by_turn_and_offsets_count_in_the_whole():
    echo = Echo()
    asked = tiny_models.make_requests(12)
    last = {}
    written = turns(echo).write(asked)
    for uid, said in echo.seen:
        assert len(said) % 2 == 1
        assert said[: len(last.get(uid, []))] == last.get(uid, [])  # what was said stays said
        last[uid] = said
    for request, w in zip(asked, written, strict=True):
        text, offsets = MAPPED(w.response_ids)
        assert w.token_offsets.tolist() == offsets.tolist() and w.token_offsets.max() == len(text)
        parts = [text[w.token_offsets[a, 0] : w.token_offsets[a:b, 1].max()] for _, a, b in runs(w.action_mask)]
        assert parts[: len(last[request.sample_uid])] == last[request.sample_uid]


def test_an_observation_without_a_token_is_a_fault_with_environment_and_uid():
    it = turns(Long(0))
    (request,) = tiny_models.make_requests(1)
    with pytest.raises(EnvironmentFault, match=rf"e\.py:E: sample {request.sample_uid}.*no token"):
        it.write([request])


# ------------------------------------------------------------------------------------------------------ at the learner


def scored(name: str, n: int = 12) -> list[Trajectory]:
    """What two turns or more of random models look like when it is rewarded."""
    rng, asked = np.random.default_rng(2), tiny_models.make_requests(n)
    out = []
    for request, w in zip(asked, turns(Echo(), name).write(asked), strict=True):
        t = len(w.response_ids)
        rewards = {c: np.where(w.action_mask, rng.normal(size=t), 0.0) for c in "abc"}
        out.append(
            Trajectory(
                request=request,
                response_ids=w.response_ids,
                rollout_logprobs=w.logprobs,
                action_mask=w.action_mask,
                token_offsets=w.token_offsets,
                policy_version=np.zeros(t, dtype=np.int64),
                finish_reason=w.finish_reason,
                finished_at=0.0,
                component_rewards=rewards,
                component_mask={c: np.ones(t, dtype=bool) for c in "abc"},
            )
        )
    assert any(not t.action_mask.all() for t in out) and {"stop", "length"} == {t.finish_reason for t in out}
    return out


WAYS = ("packed", "padded, fused head", "padded, whole logits")
SETTINGS = {"rollout.temperature": 0.9, "ppo.whiten_advantages": False, "ppo.micro_batch_size": 5}


@pytest.fixture
def fresh():
    conformance.fresh_accelerate()
    yield
    conformance.fresh_accelerate()


def learner(name: str, way: str, **more: object) -> Any:
    cfg = conformance.configured(**{"rollout.batch_size": 12, "ppo.mini_batch_size": 12}, **SETTINGS, **more)
    it = conformance.learner(cfg, name)
    for reader in (it.policy.reader, it._ref._reader):
        reader.packed, reader.fused = way == "packed", way != "padded, whole logits"
        if not reader.packed:
            reader.lm.set_attn_implementation("sdpa")
    return it


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_the_learner_has_the_logprobs_of_the_rollout(fresh, name, way):
    """And what stands where the environment wrote is never read: NaN there is as good as 0."""
    rows, it = scored(name), learner(name, way)
    holes = [
        dataclasses.replace(t, rollout_logprobs=np.where(t.action_mask, t.rollout_logprobs, np.nan).astype(np.float32))
        for t in rows
    ]
    batch, means = it.annotate(TrainBatch.collate(holes, it.cfg.rewards))
    off = (batch.old_logprobs - batch.rollout_logprobs)[batch.response_mask].abs().max()
    assert float(off) < 1e-5 and means["logprob_diff/max"] < 1e-5
    assert not batch.old_logprobs[~batch.response_mask].any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_the_gradient_is_that_of_a_plain_sum_over_the_policys_tokens(fresh, name, way):
    """Each row alone through a model of its own; at ratio 1 the loss is sum(-A ratio + c (V - ret)^2 / 2) / N."""
    rows, it = scored(name), learner(name, way, **{"ppo.bootstrap_cut": True})
    batch = conformance.credited(it, rows)
    got = conformance.gradient(it, batch)
    lm = tiny_models.make_model(name)
    head = it.policy.value_head
    for p in head.parameters():
        p.grad = None
    n, cfg = int(batch.response_mask.sum()), it.cfg.ppo
    by_ordinal = {t.request.ordinal: t for t in rows}
    for i, (ordinal, _) in enumerate(batch.order.tolist()):
        t = by_ordinal[ordinal]
        first = len(t.request.prompt_ids)
        ids = torch.from_numpy(np.concatenate([t.request.prompt_ids, t.response_ids]))
        out = lm(input_ids=ids[None], output_hidden_states=True)
        own = torch.from_numpy(np.flatnonzero(t.action_mask))
        logp = (out.logits[0] / 0.9).log_softmax(-1)[first - 1 + own, ids[first + own]]
        values = head(out.hidden_states[-1][0, first - 1 + own]).squeeze(-1)
        ratio = (logp - logp.detach()).exp()
        loss = -batch.advantages[i, own] * ratio + cfg.vf_coef * 0.5 * (values - batch.returns[i, own]).square()
        (loss.sum() / n).backward()
    want = {name: p.grad for name, p in lm.named_parameters()}
    of_lm = {key.removeprefix("lm."): g for key, g in got.items() if key.startswith("lm.")}
    assert of_lm.keys() == want.keys()
    assert conformance.distance(of_lm, want) < 2e-5
    of_head = {f"value_head.{key}": p.grad for key, p in head.named_parameters()}
    assert conformance.distance({key: got[key] for key in of_head}, of_head) < 2e-5


def test_no_logits_are_made_where_the_environment_wrote(fresh, monkeypatch):
    """The head sees one state for each token of the policy: those of others cost no product with the vocabulary."""
    rows, it = scored("llama-tied"), learner("llama-tied", "packed")
    batch, seen, before = conformance.credited(it, rows), [], fused_head.loss_of_tokens

    def look(layer: torch.nn.Module, states: torch.Tensor, *args: object, **more: object) -> object:
        seen.append(len(states))
        return before(layer, states, *args, **more)

    monkeypatch.setattr(fused_head, "loss_of_tokens", look)
    it.update(batch)
    assert sum(seen) == int(batch.response_mask.sum()) < int(batch.response_lengths.sum())


@pytest.mark.parametrize("estimator", ["gae", "reinforce_pp", "rloo", "grpo"])
def test_credit_is_that_of_the_same_tokens_without_holes(fresh, estimator):
    """Observations are no time steps for any estimator, nor for a lambda that goes by the length."""
    rows = [
        dataclasses.replace(t, request=dataclasses.replace(t.request, k=i % 2, ordinal=i // 2))
        for i, t in enumerate(scored("gpt2"))
    ]
    settings = {"ppo.estimator": estimator, "ppo.bootstrap_cut": estimator == "gae"}
    settings |= {"rollout.n_samples_per_prompt": 2, "ppo.kl_coef": 0.0}
    settings |= {"ppo.lambda_alpha": 0.05} if estimator == "gae" else {}
    it = learner("gpt2", "packed", **settings)
    batch = conformance.credited(it, rows)
    width = int(batch.response_mask.sum(dim=1).max())

    def left(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(x), width, dtype=x.dtype)
        for row, values, mask in zip(out, x, batch.response_mask, strict=True):
            row[: int(mask.sum())] = values[mask]
        return out

    written = {name: left(getattr(batch, name)) for name in ("token_rewards", "old_logprobs", "ref_logprobs", "values")}
    dense = dataclasses.replace(
        batch,
        response_mask=left(batch.response_mask),
        response_lengths=batch.response_mask.sum(dim=1),
        **written,
        rewards=None,
        advantages=None,
        returns=None,
    )
    got = credit(it.cfg, dense, conformance.KL_COEF, lambda x: x)
    for name in ("rewards", "advantages", "returns"):
        torch.testing.assert_close(getattr(got, name), left(getattr(batch, name)), atol=1e-6, rtol=0)
        assert not getattr(batch, name)[~batch.response_mask].any()


def test_metrics_count_what_the_policy_wrote():
    t = conformance.trajectory(0, [1], [5, 6, 7, 8, 9], actions=[True, True, False, False, True])
    other = conformance.trajectory(1, [1], [5, 6])
    cfg = conformance.configured()
    batch = TrainBatch.collate([t, other], cfg.rewards)
    means = rollout_sums(batch, conformance.combined(cfg, batch), [t, other], version=0).means()
    assert means["response/length_mean"] == 2.5 and means["response/turns_mean"] == 1.5
    evaluated = evaluation_sums(evaluation_rows([t, other], cfg.rewards), cfg.rewards).means()
    assert evaluated["eval/response/length_mean"] == 2.5
    assert turns_of(torch.tensor([[False, True, False, True], [False, False, False, False]])) == 2
