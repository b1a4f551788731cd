"""compute_gae: answers worked by hand, then properties that hold for any batch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_cases import HOLE, close, f64, few, mask_at, mask_of, ragged, random_rows, seeds, unit
from trainer import ppo


def test_gae_by_hand():
    # gamma 0.9, lambda 0.5, so a step carries 0.45; the value behind the last token is 0
    #   delta_3 = 3 + 0.9 * 0   - 1.5 = 1.5     A_3 = 1.5
    #   delta_2 = 2 + 0.9 * 1.5 - 1   = 2.35    A_2 = 2.35 + 0.45 * 1.5   = 3.025
    #   delta_1 = 1 + 0.9 * 1   - 0.5 = 1.4     A_1 = 1.4  + 0.45 * 3.025 = 2.76125
    rewards, values = f64([[1.0, 2.0, 3.0]]), f64([[0.5, 1.0, 1.5]])
    advantages, returns = ppo.compute_gae(rewards, values, mask_of([[1, 1, 1]]), gamma=0.9, gae_lambda=0.5)
    close(advantages, [[2.76125, 3.025, 1.5]])
    close(returns, [[3.26125, 4.025, 3.0]])


def test_gae_of_a_cut_response_by_hand():
    # as above with V = 2 behind the last token:
    #   delta_3 = 3 + 0.9 * 2 - 1.5 = 3.3       A_3 = 3.3
    #   A_2 = 2.35 + 0.45 * 3.3 = 3.835         A_1 = 1.4 + 0.45 * 3.835 = 3.12575
    # the second row is the same response, not cut: as above
    rewards, values = f64([[1.0, 2.0, 3.0]] * 2), f64([[0.5, 1.0, 1.5]] * 2)
    mask = mask_of([[1, 1, 1]] * 2)
    advantages, returns = ppo.compute_gae(
        rewards, values, mask, gamma=0.9, gae_lambda=0.5, bootstrap_values=f64([2.0, 0.0])
    )
    close(advantages, [[3.12575, 3.835, 3.3], [2.76125, 3.025, 1.5]])
    close(returns, [[3.62575, 4.835, 4.8], [3.26125, 4.025, 3.0]])


def test_gae_over_holes_by_hand():
    # the three tokens above at positions 1, 3, 4 of seven; the bootstrap value belongs to the last valid one
    rewards = f64([[HOLE, 1.0, HOLE, 2.0, 3.0, HOLE, HOLE]])
    values = f64([[HOLE, 0.5, HOLE, 1.0, 1.5, HOLE, HOLE]])
    mask = mask_of([[0, 1, 0, 1, 1, 0, 0]])
    for bootstrap, want in ((None, [2.76125, 3.025, 1.5]), (f64([2.0]), [3.12575, 3.835, 3.3])):
        advantages, returns = ppo.compute_gae(
            rewards, values, mask, gamma=0.9, gae_lambda=0.5, bootstrap_values=bootstrap
        )
        close(advantages, [[0.0, want[0], 0.0, want[1], want[2], 0.0, 0.0]])
        close(returns, [[0.0, want[0] + 0.5, 0.0, want[1] + 1.0, want[2] + 1.5, 0.0, 0.0]])


def test_gae_of_one_token_is_reward_minus_value_for_any_lambda():
    # 5 - 2 = 3; and cut: 5 + 0.5 * 4 - 2 = 5
    for gae_lambda in (0.0, 0.5, 1.0):
        one = (f64([[5.0]]), f64([[2.0]]), mask_of([[1]]))
        close(ppo.compute_gae(*one, gamma=0.5, gae_lambda=gae_lambda)[0], [[3.0]])
        close(ppo.compute_gae(*one, gamma=0.5, gae_lambda=gae_lambda, bootstrap_values=f64([4.0]))[0], [[5.0]])


def test_a_row_without_valid_tokens_ignores_its_bootstrap_value():
    rewards, values = f64([[1.0, 2.0], [3.0, 4.0]]), f64([[0.0, 0.0], [0.0, 0.0]])
    mask = mask_of([[1, 1], [0, 0]])
    for ignored in (1e6, math.nan, math.inf):
        advantages, returns = ppo.compute_gae(
            rewards, values, mask, gamma=1.0, gae_lambda=1.0, bootstrap_values=f64([0.0, ignored])
        )
        close(advantages, [[3.0, 2.0], [0.0, 0.0]])
        close(returns, [[3.0, 2.0], [0.0, 0.0]])


def test_a_float64_bootstrap_does_not_change_the_dtype_of_float32():
    rewards = torch.ones(1, 2)
    advantages, returns = ppo.compute_gae(
        rewards, rewards, mask_of([[1, 1]]), gamma=1.0, gae_lambda=1.0, bootstrap_values=f64([2.0])
    )
    assert advantages.dtype == returns.dtype == torch.float32
    close(advantages, [[3.0, 2.0]])  # 1 + 2 - 1 = 2; 1 + 1 - 1 + 2 = 3


@few
@given(ragged(), seeds, unit)
def test_gae_with_lambda_0_is_the_td_error(batch, seed, gamma):
    lengths, slots, width = batch
    rewards, values = random_rows((len(lengths), width), seed), random_rows((len(lengths), width), seed + 1)
    bootstrap = random_rows((len(lengths),), seed + 2)
    advantages, _ = ppo.compute_gae(
        rewards, values, mask_at(slots, width), gamma=gamma, gae_lambda=0.0, bootstrap_values=bootstrap
    )
    for row, positions in enumerate(slots):
        for index, position in enumerate(positions):
            last = index == len(positions) - 1
            value_next = bootstrap[row] if last else values[row, positions[index + 1]]
            close(advantages[row, position], rewards[row, position] + gamma * value_next - values[row, position])


@few
@given(ragged(), seeds)
def test_gae_undiscounted_without_values_is_the_sum_of_later_rewards(batch, seed):
    lengths, slots, width = batch
    rewards = random_rows((len(lengths), width), seed)
    advantages, returns = ppo.compute_gae(
        rewards, torch.zeros_like(rewards), mask_at(slots, width), gamma=1.0, gae_lambda=1.0
    )
    for row, positions in enumerate(slots):
        for index, position in enumerate(positions):
            close(advantages[row, position], math.fsum(rewards[row, positions[index:]].tolist()))
    close(returns, advantages)


@few
@given(ragged(), seeds, unit)
def test_gae_with_lambda_1_is_the_discounted_return_minus_the_value(batch, seed, gamma):
    lengths, slots, width = batch
    rewards, values = random_rows((len(lengths), width), seed), random_rows((len(lengths), width), seed + 1)
    bootstrap = random_rows((len(lengths),), seed + 2)
    _, returns = ppo.compute_gae(
        rewards, values, mask_at(slots, width), gamma=gamma, gae_lambda=1.0, bootstrap_values=bootstrap
    )
    for row, positions in enumerate(slots):
        for index, position in enumerate(positions):
            stream = [*rewards[row, positions[index:]].tolist(), float(bootstrap[row])]
            close(returns[row, position], math.fsum(gamma**k * number for k, number in enumerate(stream)), 1e-11)


@few
@given(ragged().filter(lambda batch: any(batch[0])), seeds, st.data(), st.floats(0.1, 1.0), st.floats(0.1, 1.0))
def test_a_reward_reaches_exactly_its_token_and_the_earlier_ones(batch, seed, data, gamma, gae_lambda):
    lengths, slots, width = batch
    row = data.draw(st.sampled_from([row for row, length in enumerate(lengths) if length]))
    index = data.draw(st.integers(0, lengths[row] - 1))
    rewards, values = random_rows((len(lengths), width), seed), random_rows((len(lengths), width), seed + 1)
    options = {"gamma": gamma, "gae_lambda": gae_lambda}
    before, _ = ppo.compute_gae(rewards, values, mask_at(slots, width), **options)
    rewards[row, slots[row][index]] += 4.0
    after, _ = ppo.compute_gae(rewards, values, mask_at(slots, width), **options)
    reached = torch.zeros_like(rewards)
    for earlier in range(index + 1):
        reached[row, slots[row][earlier]] = 4.0 * (gamma * gae_lambda) ** (index - earlier)
    close(after - before, reached)
    assert torch.equal((after != before) & (reached == 0), torch.zeros_like(reached, dtype=torch.bool))


@few
@given(ragged(), seeds, st.floats(-3, 3), st.floats(-3, 3))
def test_gae_is_linear(batch, seed, a, b):
    lengths, slots, width = batch
    shape, mask = (len(lengths), width), mask_at(slots, width)

    def gae(rewards, values, bootstrap):
        return ppo.compute_gae(rewards, values, mask, gamma=0.9, gae_lambda=0.8, bootstrap_values=bootstrap)[0]

    first = (random_rows(shape, seed), random_rows(shape, seed + 1), random_rows(shape[:1], seed + 2))
    second = (random_rows(shape, seed + 3), random_rows(shape, seed + 4), random_rows(shape[:1], seed + 5))
    mixed = (a * one + b * other for one, other in zip(first, second, strict=True))
    close(gae(*mixed), a * gae(*first) + b * gae(*second), 1e-11)
    # in the rewards alone, values held: the difference is linear
    only_rewards = gae(first[0] + a * second[0], *first[1:]) - gae(*first)
    close(only_rewards, a * gae(second[0], torch.zeros(shape).double(), torch.zeros(shape[0]).double()), 1e-11)


@few
@given(ragged(), seeds, unit, unit)
def test_returns_minus_values_are_the_advantages(batch, seed, gamma, gae_lambda):
    lengths, slots, width = batch
    mask = mask_at(slots, width)
    rewards, values = random_rows((len(lengths), width), seed), random_rows((len(lengths), width), seed + 1)
    advantages, returns = ppo.compute_gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    close(torch.where(mask, returns - values, 0.0), advantages)


@few
@given(ragged(), seeds, unit, unit)
def test_a_zero_bootstrap_is_no_bootstrap(batch, seed, gamma, gae_lambda):
    lengths, slots, width = batch
    rewards, values = random_rows((len(lengths), width), seed), random_rows((len(lengths), width), seed + 1)
    call = (rewards, values, mask_at(slots, width))
    options = {"gamma": gamma, "gae_lambda": gae_lambda}
    for none, zero in zip(
        ppo.compute_gae(*call, **options),
        ppo.compute_gae(*call, **options, bootstrap_values=torch.zeros(len(lengths)).double()),
        strict=True,
    ):
        assert torch.equal(none, zero)


@few
@given(ragged(), seeds, unit, unit)
def test_true_values_leave_no_advantage(batch, seed, gamma, gae_lambda):
    # r_k = V_k - gamma V_{k+1} makes every TD error 0, whatever lambda, cut or not
    lengths, slots, width = batch
    values, bootstrap = random_rows((len(lengths), width), seed), random_rows((len(lengths),), seed + 2)
    rewards = torch.full_like(values, HOLE)
    for row, positions in enumerate(slots):
        for index, position in enumerate(positions):
            last = index == len(positions) - 1
            rewards[row, position] = values[row, position] - gamma * (
                bootstrap[row] if last else values[row, positions[index + 1]]
            )
    mask = mask_at(slots, width)
    advantages, _ = ppo.compute_gae(
        rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda, bootstrap_values=bootstrap
    )
    close(advantages, torch.zeros_like(advantages))


# ---------------------------------------------------------------- many tokens, and a lambda for each row


def by_a_plain_loop(rewards, values, gamma, gae_lambda, bootstrap=0.0):
    """Of one row of valid tokens, lists in and out."""
    advantages, advantage, after = [], 0.0, bootstrap
    for r, v in zip(reversed(rewards), reversed(values), strict=True):
        advantage = r + gamma * after - v + gamma * gae_lambda * advantage
        advantages.insert(0, advantage)
        after = v
    return advantages


@pytest.mark.parametrize("width", [1, 2, 63, 64, 65, 127, 128, 129, 300])
def test_blocks_join_without_a_seam(width):
    rewards, values, bootstrap = (random_rows(shape, width + k) for k, shape in enumerate([(3, width)] * 2 + [(3,)]))
    got, _ = ppo.compute_gae(
        rewards, values, torch.ones(3, width).bool(), gamma=0.999, gae_lambda=0.98, bootstrap_values=bootstrap
    )
    for row in range(3):
        want = by_a_plain_loop(rewards[row].tolist(), values[row].tolist(), 0.999, 0.98, float(bootstrap[row]))
        close(got[row], want, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 5, 64, 100])
def test_padding_and_holes_change_no_bit(dtype, length):
    """Not a rounding either: a response alone and in any batch have the same advantages."""
    numbers = [random_rows((2, length), k).to(dtype) for k in (1, 2)]
    bootstrap = random_rows((2,), 3).to(dtype)
    options = {"gamma": 0.97, "gae_lambda": 0.9, "bootstrap_values": bootstrap}
    want = ppo.compute_gae(*numbers, torch.ones(2, length).bool(), **options)
    spread = sorted(torch.randperm(3 * length, generator=torch.Generator().manual_seed(length))[:length].tolist())
    start = list(range(length))
    for width, slots in [(length + 1, start), (length + 63, start), (4 * length + 70, start), (3 * length, spread)]:
        wide = [torch.full((2, width), math.nan, dtype=dtype) for _ in numbers]
        for target, x in zip(wide, numbers, strict=True):
            target[:, slots] = x
        got = ppo.compute_gae(*wide, mask_at([slots] * 2, width), **options)
        for a, b in zip(got, want, strict=True):
            assert a[:, slots].numpy().tobytes() == b.numpy().tobytes()


def test_the_other_rows_change_no_bit():
    rewards, values = random_rows((9, 70), 1).float(), random_rows((9, 70), 2).float()
    mask = torch.ones(9, 70).bool()
    want = ppo.compute_gae(rewards, values, mask, gamma=0.97, gae_lambda=0.9)[0]
    for row in range(9):
        alone = (x[row : row + 1] for x in (rewards, values, mask))
        assert torch.equal(ppo.compute_gae(*alone, gamma=0.97, gae_lambda=0.9)[0][0], want[row])


def test_each_row_may_have_its_own_lambda():
    rewards, values, mask = random_rows((3, 90), 5), random_rows((3, 90), 6), random_rows((3, 90), 7) > -1
    each = [0.0, 0.5, 1.0]
    got = ppo.compute_gae(rewards, values, mask, gamma=0.9, gae_lambda=f64(each))
    for row, gae_lambda in enumerate(each):
        want = ppo.compute_gae(*(x[[row]] for x in (rewards, values, mask)), gamma=0.9, gae_lambda=gae_lambda)
        assert all(torch.equal(a[[row]], b) for a, b in zip(got, want, strict=True))
    with pytest.raises(ValueError, match="gae_lambda"):
        ppo.compute_gae(rewards, values, mask, gamma=0.9, gae_lambda=f64([0.5]))


def test_no_rows_are_no_error():
    nothing = torch.zeros(0, 4)
    advantages, returns = ppo.compute_gae(nothing, nothing, nothing.bool(), gamma=1.0, gae_lambda=1.0)
    assert advantages.shape == returns.shape == (0, 4)


def test_the_lambda_of_a_length_by_hand():
    # alpha 0.05: 400 tokens 1 - 1 / 20 = 0.95; 100 tokens 0.8; 20 tokens 0; 10 would be -1 and is held at 0
    lengths = [400, 100, 20, 10, 0]
    mask = torch.arange(400) < torch.tensor(lengths)[:, None]
    close(ppo.adaptive_lambda(mask, 0.05), [0.95, 0.8, 0.0, 0.0, 0.0])
    holes = mask_of([[1, 0, 1, 0, 1, 1]])  # four tokens of the policy, whatever stands between them
    close(ppo.adaptive_lambda(holes, 0.5), [0.5])
