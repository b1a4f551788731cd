"""Estimators of advantages: by hand, against the published formulas on whole responses, and the same for any ranks."""

import itertools
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.combine import RunningMoments
from core.schema import PPOConfig
from ppo_cases import HOLE, close, f64, few, mask_at, mask_of, ragged, random_rows, seeds
from trainer import estimators, ppo


def on_ranks(calls):
    """Each `call(all_reduce, gather)` on a thread of its own; both wait for all ranks. The answers, by rank."""
    barrier = threading.Barrier(len(calls), timeout=20)
    brought, answers, errors = [None] * len(calls), [None] * len(calls), []

    def run(rank, call):
        def gather(item):
            brought[rank] = item
            barrier.wait()
            everything = list(brought)
            barrier.wait()
            return everything

        def all_reduce(sums):
            assert sums.ndim == 1 and sums.dtype == torch.float64
            return torch.stack(gather(sums.clone())).sum(dim=0)  # raises if the ranks brought different lengths

        try:
            answers[rank] = call(all_reduce, gather)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return answers


def compared(kind, to_go, mask, groups, **ranks):
    return estimators.against_group(to_go, mask, torch.tensor(groups, dtype=torch.int64), kind=kind, **ranks)


def estimated(cfg, rewards, mask, groups=None, values=None, bootstrap=None):
    groups = torch.arange(len(rewards)) if groups is None else torch.tensor(groups)
    values = torch.zeros_like(rewards) if values is None else values
    return estimators.estimate(cfg, rewards, values, mask, bootstrap_values=bootstrap, groups=groups)


# ---------------------------------------------------------------- with a critic


def test_policy_and_critic_have_their_own_gamma_and_lambda():
    # tests/test_gae.py: gamma 0.9, lambda 0.5 gives 2.76125, 3.025, 1.5 and returns 3.26125, 4.025, 3
    # the critic with gamma 1, lambda 1 learns the sums 6, 5, 3; with its lambda alone, gamma 0.9: 5.23, 4.7, 3
    call = (f64([[1.0, 2.0, 3.0]]), mask_of([[1, 1, 1]]))
    values, advantages = f64([[0.5, 1.0, 1.5]]), [[2.76125, 3.025, 1.5]]
    for changes, returns in (
        ({}, [[3.26125, 4.025, 3.0]]),
        ({"value_gamma": 1.0, "value_lambda": 1.0}, [[6.0, 5.0, 3.0]]),
        ({"value_lambda": 1.0}, [[5.23, 4.7, 3.0]]),
        ({"value_gamma": 0.9, "value_lambda": 0.5}, [[3.26125, 4.025, 3.0]]),
    ):
        got = estimated(PPOConfig(gamma=0.9, gae_lambda=0.5, **changes), *call, values=values)
        close(got.advantages, advantages)
        close(got.returns, returns)


def test_a_lambda_of_the_length_is_the_policys_alone():
    # alpha 0.5: three tokens lambda 1 - 1 / 1.5 = 1/3, two tokens 0. Values 0, gamma 1
    #   1 + 1/3 * (2 + 1/3 * 3) = 2, 2 + 1 = 3, 3;   and the plain rewards of the short one
    # the critic keeps gae_lambda 1: sums
    rewards, mask = f64([[1.0, 2.0, 3.0], [5.0, 7.0, HOLE]]), mask_of([[1, 1, 1], [1, 1, 0]])
    got = estimated(PPOConfig(gae_lambda=1.0, lambda_alpha=0.5), rewards, mask)
    close(got.advantages, [[2.0, 3.0, 3.0], [5.0, 7.0, 0.0]])
    close(got.returns, [[6.0, 5.0, 3.0], [12.0, 7.0, 0.0]])


def test_the_bootstrap_value_reaches_policy_and_critic():
    # gamma 1, lambda 1, V = 0 inside and 10 behind the end: 3 + 10, 2 + 10; the critic's gamma 0.5: 2 + 5, 1 + 3.5
    got = estimated(
        PPOConfig(gae_lambda=1.0, value_gamma=0.5),
        f64([[1.0, 2.0]]),
        mask_of([[1, 1]]),
        bootstrap=f64([10.0]),
    )
    close(got.advantages, [[13.0, 12.0]])
    close(got.returns, [[4.5, 7.0]])


# ---------------------------------------------------------------- REINFORCE++


def test_reinforce_by_hand():
    # gamma 0.5: 4;  2 + 0.5 * 4 = 4;  1 + 0.5 * 4 = 3. Values are not read, not even NaN; the hole is no time step
    got = estimated(
        PPOConfig(estimator="reinforce_pp", gamma=0.5),
        f64([[1.0, HOLE, 2.0, 4.0]]),
        mask_of([[1, 0, 1, 1]]),
        values=torch.full((1, 4), math.nan).double(),
    )
    close(got.advantages, [[3.0, 0.0, 4.0, 4.0]])
    close(got.returns, got.advantages)


@few
@given(ragged(), seeds)
def test_reinforce_is_the_published_formula_for_a_reward_at_the_end(batch, seed):
    # arXiv 2501.03262: A_t = r(whole response) - beta * sum_(i >= t) KL_i
    lengths, slots, width = batch
    mask, kl, beta = mask_at(slots, width), random_rows((len(lengths), width), seed), 0.3
    reward = random_rows((len(lengths),), seed + 1).tolist()
    token_rewards = torch.zeros_like(kl)
    for row, positions in enumerate(slots):
        if positions:
            token_rewards[row, positions[-1]] = reward[row]
    shaped = ppo.shape_rewards(token_rewards, kl, torch.zeros_like(kl), mask, kl_coef=beta)
    got = estimated(PPOConfig(estimator="reinforce_pp"), shaped, mask).advantages
    for row, positions in enumerate(slots):
        for k, t in enumerate(positions):
            close(got[row, t], reward[row] - beta * math.fsum(kl[row, positions[k:]].tolist()), 1e-11)


# ---------------------------------------------------------------- RLOO and GRPO


def at_the_end(rewards, lengths, width):
    """Returns-to-go of rewards on the last token only, gamma 1."""
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return torch.where(mask, f64(rewards)[:, None], HOLE), mask


def test_a_reward_at_the_end_gives_the_published_formulas():
    # four samples of prompt 7 with rewards 1, 2, 3, 6 and one prompt of two, 5 and 1, in between
    #   RLOO  1 - 11/3, 2 - 10/3, 3 - 3, 6 - 2        and 5 - 1, 1 - 5
    #   GRPO  mean 3, squares 4 + 1 + 0 + 9, std sqrt(14/3) = 2.160246899469287: -2, -1, 0, 3 over it
    #         mean 3, std sqrt(8) = 2.8284271247461903: 2 and -2 over it
    to_go, mask = at_the_end([1.0, 2.0, 5.0, 3.0, 1.0, 6.0], [1, 3, 2, 2, 4, 4], 5)
    groups = [7, 7, 9, 7, 9, 7]
    for kind, want in (
        ("rloo", [-8 / 3, -4 / 3, 4.0, 0.0, -4.0, 4.0]),
        ("grpo", [-0.9258200997725514, -0.4629100498862757, 0.7071067811865475, 0.0, -0.7071067811865475, 1.388730149]),
    ):
        got, lone = compared(kind, to_go, mask, groups)
        close(got, torch.where(mask, f64(want)[:, None], 0.0), 1e-8)
        assert lone == 0


def test_rewards_of_tokens_are_compared_at_the_same_place():
    # rewards 1, 0, 2 and 0, 3: to go 3, 2, 2 and 3, 3; the short one is held at its last token, so 3, 3, 3
    #   RLOO  3 - 3, 2 - 3, 2 - 3     and 3 - 3, 3 - 2
    #   GRPO  b = 3, 2.5, 2.5; off 0, -1/2, -1/2 and 0, 1/2; s^2 = 1/6 + 1/8 = 7/24; 1/2 / s = 0.9258200997725514
    # Their totals are equal: over the deviation of the totals, 0, the last line would be without bound
    rewards, mask = f64([[1.0, 0.0, 2.0], [0.0, 3.0, HOLE]]), mask_of([[1, 1, 1], [1, 1, 0]])
    to_go = estimators.returns_to_go(rewards, mask, gamma=1.0)
    close(to_go, [[3.0, 2.0, 2.0], [3.0, 3.0, 0.0]])
    close(compared("rloo", to_go, mask, [4, 4])[0], [[0.0, -1.0, -1.0], [0.0, 1.0, 0.0]])
    x = 0.9258200997725514
    close(compared("grpo", to_go, mask, [4, 4])[0], [[0.0, -x, -x], [0.0, x, 0.0]], 1e-7)


def test_a_sample_without_another_has_advantage_0_and_is_counted():
    # prompt 1 has lost its other samples; a response of no tokens is nobody to be compared with
    to_go, mask = at_the_end([5.0, 1.0, 3.0, 9.0, 9.0, 9.0], [2, 2, 1, 2, 0, 0], 2)
    for kind, third in (("rloo", 2.0), ("grpo", math.sqrt(0.5))):
        got, lone = compared(kind, to_go, mask, [1, 2, 2, 3, 3, 4])
        close(got, [[0.0, 0.0], [-third, -third], [third, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], 1e-7)
        assert lone == 2 / 4


def test_equal_responses_teach_nothing():
    to_go, mask = at_the_end([0.1 + 0.2, 0.1 + 0.2, 0.1 + 0.2], [3, 2, 1], 3)
    for kind in ("rloo", "grpo"):
        close(compared(kind, to_go, mask, [1, 1, 1])[0], torch.zeros(3, 3), 1e-10)


def plainly(kind, rewards, groups):
    """The same from lists of rewards of valid tokens, sample by sample and token by token."""
    to_go = [[math.fsum(row[t:]) for t in range(len(row))] for row in rewards]
    answers = []
    for i, own in enumerate(to_go):
        members = [j for j, row in enumerate(to_go) if groups[j] == groups[i] and row]
        if len(members) < 2:
            answers.append([0.0] * len(own))
            continue

        def mean_at(t, of):
            return math.fsum(to_go[j][min(t, len(to_go[j]) - 1)] for j in of) / len(of)

        if kind == "rloo":
            others = [j for j in members if j != i]
            answers.append([g - mean_at(t, others) for t, g in enumerate(own)])
            continue
        spread = [
            math.fsum((g - mean_at(t, members)) ** 2 for t, g in enumerate(to_go[j])) / len(to_go[j]) for j in members
        ]
        s = math.sqrt(math.fsum(spread) / (len(members) - 1) + 1e-8)
        answers.append([(g - mean_at(t, members)) / s for t, g in enumerate(own)])
    return answers


batches = st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(-8, 8), max_size=5)), min_size=1, max_size=7)


def laid_out(batch, seed, width_more=2):
    """(rewards, mask, groups) with the tokens of each row at random places."""
    width = max(1, *(len(row) for _, row in batch)) + width_more
    random = np.random.default_rng(seed)
    slots = [sorted(random.permutation(width)[: len(row)].tolist()) for _, row in batch]
    rewards = torch.full((len(batch), width), HOLE, dtype=torch.float64)
    for i, (_, row) in enumerate(batch):
        rewards[i, slots[i]] = f64([x / 4 for x in row])
    return rewards, mask_at(slots, width), [group for group, _ in batch], slots


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
@few
@given(batches, seeds)
def test_groups_of_any_layout_are_as_a_plain_loop_has_them(kind, batch, seed):
    rewards, mask, groups, slots = laid_out(batch, seed)
    got = estimated(PPOConfig(estimator=kind), rewards, mask, groups).advantages
    want = torch.zeros_like(got)
    for row, answer in enumerate(plainly(kind, [[x / 4 for x in row] for _, row in batch], groups)):
        want[row, slots[row]] = f64(answer)
    close(got, want, 1e-7)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
@few
@given(batches, seeds, st.data())
def test_a_group_on_several_ranks_is_one_group(kind, batch, seed, data):
    rewards, mask, groups, _ = laid_out(batch, seed)
    to_go = estimators.returns_to_go(rewards, mask, gamma=0.9)
    whole, lone = compared(kind, to_go, mask, groups)
    owners = data.draw(st.lists(st.integers(0, 2), min_size=len(batch), max_size=len(batch)))
    rows = [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(3)]
    widths = [max([1] + [int(mask[i].nonzero().max()) + 1 for i in of if mask[i].any()]) for of in rows]

    def of_rank(rank):
        mine, width = rows[rank], widths[rank]
        part = (to_go[mine][:, :width], mask[mine][:, :width], [groups[i] for i in mine])
        return lambda all_reduce, gather: compared(kind, *part, all_reduce=all_reduce, gather=gather)

    answers = on_ranks([of_rank(rank) for rank in range(3)])
    for mine, width, (got, share) in zip(rows, widths, answers, strict=True):
        close(got, whole[mine][:, :width], 1e-9)
        close(share, lone)


@few
@given(seeds)
def test_the_mean_square_of_grpo_is_bounded_whatever_the_rewards(seed):
    rewards, mask = random_rows((4, 6), seed) * 1000, random_rows((4, 6), seed + 1) > -1.5
    mask[:, 0] = True
    got = estimated(PPOConfig(estimator="grpo"), rewards, mask, [1] * 4).advantages
    close(sum((row[m] ** 2).mean() for row, m in zip(got, mask, strict=True)) / 4, 3 / 4, 1e-6)


def test_the_mean_gradient_of_rloo_is_that_of_the_reward():
    """Exactly, over all pairs of samples of a small language: a, or b then a, or b then b, with dense rewards."""
    theta = f64([[0.3, -0.2], [0.5, 0.1]]).requires_grad_(True)  # first token; second token after b
    sentences = [(0,), (1, 0), (1, 1)]
    rewards = [[1.0], [0.5, -2.0], [0.5, 3.0]]  # b earns the same, whatever follows

    def logprobs(sentence):
        return [theta[t].log_softmax(-1)[token] for t, token in enumerate(sentence)]

    probabilities = [torch.stack(logprobs(s)).sum().exp() for s in sentences]
    objective = sum(p * math.fsum(r) for p, r in zip(probabilities, rewards, strict=True))
    (exact,) = torch.autograd.grad(objective, [theta], retain_graph=True)
    estimate = torch.zeros_like(exact)
    for pair in itertools.product(range(3), repeat=2):
        dense = torch.zeros(2, 2, dtype=torch.float64)
        mask = torch.zeros(2, 2, dtype=torch.bool)
        for row, s in enumerate(pair):
            dense[row, : len(sentences[s])] = f64(rewards[s])
            mask[row, : len(sentences[s])] = True
        advantages = estimated(PPOConfig(estimator="rloo"), dense, mask, [0, 0]).advantages
        loss = sum(
            advantages[row, t] * logprob
            for row, s in enumerate(pair)
            for t, logprob in enumerate(logprobs(sentences[s]))
        )
        weight = (probabilities[pair[0]] * probabilities[pair[1]]).detach()
        estimate += weight / 2 * torch.autograd.grad(loss, [theta], retain_graph=True)[0]
    close(estimate, exact)


def test_float32_stays_float32():
    rewards, mask = random_rows((4, 6), 1).float(), torch.ones(4, 6).bool()
    for name in ("gae", "reinforce_pp", "rloo", "grpo"):
        got = estimated(PPOConfig(estimator=name), rewards, mask, [1, 1, 2, 2])
        assert got.advantages.dtype == got.returns.dtype == torch.float32


# ---------------------------------------------------------------- the size of rewards and returns


def test_scaled_rewards_by_hand():
    # 1, 3, 5: mean 3, squares 8, deviation 2. The mean stays: 3 / 2
    rewards, mask = f64([[1.0, 3.0], [HOLE, 5.0]]), mask_of([[1, 1], [0, 1]])
    scaled, scale = estimators.scale_rewards(rewards, mask, "batch")
    close(scaled[mask], [0.5, 1.5, 2.5])
    assert scale == 2.0
    same, scale = estimators.scale_rewards(rewards, mask, "none")
    assert same is rewards and scale == 1.0


def test_a_token_that_earns_nothing_earns_nothing_and_a_bonus_stays_a_bonus():
    # 0, 0, 0, 4: deviation 2. With the mean put back, as `whiten(center=False)` has it, the zeros would become 0.5
    scaled, _ = estimators.scale_rewards(f64([[0.0, 0.0, 0.0, 4.0]]), mask_of([[1, 1, 1, 1]]), "batch")
    close(scaled, [[0.0, 0.0, 0.0, 2.0]])
    for constant in (0.0, 0.1, -3.0):  # does not vary but for rounding: left as it is, not blown up
        scaled, scale = estimators.scale_rewards(f64([[constant] * 3]), mask_of([[1, 1, 1]]), "batch")
        close(scaled, [[constant] * 3])
        assert scale == 1.0
    one, scale = estimators.scale_rewards(f64([[5.0, HOLE]]), mask_of([[1, 0]]), "batch")
    assert float(one[0, 0]) == 5.0 and scale == 1.0


def test_rewards_are_scaled_by_the_tokens_of_all_ranks():
    parts, masks = [f64([[1.0, 3.0]]), f64([[5.0]]), torch.zeros(0, 1).double()], [[[1, 1]], [[1]], []]
    answers = on_ranks(
        [
            lambda all_reduce, gather, x=x, m=m: estimators.scale_rewards(
                x, mask_of(m).reshape(x.shape), "batch", all_reduce=all_reduce
            )
            for x, m in zip(parts, masks, strict=True)
        ]
    )
    assert [scale for _, scale in answers] == [2.0, 2.0, 2.0]
    close(answers[1][0], [[2.5]])


def test_the_unit_of_values_is_the_root_mean_square_of_all_returns_so_far():
    # 3, 4: mean square 12.5; then 0, 0: 25 / 4, so 2.5. A restart from JSON goes on with it
    running: dict[str, RunningMoments] = {}
    assert estimators.value_scale(running) == 1.0
    scaled, sigma = estimators.scale_returns(f64([[3.0, 4.0, HOLE]]), mask_of([[1, 1, 0]]), running)
    close(sigma, math.sqrt(12.5))
    close(scaled[0, :2], [3 / math.sqrt(12.5), 4 / math.sqrt(12.5)])
    close(estimators.value_scale(running), sigma)
    _, sigma = estimators.scale_returns(f64([[0.0, 0.0]]), mask_of([[1, 1]]), running)
    close(sigma, 2.5)


def test_the_unit_of_values_is_that_of_all_ranks():
    parts = [f64([[3.0]]), f64([[4.0]]), torch.zeros(0, 1).double()]
    answers = on_ranks(
        [
            lambda all_reduce, gather, x=x: estimators.scale_returns(
                x, torch.ones(x.shape).bool(), {}, all_reduce=all_reduce
            )
            for x in parts
        ]
    )
    for _, sigma in answers:
        close(sigma, math.sqrt(12.5))


def test_returns_that_are_all_large_have_a_value_loss_of_a_half():
    """Over their deviation, which is 0, they would be as large as before; their mean is not taken off either."""
    returns, mask = f64([[-100.0] * 4]), mask_of([[1, 1, 1, 1]])
    scaled, sigma = estimators.scale_returns(returns, mask, {})
    close(scaled, [[-1.0] * 4])
    zeros = torch.zeros(1, 4).double()
    close(ppo.value_loss(zeros, zeros, scaled, mask, cliprange_value=0.2)[0], 0.5)
    assert sigma == 100.0


def test_returns_of_0_have_the_unit_1():
    scaled, sigma = estimators.scale_returns(f64([[0.0, 0.0]]), mask_of([[1, 1]]), {})
    close(scaled, [[0.0, 0.0]])
    assert sigma == 1.0
