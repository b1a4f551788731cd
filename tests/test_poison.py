"""Whatever stands at a slot that is not the policy's: no stream, no metric, no gradient and no weight changes a bit.

Slots behind a response, before one, and in it where a tool wrote: NaN, infinities, 1e6 and 0 must be one to all that
reads a batch. A product with the mask would not do: 0 * NaN is NaN.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import conformance
from conformance import KL_COEF, configured, random_trajectories, same_bits, streams
from core.faults import InvariantFault
from core.trajectory import Trajectory
from trainer.batch import TrainBatch
from trainer.learner import Learner
from trainer.loop import credit, rollout_sums

N = 8
POISONS = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "1e6": 1e6}
poisons = pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
SETTINGS = {"ppo.bootstrap_cut": True, "ppo.entropy_coef": 0.01, "ppo.ppo_epochs": 2, "ppo.mini_batch_size": 4}


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate():
    conformance.fresh_accelerate()
    yield
    conformance.fresh_accelerate()


@pytest.fixture(scope="module")
def still() -> Learner:
    """Its rate is 0: it may annotate and update as often as one likes."""
    return conformance.learner(configured(**SETTINGS))


@pytest.fixture(scope="module")
def rows() -> list[Trajectory]:
    out = random_trajectories(0, N)
    assert any(0 < t.action_mask.sum() < len(t) for t in out) and len({len(t) for t in out}) > 3
    return out


def spoil(batch: TrainBatch, names: tuple[str, ...], poison: float) -> TrainBatch:
    """The batch with the poison at each masked slot of the named streams."""

    def drip(x: Tensor) -> Tensor:
        return torch.where(batch.response_mask, x, torch.tensor(poison, dtype=x.dtype))

    changed = {}
    for name in names:
        x = getattr(batch, name)
        changed[name] = {key: drip(v) for key, v in x.items()} if isinstance(x, dict) else drip(x)
    return replace(batch, **changed)


def credit_of(it: Learner, batch: TrainBatch) -> TrainBatch:
    total = conformance.combined(it.cfg, batch).token_rewards
    return credit(it.cfg, batch.fill(token_rewards=total), KL_COEF, lambda x: x)


def assert_same(got: TrainBatch, want: TrainBatch, names: tuple[str, ...]) -> None:
    for name in names:
        assert same_bits(getattr(got, name), getattr(want, name)), name


WRITTEN = ("old_logprobs", "ref_logprobs", "values", "bootstrap_values")
CREDITED = ("token_rewards", "rewards", "advantages", "returns")


@poisons
def test_what_workers_and_rewards_left_at_tokens_of_a_tool(still, rows, poison):
    """In the trajectories themselves: an engine has no log-prob for such a token, and a component may say anything."""

    def spoiled(t: Trajectory) -> Trajectory:
        def drip(x: np.ndarray) -> np.ndarray:
            return np.where(t.action_mask, x, poison).astype(x.dtype)

        rewards = {name: drip(x) for name, x in t.component_rewards.items()}
        return replace(t, rollout_logprobs=drip(t.rollout_logprobs), component_rewards=rewards)

    results = []
    for trajectories in (rows, [spoiled(t) for t in rows]):
        batch, means = still.annotate(TrainBatch.collate(trajectories, still.cfg.rewards))
        total = conformance.combined(still.cfg, batch)
        results.append((credit_of(still, batch), means, rollout_sums(batch, total, trajectories, version=0).means()))
    (clean, *clean_means), (bad, *bad_means) = results
    assert np.isfinite(list(clean_means[0].values()) + list(clean_means[1].values())).all()
    assert bad_means == clean_means
    assert_same(bad, clean, (*WRITTEN, *CREDITED))


@poisons
def test_where_a_component_does_not_apply(still, rows, poison):
    """None as an answer is no number: what stands in its place counts for nothing, also for deviations."""
    cfg = configured(**{"rewards.a.normalize": "batch", "rewards.b.normalize": "running", "rewards.b.clip": 1.0})
    batch = TrainBatch.collate(rows, cfg.rewards)
    bad = {
        name: torch.where(batch.component_mask[name], x, torch.tensor(poison, dtype=x.dtype))
        for name, x in batch.component_rewards.items()
    }
    assert not all(torch.equal(bad[name], x) for name, x in batch.component_rewards.items())
    clean = conformance.combined(cfg, batch)
    other = conformance.combined(cfg, replace(batch, component_rewards=bad))
    assert same_bits(clean.token_rewards, other.token_rewards)
    sums = [
        rollout_sums(b, c, rows, version=0).means()
        for b, c in ((batch, clean), (replace(batch, component_rewards=bad), other))
    ]
    assert sums[0] == sums[1]


@poisons
@pytest.mark.parametrize("whiten", [True, False])
def test_credit_reads_no_masked_slot(still, rows, poison, whiten):
    cfg = configured(**SETTINGS, **{"ppo.whiten_advantages": whiten})
    batch, _ = still.annotate(TrainBatch.collate(rows, cfg.rewards))
    batch = batch.fill(token_rewards=conformance.combined(cfg, batch).token_rewards)
    bad = spoil(batch, ("token_rewards", "old_logprobs", "ref_logprobs", "values"), poison)
    got, want = (credit(cfg, b, KL_COEF, lambda x: x) for b in (bad, batch))
    assert_same(got, want, ("rewards", "advantages", "returns"))


def taken(batch: TrainBatch, change: Callable[[TrainBatch], TrainBatch]) -> tuple[list, dict[str, float], list[Tensor]]:
    """Gradients of each optimizer step, metrics and new parameters of an update of a new learner."""
    it = conformance.learner(configured(**SETTINGS, **{"optim.lr": 1e-3}))
    with conformance.optimizer_steps(it) as steps:
        means = it.update(change(batch))
    return steps, means, [p.detach() for p in it.policy.parameters()]


@pytest.fixture(scope="module")
def clean(still, rows) -> tuple[TrainBatch, tuple]:
    batch = credit_of(still, still.annotate(TrainBatch.collate(rows, still.cfg.rewards))[0])
    return batch, taken(batch, lambda b: b)


READ_BY_UPDATE = (
    "rollout_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "values",
    "token_rewards",
    "rewards",
    "advantages",
    "returns",
)


@poisons
@pytest.mark.parametrize("stream", [*READ_BY_UPDATE, "all of them"])
def test_an_update_reads_no_masked_slot(clean, stream, poison):
    batch, (steps, means, weights) = clean
    names = READ_BY_UPDATE if stream == "all of them" else (stream,)
    bad_steps, bad_means, bad_weights = taken(batch, lambda b: spoil(b, names, poison))
    assert len(bad_steps) == len(steps) == 4
    for ours, theirs in zip(steps, bad_steps, strict=True):
        assert all(same_bits(theirs[name], g) for name, g in ours.items())
    assert bad_means == means
    assert all(same_bits(a, b) for a, b in zip(weights, bad_weights, strict=True))


def test_ids_behind_a_response_and_before_a_prompt(clean, still):
    """Padding is no particular id: any other gives the same log-probs, values and gradients."""
    batch, (steps, means, _) = clean
    p, t = batch.prompt_width, batch.response_mask.shape[1]
    column = torch.arange(p + t)
    real = (column >= p - batch.prompt_lengths[:, None]) & (column < p + batch.response_lengths[:, None])
    assert not real.all()
    noise = torch.randint(1, 300, batch.input_ids.shape, generator=torch.Generator().manual_seed(0))
    other = replace(batch, input_ids=torch.where(real, batch.input_ids, noise))
    bad_steps, bad_means, _ = taken(batch, lambda _: other)
    assert max(conformance.distance(a, b) for a, b in zip(steps, bad_steps, strict=True)) < 1e-6
    unwritten = dict.fromkeys((*WRITTEN, *CREDITED))
    one, two = (still.annotate(replace(b, **unwritten))[0] for b in (batch, other))
    for name in WRITTEN:
        torch.testing.assert_close(getattr(one, name), getattr(two, name), atol=1e-6, rtol=0)


@poisons
def test_a_poisoned_row_without_any_token_of_the_policy(still, rows, poison):
    """Its bootstrap value too: a row in which the policy did nothing continues nothing."""
    silent = conformance.trajectory(50, [4, 5], [6, 7], actions=[False, False], cut=True)
    batch, _ = still.annotate(TrainBatch.collate([*rows, silent], still.cfg.rewards))
    batch = batch.fill(token_rewards=conformance.combined(still.cfg, batch).token_rewards)
    bad = batch.bootstrap_values.clone()
    bad[-1] = poison
    got, want = (credit(still.cfg, b, KL_COEF, lambda x: x) for b in (replace(batch, bootstrap_values=bad), batch))
    assert_same(got, want, ("rewards", "advantages", "returns"))


def test_poison_at_a_token_of_the_policy_is_noticed(clean):
    """The other side of it, so that the tests above can fail: the same NaN one slot further is a stop."""
    batch, _ = clean
    row, column = batch.response_mask.nonzero()[0].tolist()
    for stream in ("old_logprobs", "values", "advantages", "returns"):
        bad = getattr(batch, stream).clone()
        bad[row, column] = torch.nan
        with pytest.raises(InvariantFault):
            taken(batch, lambda b, stream=stream, bad=bad: replace(b, **{stream: bad}))


def test_every_stream_is_0_where_masked(clean):
    batch, _ = clean
    for name in (*CREDITED, "old_logprobs", "ref_logprobs", "values"):
        assert not streams(batch)[name][~batch.response_mask].any(), name
