"""The policy's side of the loss: by hand, as a sum over tokens that may be cut anywhere, and the gradient of its KL."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.schema import PPOConfig
from ppo_cases import LN2, POISON_MASK, close, f64, few, logs, mask_of, random_rows, seeds
from trainer import ppo
from trainer.objective import RATIO_ERROR, TokenFields, add_up, policy_objective

EVERYTHING = PPOConfig(
    cliprange=0.2, importance_cap=1.8, kl_loss_coef=0.1, kl_loss="k3", entropy_coef=0.01, dual_clip=4.0
)


def by_hand(**changes) -> TokenFields:
    """Ratios 1.5, 1.5, 0.5, 0.5 against NEW with advantages +1, -1, +1, -1."""
    known = {
        "mask": mask_of([[1, 1, 1, 1]]),
        "old_logprobs": logs([[0.4, 0.4, 0.4, 0.4]]),
        "ref_logprobs": logs([[0.3, 0.6, 0.4, 0.2]]),
        "rollout_logprobs": logs([[0.4, 0.8, 0.25, 0.1]]),
        "advantages": f64([[1.0, -1.0, 1.0, -1.0]]),
    }
    return TokenFields(**known | changes)


NEW = [[0.6, 0.6, 0.2, 0.2]]


def evaluated(given_fields, cfg, logprobs, entropy=None, normalizer=10.0):
    """loss, sums, d loss / d logprobs."""
    logprobs = logprobs.clone().requires_grad_(True)
    loss, sums = policy_objective(logprobs, entropy, given_fields, cfg, normalizer)
    return loss.detach(), sums, torch.autograd.grad(loss, [logprobs])[0]


def test_the_plain_objective_by_hand():
    # losses of the tokens: -1.2 (clipped), 1.5, -0.5, 0.8 (clipped); their sum 0.6 over 10 tokens of the step
    loss, sums, gradient = evaluated(by_hand(), PPOConfig(), logs(NEW))
    close(loss, 0.06)
    close(gradient, [[0.0, 0.15, -0.05, 0.0]])
    assert sorted(sums) == ["loss/policy", "ppo/approx_kl", "ppo/pg_clipfrac", "ppo/ratio_mean", RATIO_ERROR]
    close(sums["loss/policy"], 0.6)
    close(sums["ppo/pg_clipfrac"], 2.0)
    close(sums["ppo/approx_kl"], -2 * math.log(1.5) - 2 * math.log(0.5))
    close(sums["ppo/ratio_mean"], 4.0)
    close(sums[RATIO_ERROR], 0.5)


def test_every_term_by_hand():
    # importance weights old / rollout: 1, 0.5, 1.6, 4 held at 1.8; weighted losses -1.2, 0.75, -0.8, 1.44: sum 0.19
    # KL: d = ref - new in logs = -ln 2, 0, ln 2, 0; k3 = 0.1931471805599453, 0, 0.3068528194400547, 0: sum 0.5
    # entropies 1, 2, 3, 4: sum 10
    # loss = (0.19 + 0.1 * 0.5 - 0.01 * 10) / 10 = 0.014
    # gradient: kept tokens -A ratio w = 0.75 and -0.8; KL 0.1 * (new - ref) = 0.1 ln 2, 0, -0.1 ln 2, 0; all over 10
    entropy = f64([[1.0, 2.0, 3.0, 4.0]])
    loss, sums, gradient = evaluated(by_hand(), EVERYTHING, logs(NEW), entropy)
    close(loss, 0.014)
    close(gradient, [[0.01 * LN2, 0.075, -0.08 - 0.01 * LN2, 0.0]])
    close(sums["loss/policy"], 0.19)
    close(sums["ppo/importance_mean"], 1 + 0.5 + 1.6 + 1.8)
    close(sums["ppo/importance_capped_frac"], 1.0)
    close(sums["loss/kl"], 0.5)
    close(sums["loss/entropy"], 10.0)
    # k2 shows d^2 / 2 = 0.2402265069591007, twice, and has the same gradient
    squared = EVERYTHING.model_copy(update={"kl_loss": "k2"})
    loss, sums, other = evaluated(by_hand(), squared, logs(NEW), entropy)
    close(sums["loss/kl"], 0.4804530139182014)
    close(loss, (0.19 + 0.04804530139182014 - 0.1) / 10)
    close(other, gradient)


def test_the_entropy_has_its_gradient():
    entropy = f64([[1.0, 2.0, 3.0, 4.0]]).requires_grad_(True)
    loss, _ = policy_objective(logs(NEW), entropy, by_hand(mask=mask_of([[1, 1, 0, 1]])), EVERYTHING, 10.0)
    close(torch.autograd.grad(loss, [entropy])[0], [[-0.001, -0.001, 0.0, -0.001]])
    with pytest.raises(ValueError, match="entropy_coef 0.01"):
        policy_objective(logs(NEW), None, by_hand(), EVERYTHING, 10.0)


def test_asymmetric_and_dual_clip_reach_the_objective():
    # tests/test_ppo.py works these out: sums -2.7 with bounds 0.8 and 1.4, and 6.6 with dual clip 3
    pair = by_hand(
        mask=mask_of([[1, 1]]),
        old_logprobs=logs([[0.4, 0.4]]),
        ref_logprobs=f64([[0.0, 0.0]]),
        rollout_logprobs=f64([[0.0, 0.0]]),
        advantages=f64([[1.0, 1.0]]),
    )
    close(evaluated(pair, PPOConfig(cliprange_high=0.4), logs([[0.6, 0.52]]), normalizer=1)[0], -2.7)
    four = by_hand(old_logprobs=logs([[0.1, 0.1, 0.1, 0.2]]), advantages=f64([[-1.0, -2.0, 1.0, -1.0]]))
    close(evaluated(four, PPOConfig(dual_clip=3.0), logs([[0.5, 0.2, 0.5, 0.1]]), normalizer=1)[0], 6.6)


def random_tokens(shape, seed, mask) -> tuple[TokenFields, torch.Tensor, torch.Tensor]:
    old = -random_rows(shape, seed).abs() - 0.1
    near = {name: old + 0.4 * random_rows(shape, seed + k) for k, name in enumerate(("ref", "rollout", "new"), 1)}
    known = TokenFields(
        mask=mask,
        old_logprobs=old,
        ref_logprobs=near["ref"],
        rollout_logprobs=near["rollout"],
        advantages=random_rows(shape, seed + 4),
    )
    return known, near["new"], random_rows(shape, seed + 5).abs()


@few
@given(seeds, st.lists(st.integers(0, 23), max_size=4), st.sampled_from([PPOConfig(), EVERYTHING]))
def test_any_cut_of_the_tokens_adds_up(seed, cuts, cfg):
    mask = random_rows((4, 6), seed + 9) > -0.7
    known, new, entropy = random_tokens((4, 6), seed, mask)
    whole, sums, gradient = evaluated(known, cfg, new, entropy, normalizer=17.0)
    flat = TokenFields(**{name: getattr(known, name).flatten() for name in known.__dataclass_fields__})
    bounds = [0, *sorted(cuts), 24]
    pieces = [
        evaluated(flat[a:b], cfg, new.flatten()[a:b], entropy.flatten()[a:b], normalizer=17.0)
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    close(sum(loss for loss, _, _ in pieces), whole)
    close(torch.cat([piece for _, _, piece in pieces]), gradient.flatten())
    together = add_up(part for _, part, _ in pieces)
    assert together.keys() == sums.keys()
    for name, total in sums.items():
        close(together[name], total)
        assert not total.requires_grad and total.dtype == torch.float64 and total.ndim == 0
    log_ratios = (new - known.old_logprobs)[mask].tolist()
    close(sums[RATIO_ERROR], max(abs(math.exp(x) - 1) for x in log_ratios))


@pytest.mark.parametrize("poison", [1e30, math.nan, math.inf, -math.inf])
def test_poison_at_masked_tokens_changes_nothing(poison):
    known, new, entropy = random_tokens(tuple(POISON_MASK.shape), 3, POISON_MASK)
    want = evaluated(known, EVERYTHING, new, entropy)
    dirty = TokenFields(
        mask=POISON_MASK,
        **{
            name: getattr(known, name).masked_fill(~POISON_MASK, poison)
            for name in known.__dataclass_fields__
            if name != "mask"
        },
    )
    got = evaluated(dirty, EVERYTHING, *(x.masked_fill(~POISON_MASK, poison) for x in (new, entropy)))
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])
    assert all(torch.equal(got[1][name], want[1][name]) for name in want[1])


def test_no_valid_token_is_a_loss_of_0_with_a_gradient_of_0():
    known, new, entropy = random_tokens((2, 3), 1, torch.zeros(2, 3, dtype=torch.bool))
    loss, sums, gradient = evaluated(known, EVERYTHING, new, entropy)
    assert loss == 0 and not gradient.any() and not any(x.any() for x in sums.values())


def test_nothing_waits_for_the_device():
    """On the meta device there are no numbers: `.item()`, `float()` and `if tensor` raise."""
    known, new, entropy = random_tokens((2, 3), 1, torch.ones(2, 3, dtype=torch.bool))
    shapes = TokenFields(**{name: getattr(known, name).to("meta") for name in known.__dataclass_fields__})
    loss, sums = policy_objective(new.to("meta"), entropy.to("meta"), shapes, EVERYTHING, 6.0)
    assert loss.device.type == "meta" and {x.device.type for x in sums.values()} == {"meta"}


def test_sums_are_made_in_float64():
    # losses -2^25 and -1 in float32, which cannot hold their sum
    zeros, advantages = torch.zeros(2), torch.tensor([2.0**25, 1.0])
    known = TokenFields(
        mask=torch.ones(2, dtype=torch.bool),
        old_logprobs=zeros,
        ref_logprobs=zeros,
        rollout_logprobs=zeros,
        advantages=advantages,
    )
    _, sums = policy_objective(zeros, None, known, PPOConfig(), 1.0)
    assert float(sums["loss/policy"]) == -(2**25) - 1


# ---------------------------------------------------------------- KL in the loss, importance weights


def test_the_gradient_of_the_kl_loss_by_hand():
    # a softmax policy over two actions, p = 3/4, 1/4; reference 1/2, 1/2
    #   KL = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.13081203594113694
    #   d KL / d theta_a = p_a (ln(p_a / q_a) - KL): 3/4 (0.4054651081081644 - KL) = 0.20598980412527, and minus that
    theta = logs([0.75, 0.25]).requires_grad_(True)
    logprobs, ref = theta.log_softmax(-1), logs([0.5, 0.5])
    loss = ppo.kl_loss(logprobs, ref, mask_of([1, 1]), "k3")
    close((logprobs.exp() * loss).sum(), 0.13081203594113694)
    (gradient,) = torch.autograd.grad((logprobs.detach().exp() * loss).sum(), [theta])
    close(gradient, [0.20598980412527059, -0.20598980412527059])


@few
@given(seeds, st.sampled_from(["k2", "k3"]))
def test_the_mean_gradient_over_all_actions_is_that_of_the_kl_and_the_one_of_plain_k3_is_not(seed, estimator):
    theta = random_rows((7,), seed).requires_grad_(True)
    ref = random_rows((7,), seed + 1).log_softmax(-1)
    logprobs = theta.log_softmax(-1)
    p = logprobs.detach().exp()

    def gradient(x):
        return torch.autograd.grad(x, [theta], retain_graph=True)[0]

    exact = gradient((logprobs.exp() * (logprobs - ref)).sum())
    close(gradient((p * ppo.kl_loss(logprobs, ref, torch.ones(7).bool(), estimator)).sum()), exact)
    plain = gradient((p * ppo.kl_estimate(logprobs, ref, "k3")).sum())
    assert (plain - exact).abs().max() > 1e-3
    close(plain, gradient((ref.exp() * (ref - logprobs)).sum()))  # it is the gradient of KL(reference || policy)


@pytest.mark.parametrize("unknown", ["k1", "k4", ""])
def test_only_k2_and_k3_are_losses(unknown):
    zeros = torch.zeros(2)
    with pytest.raises(ValueError, match="k2 or k3"):
        ppo.kl_loss(zeros, zeros, zeros.bool(), unknown)


def test_importance_weights_have_no_gradient_and_leave_masked_tokens_out():
    old = logs([[0.4, 0.4, 0.4]]).requires_grad_(True)
    weights = ppo.importance_weights(old, logs([[0.5, 0.1, 0.1]]), mask_of([[1, 1, 0]]), 2.0)
    close(weights, [[0.8, 2.0, 0.0]])
    assert not weights.requires_grad


def test_importance_weights_make_the_mean_under_the_engine_that_under_the_learner():
    # exactly, over all actions: sum_a mu(a) w(a) f(a) = sum_a pi(a) f(a) where no weight is capped
    mu, pi = (random_rows((6,), k).log_softmax(-1) for k in (1, 2))
    f = random_rows((6,), 3)
    weights = ppo.importance_weights(pi, mu, torch.ones(6).bool(), 1e9)
    close((mu.exp() * weights * f).sum(), (pi.exp() * f).sum())
