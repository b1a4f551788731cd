"""The gradient of the learner does not depend on how a batch is laid out: padding, order, micro-batches, tools,
prompts.

Two widths of number. GPT-2 computes in float64 throughout, so its gradients agree to 1e-12 and nothing can hide in
rounding; the Llama of float32 agrees to what float32 can. Distances are in units of the gradient's largest element.
"""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

import conformance
from conformance import (
    ThreadRanks,
    configured,
    credited,
    distance,
    gradient,
    on_ranks,
    random_trajectories,
    trajectory,
)
from core.trajectory import Trajectory
from trainer import fused_head
from trainer.batch import TrainBatch
from trainer.learner import Learner
from trainer.loop import credit

N = 8
WIDE = {"gpt2": True, "llama-tied": False}
# Where old log-probs, values and advantages are computed anew for another layout, float32 may round each of them to the
# other neighbour, so such cases are compared from one credited batch too.
LIMIT = {"gpt2": 1e-12, "llama-tied": 2e-6}
RECOMPUTED = {"gpt2": 1e-12, "llama-tied": 5e-5}
models = pytest.mark.parametrize("name", WIDE)


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate():
    conformance.fresh_accelerate()
    yield
    conformance.fresh_accelerate()


def at_work(name: str, **overrides: object) -> Learner:
    """A learner in the middle of training: values clipped here and there, ratios off 1, an entropy bonus."""
    return conformance.learner(configured(**{"ppo.entropy_coef": 0.01, **overrides}), name, wide=WIDE[name])


def off_policy(batch: TrainBatch) -> TrainBatch:
    """As after a first epoch: old log-probs and values differ from the present ones, some beyond the clips."""
    rng = torch.Generator().manual_seed(0)

    def noise() -> torch.Tensor:
        return torch.where(batch.response_mask, 0.3 * torch.randn(batch.response_mask.shape, generator=rng), 0.0)

    return replace(batch, old_logprobs=batch.old_logprobs + noise(), values=batch.values + noise())


@models
@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_the_size_of_the_micro_batch(name, micro):
    """Token counts of the rows differ from 0 to 8, so a mean of means would be far off."""
    it = at_work(name)
    batch = off_policy(credited(it, random_trajectories(0, N)))
    assert batch.response_mask.sum(dim=1).unique().numel() > 3
    other = at_work(name, **{"ppo.micro_batch_size": micro})
    assert distance(gradient(it, batch), gradient(other, batch)) < LIMIT[name]


@models
def test_the_size_of_a_chunk_of_the_head(name, monkeypatch):
    """Each chunk of tokens must find its own advantages, old log-probs and reference."""
    it = at_work(name, **{"ppo.kl_loss_coef": 0.1})
    batch = off_policy(credited(it, random_trajectories(0, N)))
    whole = gradient(it, batch)
    monkeypatch.setattr(fused_head, "chunk_size", lambda n_vocab, device: 5)
    assert distance(whole, gradient(it, batch)) < LIMIT[name]


@models
def test_the_gradient_of_a_batch_is_that_of_its_rows_weighted_by_their_tokens(name):
    """One denominator for the whole step, and nothing of one row reaches another."""
    it = at_work(name)
    batch = off_policy(credited(it, random_trajectories(1, N)))
    n = batch.response_mask.sum(dim=1).tolist()
    total: dict[str, torch.Tensor] = {}
    for row in range(N):
        for parameter, g in gradient(it, batch.rows(np.array([row]))).items():
            total[parameter] = total.get(parameter, 0) + g * n[row] / sum(n)
    assert distance(gradient(it, batch), total) < LIMIT[name]


@models
def test_rows_in_another_order(name):
    """The same responses under other numbers stand in other rows, beside other neighbours."""
    it = at_work(name)
    rows = random_trajectories(2, N)
    base = gradient(it, credited(it, rows))
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(N)]
    moved = [replace(t, request=replace(t.request, ordinal=i)) for i, t in enumerate(shuffled)]
    assert [t.order for t in moved] != [t.order for t in rows]
    assert distance(base, gradient(it, credited(it, moved))) < RECOMPUTED[name]


def test_the_order_of_arrival_changes_no_bit():
    rows = random_trajectories(2, N)
    base, again = (
        gradient(it, credited(it, arrived)) for arrived in (rows, rows[::-1]) for it in [at_work("llama-tied")]
    )
    assert all(torch.equal(base[parameter], again[parameter]) for parameter in base)


@models
@pytest.mark.parametrize("micro", [1, 16])
def test_a_longer_row_that_no_token_of_the_policy_is_in(name, micro):
    """It widens every tensor on both sides and must count in no mean, no deviation and no denominator."""
    it = at_work(name, **{"ppo.micro_batch_size": micro})
    rows = random_trajectories(3, N)
    long = trajectory(99, [3] * 20, [4] * 30, actions=[False] * 30, rewards={"a": [9.0] * 30}, cut=True)
    base, padded = credited(it, rows), credited(it, [*rows, long])
    assert padded.input_ids.shape == (N + 1, 50) != base.input_ids.shape
    assert distance(gradient(it, base), gradient(it, padded)) < RECOMPUTED[name]
    # and from one credited batch, where no number was rounded twice
    assert distance(gradient(it, padded), gradient(it, padded.rows(np.arange(N)))) < LIMIT[name]


@models
def test_tool_tokens_behind_the_last_action(name):
    """Whatever a tool says after the last action, and however long, reaches no action before it."""
    it = at_work(name, **{"ppo.gamma": 0.9})
    rows = [replace(t, finish_reason="stop") for t in random_trajectories(4, N)]
    longer = [
        insert(t, len(t), np.random.default_rng(i).integers(1, 300, size=3 * i).tolist()) for i, t in enumerate(rows)
    ]
    base, other = credited(it, rows), credited(it, longer)
    assert other.response_mask.sum() == base.response_mask.sum() and other.input_ids.shape != base.input_ids.shape
    assert distance(gradient(it, base), gradient(it, other)) < RECOMPUTED[name]


def insert(t: Trajectory, at: int, tokens: list[int]) -> Trajectory:
    """Tokens of a tool before response token `at`, each with a reward that must not count."""
    n = len(tokens)

    def put(array: np.ndarray, filler: object) -> np.ndarray:
        return np.concatenate([array[:at], np.full((n, *array.shape[1:]), filler, dtype=array.dtype), array[at:]])

    return replace(
        t,
        response_ids=np.concatenate([t.response_ids[:at], np.array(tokens, dtype=np.int64), t.response_ids[at:]]),
        rollout_logprobs=put(t.rollout_logprobs, 0),
        action_mask=put(t.action_mask, False),
        token_offsets=put(t.token_offsets, 0),
        policy_version=put(t.policy_version, 0),
        component_rewards={c: put(x, 7.0) for c, x in t.component_rewards.items()},
        component_mask={c: put(x, True) for c, x in t.component_mask.items()},
    )


def bigram(lm: torch.nn.Module) -> None:
    """No attention and no positions: logits and value of a state are functions of its last token alone."""
    for block in lm.transformer.h:
        block.attn.c_proj.weight.zero_()
        block.attn.c_proj.bias.zero_()
    lm.transformer.wpe.weight.zero_()


def of_bigrams(g: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what would be learnt about attention and positions, which do see the whole context."""
    return {name: x for name, x in g.items() if ".attn." not in name and ".wpe." not in name}


@pytest.mark.parametrize("block", [1, 2, 50])
def test_tool_tokens_between_actions_are_no_time_steps(block):
    """A model that sees one token back cannot tell a tool block that ends with the token it began after."""
    cfg = configured(**{"ppo.gamma": 0.8, "ppo.gae_lambda": 0.7, "ppo.bootstrap_cut": True})
    it = conformance.learner(cfg, "gpt2", wide=True, change=bigram)
    rows = [t for t in random_trajectories(5, 12) if t.action_mask.all() and len(t) > 2]
    assert len(rows) > 3 and any(t.finish_reason == "length" for t in rows)
    other = []
    for i, t in enumerate(rows):
        at = 1 + i % (len(t) - 1)
        other.append(
            insert(t, at, [*np.random.default_rng(i).integers(1, 300, size=block - 1), t.response_ids[at - 1]])
        )
    base, holed = credited(it, rows), credited(it, other)
    for stream in ("rewards", "advantages", "returns"):
        plain, with_holes = (getattr(b, stream)[b.response_mask] for b in (base, holed))
        torch.testing.assert_close(with_holes, plain, atol=1e-12, rtol=1e-12)
    assert distance(of_bigrams(gradient(it, base)), of_bigrams(gradient(it, holed))) < 1e-12


@pytest.mark.parametrize("more", [1, 7, 60])
def test_the_length_of_the_prompt(more):
    """Tokens of the prompt are in no mean and no denominator; here the policy cannot even see them."""
    it = conformance.learner(configured(), "gpt2", wide=True, change=bigram)
    rows = random_trajectories(6, N)
    longer = [
        replace(t, request=replace(t.request, prompt_ids=np.r_[np.full(more * (i % 3), 11), t.request.prompt_ids]))
        for i, t in enumerate(rows)
    ]
    base, other = credited(it, rows), credited(it, longer)
    torch.testing.assert_close(base.advantages, other.advantages, atol=1e-12, rtol=1e-12)
    assert distance(of_bigrams(gradient(it, base)), of_bigrams(gradient(it, other))) < 1e-12


def test_a_prompt_is_seen_whole_even_where_it_holds_the_padding_id():
    """Eos inside a prompt (chat marks) is a token; the policy that reads it differs from one that does not."""
    it = conformance.learner(configured(), "gpt2", wide=True)
    one, other = (
        credited(it, [trajectory(0, prompt, [5, 6]), trajectory(1, [1] * 9, [2])])
        for prompt in ([conformance.EOS, 9], [9])
    )
    assert float((one.old_logprobs[0] - other.old_logprobs[0]).abs().max()) > 1e-3


@models
@pytest.mark.parametrize(("n_mini", "epochs"), [(1, 3), (4, 1), (2, 2)])
def test_as_many_optimizer_steps_as_mini_batches_times_epochs(name, n_mini, epochs):
    """With equal weights the mini-batches of one epoch add up to the whole batch, row by row."""
    it = at_work(name, **{"ppo.mini_batch_size": N // n_mini, "ppo.ppo_epochs": epochs})
    batch = off_policy(credited(it, random_trajectories(7, N)))
    with conformance.optimizer_steps(it) as steps:
        it.update(batch)
    assert len(steps) == n_mini * epochs
    whole = gradient(at_work(name), batch)
    orders = [batch.order]
    for epoch in range(epochs):
        total: dict[str, torch.Tensor] = {}
        minis = batch.mini_batches(n_mini, seed=it.cfg.run.seed, step=1, epoch=epoch, orders=orders)
        for rows, g in zip(minis, steps[epoch * n_mini :], strict=False):
            share = int(batch.response_mask[torch.from_numpy(rows)].sum()) / int(batch.response_mask.sum())
            for parameter, x in g.items():
                total[parameter] = total.get(parameter, 0) + share * x
        assert distance(whole, total) < LIMIT[name], epoch


two_ranks = pytest.mark.parametrize(
    "bounds", [(0, 3, N), (0, 8, N), (0, 1, N)], ids=["3 and 5", "8 and none", "1 and 7"]
)


@two_ranks
def test_credit_on_two_ranks_is_credit_on_one(bounds):
    """Whitening and the deviation of a component are those of the union; a rank may have no row."""
    cfg = configured(**{"rewards.a.normalize": "batch", "rewards.b.normalize": "running"})
    it = conformance.learner(cfg, "gpt2", wide=True)
    annotated, _ = it.annotate(TrainBatch.collate(random_trajectories(8, N), cfg.rewards))
    annotated.component_rewards["a"][:4] *= 10  # the ranks' own deviations differ

    def share(ranks: ThreadRanks) -> TrainBatch:
        mine = part(annotated, bounds, ranks.index)
        total = conformance.combined(cfg, mine, ranks.sum).token_rewards
        return credit(cfg, mine.fill(token_rewards=total), conformance.KL_COEF, ranks.sum)

    whole = credit(
        cfg, annotated.fill(token_rewards=conformance.combined(cfg, annotated).token_rewards), 0.05, lambda x: x
    )
    parts = on_ranks(share)
    for stream in ("token_rewards", "rewards", "advantages", "returns"):
        want = getattr(whole, stream)[whole.response_mask]
        got = torch.cat([getattr(part, stream)[part.response_mask] for part in parts])
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@models
@two_ranks
def test_the_mean_gradient_of_two_ranks_is_that_of_one(name, bounds):
    """What DDP and DeepSpeed make of it. The ranks have unequally many micro-batches, or none: who has fewer passes
    rows that weigh nothing. Metrics are those of all tokens, on both."""
    options = {"ppo.micro_batch_size": 2, "ppo.bootstrap_cut": True}
    it = at_work(name, **options)
    batch = off_policy(credited(it, random_trajectories(9, N)))
    with conformance.optimizer_steps(it) as steps:
        means = it.update(batch)
    learners = [at_work(name, **options) for _ in range(2)]

    def share(ranks: ThreadRanks) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        mine = learners[ranks.index]
        mine.ranks = ranks
        with conformance.optimizer_steps(mine) as of_rank:
            said = mine.update(part(batch, bounds, ranks.index))
        (g,) = of_rank
        return g, said

    (one, means_one), (two, means_two) = on_ranks(share)
    mean = {parameter: (g + two[parameter]) / 2 for parameter, g in one.items()}
    assert distance(steps[0], mean) < LIMIT[name]
    own = {"optim/grad_norm"}  # of each rank before they are reduced, which nobody does here
    for key in means.keys() - own:
        assert means_one[key] == means_two[key] == pytest.approx(means[key], rel=1e-5, abs=1e-6), key


def part(batch: TrainBatch, bounds: tuple[int, int, int], rank: int) -> TrainBatch:
    """The rows of one rank; there may be none."""
    rows = np.arange(bounds[rank], bounds[rank + 1])
    if len(rows):
        return batch.rows(rows)
    none = TrainBatch.collate([], list(batch.component_rewards))
    written = [f.name for f in fields(batch) if getattr(none, f.name) is None and getattr(batch, f.name) is not None]
    like = {name: getattr(batch, name) for name in written}
    shapes = {name: none.response_mask.shape if x.ndim == 2 else (0,) for name, x in like.items()}
    return none.fill(**{name: torch.zeros(shapes[name], dtype=x.dtype) for name, x in like.items()})
