"""Known bugs, put back one at a time: the golden check must fail for each, so a green test_golden.py means something.

Every function under test is written here a second time, plainly, with the known faults as switches, and takes the place
of the real one. Without a fault it must pass, so a failure is due to the fault alone. The comments name who had it.

B samples, T response tokens, V vocabulary.
"""

import functools
import importlib

import pytest
import torch

import golden_cases

FILES_OF = {"compute_gae": ["compute_gae", "compute_gae_bootstrap"]}

FAULTS = {
    "compute_gae": [
        "the value of the state after the token",  # spinningup #50
        "the reward of the next token",  # TRL #3750, miles #1827
        "the reward of the token before",
        "no recursion",
        "lambda without gamma",
        "gamma forgotten at the next value",
        "holes are time steps",  # OpenRLHF and TRL as read
        "values of masked slots are read",  # ROLL #447, verl #50
        "rewards of masked slots are read",
        "returns from whitened advantages",  # rlhf-book #216
        "returns are advantages",
        "masked outputs are carried numbers",  # verl and NeMo RL as read
        "bootstrap ignored",  # TRL #1536
        "bootstrap at the last column",  # AReaL #1637
        "bootstrap is a reward",
        "bootstrap is an advantage too",
        "bootstrap of the first sample for all",
        "lowered to float32",
    ],
    "whiten": [
        "mask ignored",  # trlx
        "population variance",  # OpenRLHF, AReaL
        "deviation in the place of the variance",  # FineGrainedRLHF
        "row by row",
        "no epsilon",
        "epsilon outside the root",
        "centred although center=False",
        "centring does the opposite",  # torchtune's copy of TRL
        "variance as a difference of squares",
        "masked outputs are not zero",
        "lowered to float32",
    ],
    "masked_mean": ["mask ignored", "mean of row means", "epsilon in the denominator", "0 / 0"],
    "policy_loss": [
        "clipped above only",
        "clipped below only",
        "not clipped",
        "symmetric although cliprange_high is given",
        "the smaller of the two losses",
        "advantage sign",
        "ratio upside down",
        "mean of row means",
        "padding in the denominator",
        "normalizer ignored",
        "dual clip ignored",
        "dual clip on positive advantages",
        "dual clip without the advantage",
        "clipfrac of ratios out of range whatever the advantage",
        "clipfrac after dual clip",
        "clipfrac over padding",
        "approx_kl sign",
        "approx_kl over padding",
        "approx_kl is k3",
        "stats over the normalizer",
        "clipped tokens keep their gradient",
        "old log-probs are the new ones",  # verl's on-policy shortcut
        "multiplied by the mask",  # OpenRLHF #1240
        "nothing valid gives nan",
    ],
    "value_loss": [
        "without the half",
        "not clipped",
        "the smaller of the two squares",
        "clipped around the returns",
        "clipped to a constant range",
        "mean of row means",
        "padding in the denominator",
        "normalizer ignored",
        "clipped tokens keep their gradient",
        "old values are the new ones",
        "clipfrac over padding",
    ],
    "kl_estimate": [
        "sign flipped",  # Logic-RL #58
        "k2 without the half",
        "k3 of the other direction",
        "clamped at 10",
        "always k1",
        "absolute value",
    ],
    "shape_rewards": [
        "sign flipped",
        "mask ignored",
        "estimator ignored",
        "kl_coef ignored",
        "penalty on the last token only",
        "penalty replaces the reward",
    ],
    "logprobs_from_logits": [
        "temperature ignored",  # TRL #4159
        "temperature multiplies",
        "temperature plus 1e-7",  # TRL
        "token of the next position",
        "not normalised",
        "base 2",
        "lowered to float32",
        "no gradient through the normaliser",
    ],
    "entropy_from_logits": [
        "temperature ignored",
        "temperature multiplies",
        "base 2",
        "share of log V",
        "sign",
        "lowered to float32",
    ],
}
MODULES = {name: "core.logprobs" if name.endswith("_from_logits") else "trainer.ppo" for name in FAULTS}


def compute_gae(rewards, values, response_mask, *, gamma, gae_lambda, bootstrap_values=None, fault=None):
    batch, width = rewards.shape
    dtype = rewards.dtype
    advantages, returns = torch.zeros(batch, width, dtype=dtype), torch.zeros(batch, width, dtype=dtype)
    for b in range(batch):
        valid = [t for t in range(width) if response_mask[b, t]]
        if not valid:
            continue
        reward, value = rewards[b].tolist(), values[b].tolist()
        if fault == "holes are time steps":
            for t in range(width):
                if t not in valid:
                    reward[t] = value[t] = 0.0
            valid = list(range(valid[-1] + 1))
        if fault == "lowered to float32":
            reward, value = rewards[b].float().tolist(), values[b].float().tolist()
        bootstrap = 0.0
        if bootstrap_values is not None and fault != "bootstrap ignored":
            bootstrap = float(bootstrap_values[0 if fault == "bootstrap of the first sample for all" else b])
        if fault == "bootstrap at the last column" and not response_mask[b, -1]:
            bootstrap = 0.0
        advantage = bootstrap if fault == "bootstrap is an advantage too" else 0.0
        for k in reversed(range(len(valid))):
            t, last = valid[k], k == len(valid) - 1
            after = bootstrap if last else value[valid[k + 1]]
            if fault == "values of masked slots are read" and t + 1 < width:
                after = value[t + 1]
            r, v, discount = reward[t], value[t], gamma
            if fault == "the value of the state after the token":
                v, after = after, bootstrap if k + 2 >= len(valid) else value[valid[k + 2]]
            elif fault == "the reward of the next token":
                r = 0.0 if last else reward[valid[k + 1]]
            elif fault == "the reward of the token before":
                r = reward[valid[k - 1]] if k else 0.0
            elif fault == "rewards of masked slots are read" and last:
                r += sum(reward[t + 1 :])
            elif fault == "gamma forgotten at the next value" or (fault == "bootstrap is a reward" and last):
                discount = 1.0
            carry = gae_lambda if fault == "lambda without gamma" else gamma * gae_lambda
            advantage = r + discount * after - v + (0.0 if fault == "no recursion" else carry * advantage)
            advantages[b, t] = advantage
            returns[b, t] = advantage + (0.0 if fault == "returns are advantages" else value[t])
        if fault == "masked outputs are carried numbers":
            for t in reversed(range(valid[-1])):
                if not response_mask[b, t]:
                    advantages[b, t] = advantages[b, t + 1]
    if fault == "holes are time steps":
        advantages, returns = advantages.where(response_mask, 0), returns.where(response_mask, 0)
    if fault == "returns from whitened advantages":
        returns = torch.where(response_mask, whiten(advantages, response_mask) + values, 0)
    return advantages, returns


def whiten(x, mask, *, center=True, all_reduce=None, fault=None):
    if fault == "row by row":
        return torch.cat([whiten(x[[b]], mask[[b]], center=center) for b in range(len(x))])
    wide = {"lowered to float32": x.float(), "variance as a difference of squares": x}.get(fault, x.double())
    tokens = wide.flatten() if fault == "mask ignored" else wide[mask]
    if not len(tokens):
        return torch.zeros_like(x)
    mean = tokens.sum() / len(tokens)
    variance = ((tokens - mean) ** 2).sum() / max(len(tokens) - (0 if fault == "population variance" else 1), 1)
    if fault == "variance as a difference of squares":
        variance = (tokens.square().mean() - mean.square()) * len(tokens) / max(len(tokens) - 1, 1)
    if fault == "deviation in the place of the variance":
        variance = variance.sqrt()
    if fault == "no epsilon":
        scale = variance.sqrt()
    elif fault == "epsilon outside the root":
        scale = variance.sqrt() + 1e-8
    else:
        scale = (variance + 1e-8).sqrt()
    whitened = (wide - mean) / scale
    if fault == "centring does the opposite":
        center = not center
    if not center and fault != "centred although center=False":
        whitened = whitened + mean
    if fault != "masked outputs are not zero":
        whitened = torch.where(mask, whitened, 0)
    return whitened.to(x.dtype)


def masked_mean(x, mask, *, fault=None):
    if fault == "mask ignored":
        return x.mean()
    if fault == "mean of row means":
        rows = [masked_mean(x[[b]], mask[[b]]) for b in range(len(x)) if mask[b].any()]
        return torch.stack(rows).mean() if rows else x.new_zeros(())
    if fault == "epsilon in the denominator":
        return torch.where(mask, x, 0).sum() / (mask.to(x.dtype).sum() + 1e-8)
    return torch.where(mask, x, 0).sum() / (mask.sum() if fault == "0 / 0" else mask.sum().clamp(min=1))


def token_sum(x, mask, normalizer, fault):
    """The sum of a loss over valid tokens / normalizer, and the ways to get its denominator wrong."""
    if fault == "mean of row means" and mask.any():
        return torch.stack([row[valid].mean() for row, valid in zip(x, mask, strict=True) if valid.any()]).mean()
    total = (x * mask).sum() if fault == "multiplied by the mask" else torch.where(mask, x, 0).sum()
    if fault == "padding in the denominator":
        return total / mask.numel()
    if normalizer is None or fault == "normalizer ignored":
        normalizer = mask.sum() if fault == "nothing valid gives nan" else mask.sum().clamp(min=1)
    return total / normalizer


def straight_through(clipped, unclipped, fault):
    """The clipped tensor; with the fault, its numbers with the gradient of the unclipped one."""
    if fault == "clipped tokens keep their gradient":
        return unclipped + (clipped - unclipped).detach()
    return clipped


def policy_loss(
    logprobs,
    old_logprobs,
    advantages,
    response_mask,
    *,
    cliprange,
    cliprange_high=None,
    dual_clip=None,
    normalizer=None,
    fault=None,
):
    mask = response_mask
    new, old, a = logprobs, old_logprobs, advantages
    if fault != "multiplied by the mask":
        new, old, a = (torch.where(mask, x, 0) for x in (new, old, a))
    if fault == "old log-probs are the new ones":
        old = new.detach()
    if fault == "advantage sign":
        a = -a
    ratio = (old - new if fault == "ratio upside down" else new - old).exp()
    symmetric = cliprange_high is None or fault == "symmetric although cliprange_high is given"
    low, high = 1 - cliprange, 1 + (cliprange if symmetric else cliprange_high)
    if fault in ("clipped above only", "not clipped"):
        low = 0.0
    if fault in ("clipped below only", "not clipped"):
        high = 1e30
    unclipped = -a * ratio
    clipped = straight_through(-a * ratio.clamp(low, high), unclipped, fault)
    loss = torch.minimum(unclipped, clipped) if fault == "the smaller of the two losses" else unclipped.max(clipped)
    if dual_clip is not None and fault != "dual clip ignored":
        bound = torch.full_like(a, dual_clip) if fault == "dual clip without the advantage" else -dual_clip * a
        bites = torch.ones_like(mask) if fault == "dual clip on positive advantages" else a < 0
        loss = torch.where(bites, torch.minimum(loss, bound), loss)

    hit = clipped > unclipped
    if fault == "clipfrac of ratios out of range whatever the advantage":
        hit = (ratio < low) | (ratio > high)
    if fault == "clipfrac after dual clip":
        hit = (loss != unclipped) & mask
    counted = torch.ones_like(mask)
    d = (old - new).detach() * (-1 if fault == "approx_kl sign" else 1)
    if fault == "approx_kl is k3":
        d = (-d).exp() - 1 + d
    stats = {
        "pg_clipfrac": masked_mean(hit.to(a.dtype), counted if fault == "clipfrac over padding" else mask),
        "approx_kl": masked_mean(d, counted if fault == "approx_kl over padding" else mask),
    }
    if fault == "stats over the normalizer" and normalizer is not None:
        stats = {name: number * mask.sum() / normalizer for name, number in stats.items()}
    return token_sum(loss, mask, normalizer, fault), stats


def value_loss(values, old_values, returns, response_mask, *, cliprange_value, normalizer=None, fault=None):
    mask, c = response_mask, cliprange_value
    v, old, ret = (torch.where(mask, x, 0) for x in (values, old_values, returns))
    centre = {
        "clipped around the returns": ret,
        "clipped to a constant range": torch.zeros_like(old),
        "old values are the new ones": v.detach(),
    }.get(fault, old)
    unclipped = (v - ret) ** 2
    clipped = unclipped if fault == "not clipped" else (v.clamp(centre - c, centre + c) - ret) ** 2
    clipped = straight_through(clipped, unclipped, fault)
    square = unclipped.min(clipped) if fault == "the smaller of the two squares" else unclipped.max(clipped)
    counted = torch.ones_like(mask) if fault == "clipfrac over padding" else mask
    loss = token_sum(square, mask, normalizer, fault) * (1.0 if fault == "without the half" else 0.5)
    return loss, {"vf_clipfrac": masked_mean((clipped > unclipped).to(v.dtype), counted)}


def kl_estimate(logprobs, ref_logprobs, estimator, *, fault=None):
    d = ref_logprobs - logprobs
    if fault == "sign flipped" or (fault == "k3 of the other direction" and estimator == "k3"):
        d = -d
    if fault == "always k1":
        estimator = "k1"
    half = 1.0 if fault == "k2 without the half" else 0.5
    kl = {"k1": -d, "k2": half * d**2, "k3": d.exp() - 1 - d}[estimator]
    if fault == "absolute value":
        kl = kl.abs()
    return kl.clamp(-10, 10) if fault == "clamped at 10" else kl


def shape_rewards(token_rewards, old_logprobs, ref_logprobs, response_mask, *, kl_coef, estimator="k1", fault=None):
    mask = response_mask
    penalty = kl_coef * kl_estimate(old_logprobs, ref_logprobs, "k1" if fault == "estimator ignored" else estimator)
    if fault == "sign flipped":
        penalty = -penalty
    if fault == "kl_coef ignored":
        penalty = penalty / kl_coef if kl_coef else penalty
    if fault == "penalty on the last token only":
        last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
        total = torch.where(mask, penalty, 0).sum(1, keepdim=True)
        penalty = torch.where(last, total, 0)
    rewards = -penalty if fault == "penalty replaces the reward" else token_rewards - penalty
    return rewards if fault == "mask ignored" else torch.where(mask, rewards, 0)


def heated(logits, temperature, fault):
    if fault == "temperature ignored":
        return logits
    if fault == "temperature multiplies":
        return logits * temperature
    return logits / (temperature + (1e-7 if fault == "temperature plus 1e-7" else 0.0))


def logprobs_from_logits(logits, ids, temperature=1.0, *, fault=None):
    x = heated(logits.float() if fault == "lowered to float32" else logits, temperature, fault)
    normaliser = x.logsumexp(-1)
    if fault == "not normalised":
        normaliser = normaliser * 0
    if fault == "no gradient through the normaliser":
        normaliser = normaliser.detach()
    if fault == "token of the next position":
        ids = ids.roll(-1, 1)
    logprobs = x.gather(-1, ids[..., None])[..., 0] - normaliser
    return (logprobs / 0.6931471805599453 if fault == "base 2" else logprobs).to(logits.dtype)


def entropy_from_logits(logits, temperature=1.0, *, fault=None):
    x = heated(logits.float() if fault == "lowered to float32" else logits, temperature, fault)
    logprobs = x - x.logsumexp(-1, keepdim=True)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    if fault == "base 2":
        entropy = entropy / 0.6931471805599453
    if fault == "share of log V" and logits.shape[-1] > 1:
        entropy = entropy / torch.tensor(float(logits.shape[-1])).log().double()
    return (-entropy if fault == "sign" else entropy).to(logits.dtype)


def replace(monkeypatch, name, fault):
    module = importlib.import_module(MODULES[name])
    monkeypatch.setattr(module, name, functools.partial(globals()[name], fault=fault))
    return [golden_cases.first_failure(file) for file in FILES_OF.get(name, [name])]


@pytest.mark.parametrize("name", FAULTS)
def test_without_a_fault_the_golden_check_passes(monkeypatch, name):
    assert not any(replace(monkeypatch, name, None))


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name in FAULTS for fault in FAULTS[name]])
def test_the_golden_check_fails(monkeypatch, name, fault):
    assert any(replace(monkeypatch, name, fault)), f"{name} with the fault '{fault}' passes the golden check"
