"""Log-probabilities and entropy of tokens, by hand and as properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core import logprobs as logprob_maths
from ppo_cases import LN2, close, f64, few, random_rows, seeds

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


@pytest.mark.parametrize("vocabulary", [5_000, 32_000, 50_257, 152_000])
def test_many_ids_cost_no_digit(vocabulary):
    """torch adds up such a row on a CPU to 3e-6 to 3e-5, one way; what drew a token and what learns would differ."""
    logits = (4.0 * random_rows((1, 20, vocabulary), 3)).float()
    logits[0, 0], logits[0, 0, 7] = -11.0, 0.0  # many that are small and equal: the worst
    logits.requires_grad_()
    ids = torch.arange(20).reshape(1, 20) * (vocabulary // 21)
    logprobs = logprob_maths.logprobs_from_logits(logits, ids, 0.9)
    wide = logits.detach().double().requires_grad_()
    exact = logprob_maths.logprobs_from_logits(wide, ids, 0.9)
    assert float((logprobs - exact).abs().max()) < 4e-6
    close(logprob_maths.entropy_from_logits(logits, 0.9), logprob_maths.entropy_from_logits(wide, 0.9), 1e-4)
    logprobs.sum().backward()
    exact.sum().backward()
    assert float((logits.grad - wide.grad).abs().max()) < 5e-5
