"""The PPO maths: losses, KL and shaped rewards, by hand, then properties that hold for any batch.

B samples, T response tokens. "Valid" tokens are those with mask 1. Golden vectors have their own file.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_cases import (
    HOLE,
    MASKED,
    OPTIONS,
    close,
    f64,
    few,
    inputs_of,
    logs,
    mask_at,
    mask_of,
    ragged,
    random_rows,
    seeds,
)
from trainer import ppo

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
