"""The PPO maths: answers worked by hand, then properties that hold for any batch.

B samples, T response tokens, V vocabulary. "Valid" tokens are those with mask 1. Golden vectors have their own file.
"""

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core import logprobs as logprob_maths
from trainer import ppo

HOLE = -777.0  # stands at masked slots, where nothing may read it
LN2 = math.log(2)

few = settings(max_examples=60, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**31)
unit = st.floats(0.0, 1.0)


def f64(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def mask_of(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def logs(probabilities) -> torch.Tensor:
    return f64(probabilities).log()


def close(got, want, tolerance=1e-12) -> None:
    """Equal within tolerance * max(1, |want|), shapes included."""
    got = got.detach().double() if isinstance(got, torch.Tensor) else torch.tensor(got, dtype=torch.float64)
    want = torch.as_tensor(want, dtype=torch.float64).detach()
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    excess = (got - want).abs() - tolerance * want.abs().clamp(min=1.0)
    assert bool((excess <= 0).all()), f"got {got.tolist()}, want {want.tolist()} within {tolerance:g}"


def random_rows(shape, seed, *, grid=False) -> torch.Tensor:
    """[B, T] numbers; on a grid of quarters they meet zeros and ties."""
    generator = torch.Generator().manual_seed(seed)
    if grid:
        return torch.randint(-8, 9, shape, generator=generator).double() / 4
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- the masked functions, called in one way

# name -> (its float arguments; of these the ones whose gradient training uses)
MASKED = {
    "compute_gae": (("rewards", "values", "bootstrap_values"), ()),
    "whiten": (("x",), ()),
    "masked_mean": (("x",), ("x",)),
    "policy_loss": (("logprobs", "old_logprobs", "advantages"), ("logprobs",)),
    "value_loss": (("values", "old_values", "returns"), ("values",)),
    "shape_rewards": (("token_rewards", "old_logprobs", "ref_logprobs"), ()),
}
MASK_NAMES = {"whiten": "mask", "masked_mean": "mask"}
OPTIONS = {
    "compute_gae": {"gamma": 0.97, "gae_lambda": 0.9},
    "policy_loss": {"cliprange": 0.2, "cliprange_high": 0.3, "dual_clip": 2.0},
    "value_loss": {"cliprange_value": 0.2},
    "shape_rewards": {"kl_coef": 0.3, "estimator": "k3"},
}
OUTPUTS = {
    "compute_gae": ("advantages", "returns"),
    "whiten": ("whitened",),
    "masked_mean": ("mean",),
    "policy_loss": ("loss", "stats"),
    "value_loss": ("loss", "stats"),
    "shape_rewards": ("rewards",),
}


def inputs_of(name, shape, seed, *, grid=False) -> dict[str, torch.Tensor]:
    """Random arguments of a masked function: [B, T], and [B] for the bootstrap values."""
    return {
        argument: random_rows(shape[:1] if argument == "bootstrap_values" else shape, seed + 7919 * index, grid=grid)
        for index, argument in enumerate(MASKED[name][0])
    }


def evaluate(name, inputs, mask) -> dict[str, torch.Tensor]:
    """All that a masked function gives: its outputs, stats and gradients, by name.

    The gradient is that of the sum of cubes of the outputs (the sum and the sum of squares are fixed by whitening).
    """
    leaves = {argument: tensor.clone().requires_grad_(True) for argument, tensor in inputs.items()}
    answer = getattr(ppo, name)(**leaves, **{MASK_NAMES.get(name, "response_mask"): mask}, **OPTIONS.get(name, {}))
    answer = answer if isinstance(answer, tuple) else (answer,)
    found: dict[str, torch.Tensor] = {}
    objective = None
    for output_name, output in zip(OUTPUTS[name], answer, strict=True):
        if output_name == "stats":
            found |= {stat: torch.as_tensor(number).double().detach() for stat, number in output.items()}
            continue
        found[output_name] = output.detach()
        if output.requires_grad:
            objective = (output**3).sum() + (0 if objective is None else objective)
    must_have = MASKED[name][1]
    assert objective is not None or not must_have, f"{name} is not differentiable"
    if objective is not None:
        gradients = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
        for argument, gradient in zip(leaves, gradients, strict=True):
            assert gradient is not None or argument not in must_have, f"{name} is not differentiable in {argument}"
            if gradient is not None:
                found[f"grad_{argument}"] = gradient
    return found


# ---------------------------------------------------------------- layouts: the same tokens at other positions


@st.composite
def ragged(draw):
    """(lengths, slots, width): the number of valid tokens of each row, and the positions they take in a wider batch."""
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    width = max(1, *lengths) + draw(st.integers(0, 4))
    slots = [sorted(draw(st.permutations(range(width)))[:length]) for length in lengths]
    return lengths, slots, width


def at_start(lengths):
    return [list(range(length)) for length in lengths]


def at_end(lengths, width):
    return [list(range(width - length, width)) for length in lengths]


def mask_at(slots, width) -> torch.Tensor:
    mask = torch.zeros(len(slots), width, dtype=torch.bool)
    for row, positions in enumerate(slots):
        mask[row, positions] = True
    return mask


def move(tensor, old_slots, slots, width, *, filler=HOLE) -> torch.Tensor:
    """The same numbers per row at other positions; [B] tensors stay as they are."""
    if tensor.dim() == 1:
        return tensor
    moved = torch.full((len(slots), width), filler, dtype=tensor.dtype)
    for row, (old, new) in enumerate(zip(old_slots, slots, strict=True)):
        moved[row, new] = tensor[row, old]
    return moved


def assert_same_after_move(name, inputs, old_slots, old_width, slots, width):
    before = evaluate(name, inputs, mask_at(old_slots, old_width))
    moved = {argument: move(tensor, old_slots, slots, width) for argument, tensor in inputs.items()}
    after = evaluate(name, moved, mask_at(slots, width))
    assert before.keys() == after.keys()
    for output, want in before.items():
        if want.dim() == 2:
            want = move(want, old_slots, slots, width, filler=0.0)  # and zero on every masked slot
        close(after[output], want)


@pytest.mark.parametrize("name", MASKED)
@few
@given(ragged(), seeds, st.booleans())
def test_right_padding_changes_nothing(name, batch, seed, grid):
    lengths, _, width = batch
    tight = max(1, *lengths)
    inputs = inputs_of(name, (len(lengths), tight), seed, grid=grid)
    assert_same_after_move(name, inputs, at_start(lengths), tight, at_start(lengths), width + 3)


@pytest.mark.parametrize("name", MASKED)
@few
@given(ragged(), seeds, st.booleans())
def test_left_padding_changes_nothing(name, batch, seed, grid):
    lengths, _, width = batch
    tight = max(1, *lengths)
    inputs = inputs_of(name, (len(lengths), tight), seed, grid=grid)
    assert_same_after_move(name, inputs, at_start(lengths), tight, at_end(lengths, width + 3), width + 3)


@pytest.mark.parametrize("name", MASKED)
@few
@given(ragged(), seeds, st.booleans())
def test_holes_of_tool_tokens_change_nothing(name, batch, seed, grid):
    lengths, slots, width = batch
    tight = max(1, *lengths)
    inputs = inputs_of(name, (len(lengths), tight), seed, grid=grid)
    assert_same_after_move(name, inputs, at_start(lengths), tight, slots, width)


def test_fifty_tool_tokens_do_not_discount_the_reward_behind_them():
    mask = mask_of([[1] + [0] * 50 + [1]])
    rewards, values = torch.zeros(1, 52).double(), torch.zeros(1, 52).double()
    rewards[0, 51] = 1.0
    advantages, _ = ppo.compute_gae(rewards, values, mask, gamma=0.5, gae_lambda=1.0)
    # one step, not 51, between the two valid tokens: 0.5 * 1
    close(advantages[0, [0, 51]], [0.5, 1.0])
    assert int((advantages != 0).sum()) == 2


@pytest.mark.parametrize("name", MASKED)
@few
@given(ragged(), seeds, st.randoms(use_true_random=False))
def test_the_order_of_the_samples_changes_nothing(name, batch, seed, random):
    lengths, slots, width = batch
    inputs = inputs_of(name, (len(lengths), width), seed)
    mask = mask_at(slots, width)
    order = list(range(len(lengths)))
    random.shuffle(order)
    before = evaluate(name, inputs, mask)
    after = evaluate(name, {argument: tensor[order] for argument, tensor in inputs.items()}, mask[order])
    for output, want in before.items():
        close(after[output], want[order] if want.dim() else want)


# ---------------------------------------------------------------- poison at masked slots

# right padding, left padding, holes, padding on both sides and a hole, no valid token, all valid
POISON_MASK = mask_of(
    [
        [1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 1],
        [1, 0, 0, 1, 0, 1],
        [0, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1],
    ]
)


@pytest.mark.parametrize("poison", [1e6, -1e6, 1e30, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", MASKED)
def test_poison_at_masked_slots_changes_nothing(name, poison):
    clean = inputs_of(name, tuple(POISON_MASK.shape), seed=5)
    empty_rows = ~POISON_MASK.any(dim=1)
    for argument, tensor in clean.items():
        tensor[empty_rows if tensor.dim() == 1 else ~POISON_MASK] = 0.0
        assert tensor.abs().sum() > 0, argument
    want = evaluate(name, clean, POISON_MASK)
    all_at_once = tuple(clean)
    for poisoned in [*((argument,) for argument in clean), all_at_once]:
        dirty = {argument: tensor.clone() for argument, tensor in clean.items()}
        for argument in poisoned:
            dirty[argument][empty_rows if dirty[argument].dim() == 1 else ~POISON_MASK] = poison
        got = evaluate(name, dirty, POISON_MASK)
        assert got.keys() == want.keys()
        for output, number in want.items():
            assert torch.isfinite(got[output]).all(), f"{poison} in {poisoned}: {output} is not finite"
            assert torch.equal(got[output], number), f"{poison} in {poisoned} changed {output}"
            if number.dim() == 2:
                assert (got[output][~POISON_MASK] == 0).all(), (
                    f"{poison} in {poisoned}: {output} is not 0 on a masked slot"
                )


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("poison", [1e6, math.nan, math.inf])
def test_poison_does_not_reach_another_rank(poison, center):
    x = random_rows((2, 6), 11)
    mask = POISON_MASK[2:4]
    dirty = x.masked_fill(~mask, poison)
    parts = whiten_on_ranks([dirty[:1], dirty[1:]], [mask[:1], mask[1:]], center)
    close(torch.cat(parts), ppo.whiten(x, mask, center=center), 1e-10)


@pytest.mark.parametrize("name", MASKED)
def test_no_valid_token_gives_zeros_and_zero_gradients(name):
    inputs = inputs_of(name, (2, 3), seed=3)
    for number in evaluate(name, inputs, torch.zeros(2, 3, dtype=torch.bool)).values():
        assert torch.isfinite(number).all() and (number == 0).all()


@pytest.mark.parametrize("name", MASKED)
def test_inputs_are_not_modified(name):
    inputs = inputs_of(name, tuple(POISON_MASK.shape), seed=9)
    mask = POISON_MASK.clone()
    copies = {argument: tensor.clone() for argument, tensor in inputs.items()}
    getattr(ppo, name)(**inputs, **{MASK_NAMES.get(name, "response_mask"): mask}, **OPTIONS.get(name, {}))
    assert torch.equal(mask, POISON_MASK)
    for argument, tensor in inputs.items():
        assert torch.equal(tensor, copies[argument]), argument


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MASKED)
def test_half_precision_is_raised_to_float32(name, dtype):
    narrow = {
        argument: tensor.to(dtype) for argument, tensor in inputs_of(name, tuple(POISON_MASK.shape), seed=2).items()
    }
    mask = {MASK_NAMES.get(name, "response_mask"): POISON_MASK}
    got = getattr(ppo, name)(**narrow, **mask, **OPTIONS.get(name, {}))
    want = getattr(ppo, name)(**{a: t.double() for a, t in narrow.items()}, **mask, **OPTIONS.get(name, {}))
    for output, narrow_answer, wide_answer in zip(
        OUTPUTS[name], *((answer if isinstance(answer, tuple) else (answer,)) for answer in (got, want)), strict=True
    ):
        if output != "stats":
            assert narrow_answer.dtype == torch.float32, f"{output} is {narrow_answer.dtype}"
            close(narrow_answer, wide_answer, 2e-5)


# ---------------------------------------------------------------- compute_gae


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


# ---------------------------------------------------------------- masked_mean and whiten


def test_masked_mean_by_hand():
    # rows of 1 and 3 valid tokens: (6 + 1 + 2 + 3) / 4 = 3, where the mean of the row means would be (6 + 2) / 2 = 4
    x = f64([[6.0, HOLE, HOLE], [1.0, 2.0, 3.0]])
    close(ppo.masked_mean(x, mask_of([[1, 0, 0], [1, 1, 1]])), 3.0)


def test_masked_mean_has_no_epsilon():
    assert float(ppo.masked_mean(f64([[3.0, HOLE]]), mask_of([[1, 0]]))) == 3.0


def test_whiten_by_hand():
    # 1, 2, 3, 6: mean 3, squares 4 + 1 + 0 + 9 = 14, variance 14 / 3 (n - 1), deviation 2.160246899469287
    #   -2 / 2.1602469 = -0.9258200997725514, and so on (eps 1e-8 moves the tenth digit)
    x, mask = f64([[1.0, 2.0, HOLE], [3.0, 6.0, HOLE]]), mask_of([[1, 1, 0], [1, 1, 0]])
    close(
        ppo.whiten(x, mask),
        [[-0.9258200997725514, -0.4629100498862757, 0.0], [0.0, 1.3887301496588271, 0.0]],
        2e-9,
    )
    close(
        ppo.whiten(x, mask, center=False),
        [[3 - 0.9258200997725514, 3 - 0.4629100498862757, 0.0], [3.0, 3 + 1.3887301496588271, 0.0]],
        2e-9,
    )


def test_whitening_constants_gives_zeros():
    mask = mask_of([[1, 1, 0], [0, 1, 1]])
    for constant in (0.0, 3.25, -1e4):
        close(ppo.whiten(f64([[constant] * 3] * 2), mask), torch.zeros(2, 3))


def test_whitening_one_valid_token():
    x, mask = f64([[HOLE, 5.0], [HOLE, HOLE]]), mask_of([[0, 1], [0, 0]])
    close(ppo.whiten(x, mask), [[0.0, 0.0], [0.0, 0.0]])
    close(ppo.whiten(x, mask, center=False), [[0.0, 5.0], [0.0, 0.0]])


def test_uncentred_whitening_keeps_constant_positive_rewards_positive():
    mask = mask_of([[1, 1, 0], [0, 1, 1]])
    whitened = ppo.whiten(f64([[0.7] * 3] * 2), mask, center=False)
    assert (whitened[mask] > 0).all()
    close(whitened[mask], [0.7] * 4)


@few
@given(ragged().filter(lambda batch: sum(batch[0]) >= 2), seeds, st.floats(-50, 50), st.floats(0.5, 50))
def test_whitened_tokens_have_mean_0_and_deviation_1(batch, seed, shift, scale):
    lengths, slots, width = batch
    mask = mask_at(slots, width)
    x = shift + scale * random_rows((len(lengths), width), seed)
    tokens = ppo.whiten(x, mask)[mask].tolist()
    mean = math.fsum(tokens) / len(tokens)
    assert abs(mean) < 1e-9
    variance = math.fsum(token**2 for token in tokens) / (len(tokens) - 1)
    spread = float(x[mask].std())
    assert abs(variance - 1) < 1e-12 + 2e-8 / spread**2  # the 1e-8 under the root is felt where the spread is small
    close(ppo.whiten(x, mask, center=False)[mask], f64(tokens) + x[mask].mean(), 1e-11)


def test_whitening_in_float32_survives_a_mean_far_from_zero():
    # E[x^2] - E[x]^2 in float32 has no correct digit left here
    x = (1000.0 + random_rows((8, 64), 1)).float()
    mask = torch.ones(8, 64, dtype=torch.bool)
    got = ppo.whiten(x, mask)
    assert got.dtype == torch.float32
    close(got, ppo.whiten(x.double(), mask), 2e-4)
    close(got.double().std(), 1.0, 1e-5)


def whiten_on_ranks(parts, masks, center=True):
    """`whiten` on one thread per rank, whose all_reduce waits for all ranks and sums what they bring."""
    ranks = len(parts)
    barrier = threading.Barrier(ranks, timeout=20)
    brought: list[torch.Tensor | None] = [None] * ranks
    results: list[torch.Tensor | None] = [None] * ranks
    errors: list[BaseException] = []

    def run(rank):
        def all_reduce(sums):
            assert sums.dim() == 1 and sums.dtype == torch.float64
            brought[rank] = sums.clone()
            barrier.wait()
            total = torch.stack(brought).sum(dim=0)  # raises if the ranks brought different lengths
            barrier.wait()
            return total

        try:
            results[rank] = ppo.whiten(parts[rank], masks[rank], center=center, all_reduce=all_reduce)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    # a broken barrier is only the echo of the first error on another rank
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return results


@pytest.mark.parametrize("center", [True, False])
@few
@given(ragged(), seeds, st.data())
def test_whitening_on_two_ranks_equals_the_union(center, batch, seed, data):
    lengths, slots, width = batch
    cut = data.draw(st.integers(0, len(lengths)))
    x, mask = random_rows((len(lengths), width), seed), mask_at(slots, width)
    x[cut:] = 100.0 + 30.0 * x[cut:]  # another scale on the second rank: whitening each alone would be far off
    parts = whiten_on_ranks([x[:cut], x[cut:]], [mask[:cut], mask[cut:]], center)
    close(torch.cat(parts), ppo.whiten(x, mask, center=center), 1e-10)


def test_whitening_on_ranks_of_unequal_width():
    # B21: ragged batches have another width on every rank
    narrow, wide = random_rows((2, 5), 1), random_rows((3, 9), 2)
    union = ppo.whiten(torch.cat([narrow.reshape(1, -1), wide.reshape(1, -1)], dim=1), torch.ones(1, 37).bool())
    first, second = whiten_on_ranks([narrow, wide], [torch.ones(2, 5).bool(), torch.ones(3, 9).bool()])
    close(torch.cat([first.flatten(), second.flatten()]), union.flatten(), 1e-10)


@pytest.mark.parametrize("center", [True, False])
def test_a_rank_without_valid_tokens_takes_part_in_the_reduction(center):
    x, mask = f64([[1.0, 2.0, 6.0]]), mask_of([[1, 1, 1]])
    empty = torch.zeros(1, 3, dtype=torch.bool)
    first, second = whiten_on_ranks([x, torch.full_like(x, math.nan)], [mask, empty], center)
    close(first, ppo.whiten(x, mask, center=center), 1e-10)
    close(second, torch.zeros(1, 3))
    for nothing in whiten_on_ranks([x, x], [empty, empty], center):
        close(nothing, torch.zeros(1, 3))


def test_one_valid_token_over_all_ranks():
    x = f64([[5.0, 7.0]])
    first, second = whiten_on_ranks([x, x], [mask_of([[0, 1]]), mask_of([[0, 0]])], center=False)
    close(first, [[0.0, 7.0]])
    close(second, [[0.0, 0.0]])


def test_whitening_on_ranks_in_float32_stays_float32():
    x = (1000.0 + random_rows((4, 8), 3)).float()
    mask = torch.ones(4, 8, dtype=torch.bool)
    parts = whiten_on_ranks([x[:2], x[2:]], [mask[:2], mask[2:]])
    assert all(part.dtype == torch.float32 for part in parts)
    close(torch.cat(parts), ppo.whiten(x.double(), mask), 2e-4)


# ---------------------------------------------------------------- policy_loss


def policy_loss(logprobs, old_logprobs, advantages, mask=None, **options):
    """(loss, stats, d loss / d logprobs); all tokens valid if no mask is given."""
    logprobs = logprobs.clone().requires_grad_(True)
    mask = torch.ones(logprobs.shape, dtype=torch.bool) if mask is None else mask
    loss, stats = ppo.policy_loss(logprobs, old_logprobs, advantages, mask, **{"cliprange": 0.2, **options})
    (gradient,) = torch.autograd.grad(loss, [logprobs])
    return loss.detach(), stats, gradient


def test_policy_loss_by_hand():
    # cliprange 0.2; probabilities give ratios 1.5, 1.5, 0.5, 0.5 with advantages +1, -1, +1, -1:
    #   +1, 1.5: max(-1.5, -1.2) = -1.2  clipped, gradient 0
    #   -1, 1.5: max( 1.5,  1.2) =  1.5  kept, d/dlogp of -A ratio = 1.5
    #   +1, 0.5: max(-0.5, -0.8) = -0.5  kept, gradient -0.5
    #   -1, 0.5: max( 0.5,  0.8) =  0.8  clipped, gradient 0
    # loss = (-1.2 + 1.5 - 0.5 + 0.8) / 4 = 0.15; two of four clipped
    # approx_kl = mean of log old - log new = -(2 ln 1.5 + 2 ln 0.5) / 4 = ln(4 / 3) / 2 = 0.14384103622589042
    loss, stats, gradient = policy_loss(
        logs([[0.6, 0.6, 0.2, 0.2]]), logs([[0.4, 0.4, 0.4, 0.4]]), f64([[1.0, -1.0, 1.0, -1.0]])
    )
    close(loss, 0.15)
    close(gradient, [[0.0, 0.375, -0.125, 0.0]])
    close(stats["pg_clipfrac"], 0.5)
    close(stats["approx_kl"], 0.14384103622589042)


def test_policy_loss_counts_valid_tokens_only():
    # the token kept of each kind above, spread over two rows with holes: (1.5 - 0.5) / 2 = 0.5, none clipped
    loss, stats, gradient = policy_loss(
        f64([[HOLE, math.log(0.6), HOLE], [math.log(0.2), HOLE, HOLE]]),
        f64([[0.0, math.log(0.4), 0.0], [math.log(0.4), 0.0, 0.0]]),
        f64([[9.0, -1.0, 9.0], [1.0, 9.0, 9.0]]),
        mask_of([[0, 1, 0], [1, 0, 0]]),
    )
    close(loss, 0.5)
    close(gradient, [[0.0, 0.75, 0.0], [-0.25, 0.0, 0.0]])
    close(stats["pg_clipfrac"], 0.0)
    close(stats["approx_kl"], -(math.log(1.5) + math.log(0.5)) / 2)


def test_policy_loss_with_an_asymmetric_clip_by_hand():
    # bounds 0.8 and 1.4, advantage +1, ratios 1.5 and 1.3: -1.4 clipped, -1.3 kept; loss (-1.4 - 1.3) / 2 = -1.35
    # with a symmetric 0.2 both are clipped at 1.2: loss -1.2
    new, old, advantages = logs([[0.6, 0.52]]), logs([[0.4, 0.4]]), f64([[1.0, 1.0]])
    loss, stats, gradient = policy_loss(new, old, advantages, cliprange_high=0.4)
    close(loss, -1.35)
    close(gradient, [[0.0, -0.65]])
    close(stats["pg_clipfrac"], 0.5)
    close(stats["approx_kl"], -0.33391468628782776)  # k1 is -(ln 1.5 + ln 1.3) / 2; k3 would be +0.066
    loss, stats, gradient = policy_loss(new, old, advantages)
    close(loss, -1.2)
    close(gradient, [[0.0, 0.0]])
    close(stats["pg_clipfrac"], 1.0)
    # the low side keeps its own bound: advantage -1, ratio 0.5: max(0.5, 0.8) = 0.8, not 0.6
    close(policy_loss(logs([[0.2]]), logs([[0.4]]), f64([[-1.0]]), cliprange_high=0.4)[0], 0.8)


def test_policy_loss_with_dual_clip_by_hand():
    # dual_clip 3, ratio 5 (0.5 over 0.1) but for the last (0.5: 0.1 over 0.2):
    #   A -1: max(5, 1.2) = 5, then min(5, 3 * 1) = 3, gradient 0
    #   A -2, ratio 2: max(4, 2.4) = 4, below 6, stays; gradient 4
    #   A +1, ratio 5: max(-5, -1.2) = -1.2, dual clip is for negative advantages only
    #   A -1, ratio 0.5: max(0.5, 0.8) = 0.8, below 3, stays
    # loss = (3 + 4 - 1.2 + 0.8) / 4 = 1.65; clipfrac, before dual clip: tokens 3 and 4, so 0.5
    new, old = logs([[0.5, 0.2, 0.5, 0.1]]), logs([[0.1, 0.1, 0.1, 0.2]])
    advantages = f64([[-1.0, -2.0, 1.0, -1.0]])
    loss, stats, gradient = policy_loss(new, old, advantages, dual_clip=3.0)
    close(loss, 1.65)
    close(gradient, [[0.0, 1.0, 0.0, 0.0]])
    close(stats["pg_clipfrac"], 0.5)
    # without it: (5 + 4 - 1.2 + 0.8) / 4 = 2.15
    close(policy_loss(new, old, advantages)[0], 2.15)


def test_policy_loss_normalizer_by_hand():
    # the loss sum of the first example is 0.6; over 10 tokens of the whole step: 0.06. The stats stay as they were
    call = (logs([[0.6, 0.6, 0.2, 0.2]]), logs([[0.4, 0.4, 0.4, 0.4]]), f64([[1.0, -1.0, 1.0, -1.0]]))
    loss, stats, gradient = policy_loss(*call, normalizer=10)
    close(loss, 0.06)
    close(gradient, [[0.0, 0.15, -0.05, 0.0]])
    close(stats["pg_clipfrac"], 0.5)
    close(stats["approx_kl"], 0.14384103622589042)


@few
@given(ragged().filter(lambda batch: any(batch[0])), seeds, st.sampled_from([None, 1.5, 3.0]))
def test_at_ratio_1_the_gradient_is_minus_the_advantage_over_n(batch, seed, dual_clip):
    lengths, slots, width = batch
    mask = mask_at(slots, width)
    logprobs, advantages = -random_rows(mask.shape, seed).abs(), random_rows(mask.shape, seed + 1)
    loss, stats, gradient = policy_loss(logprobs, logprobs.clone(), advantages, mask, dual_clip=dual_clip)
    count = sum(lengths)
    close(gradient, torch.where(mask, -advantages / count, 0.0))
    close(loss, -math.fsum(advantages[mask].tolist()) / count)
    close(stats["pg_clipfrac"], 0.0)
    close(stats["approx_kl"], 0.0)


@pytest.mark.parametrize("name", ["policy_loss", "value_loss"])
@few
@given(ragged().filter(lambda batch: any(batch[0])), seeds, st.data())
def test_micro_batches_with_one_normalizer_add_up(name, batch, seed, data):
    lengths, slots, width = batch
    mask, total = mask_at(slots, width), float(sum(lengths))
    cut = data.draw(st.integers(0, len(lengths)))
    inputs = inputs_of(name, tuple(mask.shape), seed)
    trained = MASKED[name][1][0]

    def loss_and_gradient(rows, **normalizer):
        leaves = {argument: tensor[rows].clone() for argument, tensor in inputs.items()}
        leaves[trained].requires_grad_(True)
        loss, _ = getattr(ppo, name)(**leaves, response_mask=mask[rows], **OPTIONS[name], **normalizer)
        return loss.detach(), torch.autograd.grad(loss, [leaves[trained]])[0]

    whole, gradient = loss_and_gradient(slice(None))
    pieces = [
        loss_and_gradient(rows, normalizer=total) for rows in (slice(0, cut), slice(cut, None)) if len(mask[rows])
    ]
    close(sum(loss for loss, _ in pieces), whole)
    close(torch.cat([piece for _, piece in pieces]), gradient)


@few
@given(seeds, st.floats(0.05, 0.5), st.floats(0.05, 0.5), st.sampled_from([None, 1.2, 3.0]))
def test_a_token_has_a_gradient_exactly_where_no_clip_binds(seed, low, high, dual_clip):
    new, old = -random_rows((1, 12), seed).abs(), -random_rows((1, 12), seed + 1).abs()
    advantages = random_rows((1, 12), seed + 2)
    _, _, gradient = policy_loss(new, old, advantages, cliprange=low, cliprange_high=high, dual_clip=dual_clip)
    for token, (n, o, a) in enumerate(zip(new[0].tolist(), old[0].tolist(), advantages[0].tolist(), strict=True)):
        ratio = math.exp(n - o)
        too_good = a > 0 and ratio > 1 + high
        too_bad = a < 0 and ratio < 1 - low
        past_dual = a < 0 and dual_clip is not None and ratio > dual_clip
        close(gradient[0, token], 0.0 if too_good or too_bad or past_dual else -a * ratio / 12)


def test_stats_hold_no_graph():
    logprobs = logs([[0.6, 0.2]]).requires_grad_(True)
    values = f64([[1.0, 2.0]]).requires_grad_(True)
    mask, ones = mask_of([[1, 1]]), torch.ones(1, 2).double()
    for _, stats in (
        ppo.policy_loss(logprobs, ones, ones, mask, cliprange=0.2),
        ppo.value_loss(values, ones, ones, mask, cliprange_value=0.2),
    ):
        assert not any(isinstance(number, torch.Tensor) and number.requires_grad for number in stats.values())


# ---------------------------------------------------------------- value_loss and the critic's measure


def test_value_loss_by_hand():
    # cliprange_value 0.2, old value 0.5, so values are clipped to [0.3, 0.7]:
    #   v  1.0, ret 0: max(1,    0.7^2 = 0.49) = 1     the plain square, gradient  1
    #   v  1.0, ret 2: max(1, (0.7 - 2)^2 = 1.69) = 1.69  the clipped one, gradient 0
    #   v  0.6, ret 1: both 0.16                        inside the range, gradient -0.4
    #   v -1.0, ret 0: max(1,    0.3^2 = 0.09) = 1     gradient -1
    # loss = 0.5 * (1 + 1.69 + 0.16 + 1) / 4 = 0.48125; each gradient over 4
    values = f64([[1.0, 1.0, 0.6, -1.0]]).requires_grad_(True)
    loss, stats = ppo.value_loss(
        values,
        f64([[0.5] * 4]),
        f64([[0.0, 2.0, 1.0, 0.0]]),
        mask_of([[1, 1, 1, 1]]),
        cliprange_value=0.2,
    )
    loss.backward()
    close(loss, 0.48125)
    close(values.grad, [[0.25, 0.0, -0.1, -0.25]])
    if "vf_clipfrac" in stats:
        close(stats["vf_clipfrac"], 0.25)


def test_value_loss_counts_valid_tokens_and_takes_a_normalizer():
    # one row with 1 token off by 2, one with 3 tokens off by 0: 0.5 * 4 / 4 = 0.5 (a mean of row means gives 1);
    # over 20 tokens of the whole step: 0.5 * 4 / 20 = 0.1
    values = f64([[2.0, HOLE, HOLE], [0.0, 0.0, 0.0]])
    call = (values, values.clone(), torch.zeros(2, 3).double(), mask_of([[1, 0, 0], [1, 1, 1]]))
    close(ppo.value_loss(*call, cliprange_value=0.2)[0], 0.5)
    close(ppo.value_loss(*call, cliprange_value=0.2, normalizer=20)[0], 0.1)


@few
@given(seeds, st.floats(0.05, 1.0))
def test_value_clipping_never_lowers_the_loss(seed, cliprange_value):
    values, old, returns = (random_rows((2, 6), seed + k) for k in range(3))
    mask = torch.ones(2, 6, dtype=torch.bool)
    clipped, _ = ppo.value_loss(values, old, returns, mask, cliprange_value=cliprange_value)
    unclipped, _ = ppo.value_loss(values, old, returns, mask, cliprange_value=1e9)
    assert float(clipped) >= float(unclipped) - 1e-12
    close(unclipped, 0.5 * math.fsum(((values - returns) ** 2).flatten().tolist()) / 12)


def test_explained_variance_by_hand():
    # returns 1, 2, 3, 6 (mean 3, squares 14); errors returns - values = 1, 1, -1, 3 (mean 1, squares 0 + 0 + 4 + 4 = 8)
    # 1 - 8 / 14 = 3 / 7. A value that is off by a constant explains everything
    returns, mask = f64([[1.0, 2.0, math.nan], [3.0, 6.0, math.inf]]), mask_of([[1, 1, 0], [1, 1, 0]])
    close(ppo.explained_variance(f64([[0.0, 1.0, 0.0], [4.0, 3.0, 0.0]]), returns, mask), 3 / 7)
    close(ppo.explained_variance(returns - 5.0, returns, mask), 1.0)
    close(ppo.explained_variance(torch.zeros_like(returns), returns, mask), 0.0)
    close(ppo.explained_variance(-returns, returns, mask), -3.0)  # errors are twice the returns: 1 - 4


@pytest.mark.parametrize("constant", [0.0, 3.25, 0.1])
def test_explained_variance_of_constant_returns_is_0(constant):
    # 0.1 + 0.1 + 0.1 is not 3 * 0.1: rounding alone must not become the denominator
    returns, mask = f64([[constant] * 3]), mask_of([[1, 1, 1]])
    close(ppo.explained_variance(f64([[0.0, 1.0, 2.0]]), returns, mask), 0.0)


# ---------------------------------------------------------------- kl_estimate, shape_rewards, KLController


def test_kl_estimates_by_hand():
    # p = 1/2 under the policy; 1/4, 1/2 and 1 under the reference, so d = ref - policy = -ln 2, 0, ln 2
    #   k1 = -d = ln 2, 0, -ln 2     k2 = d^2 / 2 = 0.2402265..., 0, the same
    #   k3 = exp(d) - 1 - d = 1/2 - 1 + ln 2 = 0.1931471..., 0, 2 - 1 - ln 2 = 0.3068528...
    policy, reference = logs([[0.5, 0.5, 0.5]]), logs([[0.25, 0.5, 1.0]])
    close(ppo.kl_estimate(policy, reference, "k1"), [[0.6931471805599453, 0.0, -0.6931471805599453]])
    close(ppo.kl_estimate(policy, reference, "k2"), [[0.2402265069591007, 0.0, 0.2402265069591007]])
    close(ppo.kl_estimate(policy, reference, "k3"), [[0.1931471805599453, 0.0, 0.3068528194400547]])


def test_kl_estimates_are_not_clamped():
    policy, reference = f64([[0.0, -30.0]]), f64([[-30.0, 0.0]])
    close(ppo.kl_estimate(policy, reference, "k1"), [[30.0, -30.0]])
    close(ppo.kl_estimate(policy, reference, "k2"), [[450.0, 450.0]])
    close(ppo.kl_estimate(policy, reference, "k3"), [[29.0 + math.exp(-30), math.exp(30) - 31]])


@few
@given(st.lists(st.floats(-20, 0), min_size=1, max_size=8), st.lists(st.floats(-20, 0), min_size=8, max_size=8))
def test_k2_and_k3_are_never_negative(policy, reference):
    policy, reference = f64([policy]), f64([reference[: len(policy)]])
    assert (ppo.kl_estimate(policy, reference, "k2") >= 0).all()
    assert (ppo.kl_estimate(policy, reference, "k3") >= -1e-15).all()
    assert (ppo.kl_estimate(policy, policy, "k3") == 0).all()


@few
@given(seeds)
def test_k1_and_k3_have_the_true_kl_as_their_mean(seed):
    # exactly, summing over the vocabulary instead of sampling: KL(policy || reference), not the other direction
    policy, reference = (random_rows((1, 6), seed + k).log_softmax(-1) for k in range(2))
    true = math.fsum(math.exp(p) * (p - q) for p, q in zip(policy[0].tolist(), reference[0].tolist(), strict=True))
    for estimator in ("k1", "k3"):
        close((policy.exp() * ppo.kl_estimate(policy, reference, estimator)).sum(), true)


def test_shaped_rewards_by_hand():
    # reward 1, policy 1/2, reference 1/4, kl_coef 0.1: the policy is more sure than the reference, so it pays
    #   k1: 1 - 0.1 * 0.6931471805599453    k2: 1 - 0.1 * 0.2402265069591007    k3: 1 - 0.1 * 0.1931471805599453
    # the second token is masked: 0, though it carries a reward
    call = (f64([[1.0, 5.0]]), logs([[0.5, 0.5]]), logs([[0.25, 0.25]]), mask_of([[1, 0]]))
    close(ppo.shape_rewards(*call, kl_coef=0.1), [[0.9306852819440055, 0.0]])
    close(ppo.shape_rewards(*call, kl_coef=0.1, estimator="k1"), [[0.9306852819440055, 0.0]])
    close(ppo.shape_rewards(*call, kl_coef=0.1, estimator="k2"), [[0.97597734930408993, 0.0]])
    close(ppo.shape_rewards(*call, kl_coef=0.1, estimator="k3"), [[0.98068528194400547, 0.0]])
    close(ppo.shape_rewards(*call, kl_coef=0.0), [[1.0, 0.0]])


def test_every_token_pays_for_its_own_kl():
    # k1 of 1/2 against 1/4 is ln 2, of 1/4 against 1/2 it is -ln 2, of 1/2 against 1/2 nothing; kl_coef 0.5
    shaped = ppo.shape_rewards(
        f64([[0.0, 1.0, 2.0, HOLE]]),
        logs([[0.5, 0.25, 0.5, 0.1]]),
        logs([[0.25, 0.5, 0.5, 0.9]]),
        mask_of([[1, 1, 1, 0]]),
        kl_coef=0.5,
    )
    close(shaped, [[-0.34657359027997264, 1.34657359027997264, 2.0, 0.0]])


def test_the_kl_controller_by_hand():
    # target 6 nats per response, horizon 1000, 100 responses a step:
    #   KL 6.6: error 0.1, factor 1 + 0.1 * 100 / 1000 = 1.01;   KL 60: error held at 0.2, factor 1.02
    #   KL 5.4: error -0.1, factor 0.99;   KL -1: error held at -0.2, factor 0.98;   KL 6: stays
    for kl, want in ((6.6, 0.0202), (60.0, 0.0204), (5.4, 0.0198), (-1.0, 0.0196), (6.0, 0.02)):
        controller = ppo.KLController(0.02, target_kl=6.0, horizon=1000)
        controller.update(kl, 100)
        close(controller.coef, want)
    fixed = ppo.KLController(0.02)
    fixed.update(60.0, 100)
    assert fixed.coef == 0.02


# ---------------------------------------------------------------- log-probabilities and entropy


# logits ln 1, ln 2, ln 1: probabilities 1/4, 1/2, 1/4; at temperature 1/2 they are squared: 1/6, 4/6, 1/6;
# at temperature 2 they are 1, sqrt 2, 1 over 2 + sqrt 2, and sqrt 2 / (2 + sqrt 2) = sqrt 2 - 1
LOGITS = [0.0, LN2, 0.0]
AT_TEMPERATURE = {
    1.0: [math.log(1 / 4), math.log(1 / 2), math.log(1 / 4)],
    0.5: [math.log(1 / 6), math.log(2 / 3), math.log(1 / 6)],
    2.0: [math.log(1 - math.sqrt(1 / 2)), math.log(math.sqrt(2) - 1), math.log(1 - math.sqrt(1 / 2))],
}


@pytest.mark.parametrize("temperature", AT_TEMPERATURE)
def test_logprobs_by_hand(temperature):
    logits, ids = f64([[LOGITS] * 3]), torch.tensor([[2, 1, 0]])
    want = AT_TEMPERATURE[temperature]
    close(logprob_maths.logprobs_from_logits(logits, ids, temperature), [[want[2], want[1], want[0]]])
    close(logprob_maths.logprobs_from_logits(logits, ids, temperature=temperature), [[want[2], want[1], want[0]]])
    if temperature == 1.0:
        close(logprob_maths.logprobs_from_logits(logits, ids), [[want[2], want[1], want[0]]])


@pytest.mark.parametrize(
    ("temperature", "want"),
    # 2 (1/4) ln 4 + (1/2) ln 2 = 1.5 ln 2; 2 (1/6) ln 6 + (2/3) ln 1.5 = 0.5972531564 + 0.2703100721
    [(1.0, 1.0397207708399179), (0.5, 0.8675632284814612)],
)
def test_entropy_by_hand(temperature, want):
    close(logprob_maths.entropy_from_logits(f64([[LOGITS]]), temperature), [[want]])


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 1000])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_entropy_of_the_uniform_distribution_is_log_v(vocabulary, temperature):
    logits = torch.full((2, 3, vocabulary), 13.0, dtype=torch.float64)
    close(logprob_maths.entropy_from_logits(logits, temperature), [[math.log(vocabulary)] * 3] * 2)


@pytest.mark.parametrize(("temperature", "want"), [(1.0, [-1 / 4, 1 / 2, -1 / 4]), (0.5, [-1 / 3, 2 / 3, -1 / 3])])
def test_gradient_of_a_logprob_by_hand(temperature, want):
    # d logp_1 / d logit_j = ((j is 1) - p_j) / temperature, with p = 1/4, 1/2, 1/4 and at 0.5 p = 1/6, 2/3, 1/6
    logits = f64([[LOGITS]]).requires_grad_(True)
    logprob_maths.logprobs_from_logits(logits, torch.tensor([[1]]), temperature).sum().backward()
    close(logits.grad, [[want]])


def test_gradient_of_the_entropy_by_hand():
    # dH/dlogit_i = -p_i (ln p_i + H) with H = 1.5 ln 2:
    #   p = 1/4: -(1/4) (-2 + 1.5) ln 2 = ln 2 / 8;    p = 1/2: -(1/2) (-1 + 1.5) ln 2 = -ln 2 / 4
    logits = f64([[LOGITS]]).requires_grad_(True)
    logprob_maths.entropy_from_logits(logits).sum().backward()
    close(logits.grad, [[[LN2 / 8, -LN2 / 4, LN2 / 8]]])


@few
@given(seeds, st.integers(1, 9), st.floats(0.2, 3.0))
def test_probabilities_sum_to_1_over_the_vocabulary(seed, vocabulary, temperature):
    logits = 5.0 * random_rows((2, 3, vocabulary), seed)
    every_token = [
        logprob_maths.logprobs_from_logits(logits, torch.full((2, 3), token), temperature)
        for token in range(vocabulary)
    ]
    logprobs = torch.stack(every_token, dim=-1)  # [B, T, V]
    close(logprobs.exp().sum(-1), torch.ones(2, 3))
    assert (logprobs <= 1e-15).all()
    entropy = logprob_maths.entropy_from_logits(logits, temperature)
    close(entropy, -(logprobs.exp() * logprobs).sum(-1), 1e-11)
    assert (entropy >= -1e-12).all() and (entropy <= math.log(vocabulary) + 1e-12).all()


@few
@given(seeds, st.floats(0.2, 3.0), st.floats(-1e3, 1e3))
def test_temperature_divides_and_a_shift_of_the_logits_changes_nothing(seed, temperature, shift):
    logits, ids = random_rows((2, 3, 5), seed), torch.tensor([[0, 1, 2], [3, 4, 0]])
    want = logprob_maths.logprobs_from_logits(logits, ids, temperature)
    close(logprob_maths.logprobs_from_logits(logits / temperature, ids), want)
    close(logprob_maths.logprobs_from_logits(logits + shift, ids, temperature), want, 1e-10)
    close(
        logprob_maths.entropy_from_logits(logits + shift, temperature),
        logprob_maths.entropy_from_logits(logits / temperature),
        1e-10,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_half_precision_logits_are_computed_in_float32(dtype, temperature):
    logits = (4.0 * random_rows((2, 5, 300), 1)).to(dtype)
    ids = torch.arange(10).reshape(2, 5) * 29
    logprobs = logprob_maths.logprobs_from_logits(logits, ids, temperature)
    entropy = logprob_maths.entropy_from_logits(logits, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    # the same rounded logits in float64; a bfloat16 softmax or division is off by 1e-2
    close(logprobs, logprob_maths.logprobs_from_logits(logits.double(), ids, temperature), 5e-6)
    close(entropy, logprob_maths.entropy_from_logits(logits.double(), temperature), 5e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_are_not_modified(dtype):
    leaf = random_rows((2, 3, 5), 4).to(dtype).requires_grad_(True)
    logits = leaf * 1.0  # a graph tensor, as a model gives it: in-place division would pass unseen on it
    before, ids = logits.detach().clone(), torch.tensor([[0, 1, 2], [3, 4, 0]])
    first = logprob_maths.logprobs_from_logits(logits, ids, 0.5)
    entropy = logprob_maths.entropy_from_logits(logits, 0.5)
    second = logprob_maths.logprobs_from_logits(logits, ids, 0.5)
    (first.sum() + entropy.sum()).backward()
    assert torch.equal(logits.detach(), before)
    assert torch.equal(first, second)
    assert torch.isfinite(leaf.grad).all()


def test_logprobs_do_not_depend_on_the_size_of_the_batch():
    logits = (3.0 * random_rows((8, 6, 50), 6)).float()
    ids = torch.arange(48).reshape(8, 6)
    whole = logprob_maths.logprobs_from_logits(logits, ids, 0.8)
    one_by_one = [logprob_maths.logprobs_from_logits(logits[[b]], ids[[b]], 0.8) for b in range(8)]
    close(torch.cat(one_by_one), whole, 1e-6)


def test_far_logits_stay_finite():
    logits = f64([[[1e4, 0.0, -1e4]]]).float()
    close(logprob_maths.logprobs_from_logits(logits, torch.tensor([[0]])), [[0.0]])
    close(logprob_maths.logprobs_from_logits(logits, torch.tensor([[2]])), [[-2e4]])
    close(logprob_maths.entropy_from_logits(logits), [[0.0]])


# ---------------------------------------------------------------- errors in words


def zeros_for(name, shape=(2, 3)) -> dict[str, torch.Tensor]:
    tensors = {argument: torch.zeros(shape) for argument in MASKED[name][0] if argument != "bootstrap_values"}
    return tensors | {MASK_NAMES.get(name, "response_mask"): torch.ones(shape, dtype=torch.bool)}


# shapes that broadcast against [2, 3] are the dangerous ones: they would run and give a wrong number
@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (2, 1), (3, 2)], ids=str)
@pytest.mark.parametrize(("name", "argument"), [(name, argument) for name in MASKED for argument in zeros_for(name)])
def test_unequal_shapes_are_refused_and_both_are_named(name, argument, shape):
    tensors = zeros_for(name)
    tensors[argument] = torch.zeros(shape, dtype=tensors[argument].dtype)
    with pytest.raises(ValueError) as error:
        getattr(ppo, name)(**tensors, **OPTIONS.get(name, {}))
    assert "2, 3" in str(error.value) and str(shape)[1:-1] in str(error.value)


@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (2, 1)], ids=str)
def test_kl_estimate_refuses_unequal_shapes(shape):
    with pytest.raises(ValueError) as error:
        ppo.kl_estimate(torch.zeros(2, 3), torch.zeros(shape), "k1")
    assert "2, 3" in str(error.value) and str(shape)[1:-1] in str(error.value)


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 1), (2, 3), ()], ids=str)
def test_bootstrap_values_must_be_one_per_sample(shape):
    with pytest.raises(ValueError, match="bootstrap_values"):
        ppo.compute_gae(**zeros_for("compute_gae"), gamma=1.0, gae_lambda=1.0, bootstrap_values=torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (2, 1), (2, 3, 1)], ids=str)
def test_logprobs_refuse_ids_of_another_shape(shape):
    with pytest.raises(ValueError) as error:
        logprob_maths.logprobs_from_logits(torch.zeros(2, 3, 5), torch.zeros(shape, dtype=torch.int64))
    assert "2, 3" in str(error.value) and str(shape)[1:-1] in str(error.value)


@pytest.mark.parametrize("unknown", ["k4", "K1", "", "kl", None])
def test_an_unknown_kl_estimator_is_refused_and_the_known_ones_are_listed(unknown):
    zeros = torch.zeros(2, 3)
    with pytest.raises(ValueError) as error:
        ppo.kl_estimate(zeros, zeros, unknown)
    assert all(known in str(error.value) for known in ("k1", "k2", "k3"))
    with pytest.raises(ValueError) as error:
        ppo.shape_rewards(**zeros_for("shape_rewards"), kl_coef=0.1, estimator=unknown)
    assert all(known in str(error.value) for known in ("k1", "k2", "k3"))


@pytest.mark.parametrize("temperature", [0.0, -1.0, 0, -1e-9])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    logits = torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match="temperature"):
        logprob_maths.logprobs_from_logits(logits, torch.zeros(2, 3, dtype=torch.int64), temperature)
    with pytest.raises(ValueError, match="temperature"):
        logprob_maths.entropy_from_logits(logits, temperature)
