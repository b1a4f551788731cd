"""What no function of the PPO maths may depend on: where the valid tokens lie and what stands at the other slots; and
the errors of all of them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core import logprobs as logprob_maths
from ppo_cases import (
    MASK_NAMES,
    MASKED,
    OPTIONS,
    OUTPUTS,
    POISON_MASK,
    assert_same_after_move,
    at_end,
    at_start,
    close,
    evaluate,
    few,
    inputs_of,
    mask_at,
    mask_of,
    ragged,
    seeds,
)
from trainer import ppo

# ---------------------------------------------------------------- layouts: the same tokens at other positions


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
