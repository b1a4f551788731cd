"""What ppo_vs_trl.py compares and against which limits: cases, FLOPs, order, goals. No torch, nothing measured.

Legend: P prompt tokens, R response tokens, T = P + R, E epochs, V vocabulary, H hidden size, L layers.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, median


@dataclass(frozen=True, kw_only=True)
class Size:
    """A Llama with as many key as query heads and tied embeddings."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    inner: int

    @property
    def body(self) -> int:
        """Parameters that a token is multiplied with, norms left out: 4 H^2 + 3 H inner in each layer."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.inner)

    @property
    def parameters(self) -> int:
        return self.body + self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden


SIZES = {
    "1.1M": Size(vocabulary=320, hidden=128, layers=4, heads=4, inner=512),
    "14M": Size(vocabulary=320, hidden=384, layers=6, heads=6, inner=1536),
}
TIERS = {
    "a": "same algorithm: separate critic, fp32, equal lengths",
    "b": "lognormal lengths, 4 samples per prompt, 2 components",
    "c": "shared trunk",
    "d": "bf16",
}
# Our samples per second over TRL's, or 70 % of the FLOP limit of our algorithm where that is less.
GOALS = {
    "1.1M": {"a": 1.8, "b": 3.5, "c": 6.0, "d": 6.0},
    "14M": {"a": 1.2, "b": 2.5, "c": 4.0, "d": 8.0},
}
GOAL_SHARE = 0.70
SIGMA = 0.6  # of the logarithm of a response length in tiers b to d
MEAN_OVER_LONGEST = 1 / 1.5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the comparison: what both sides do in an iteration. It travels to the child processes as JSON."""

    size: Size
    prompt: int = 18
    response: int = 64  # the longest
    batch: int = 32
    per_prompt: int = 1  # samples of each prompt
    epochs: int = 4
    minis: int = 4  # optimizer steps in an epoch
    components: int = 1
    lognormal: bool = False
    critic: str = "separate"  # ours; TRL has no other
    bf16: bool = False
    lr: float = 3e-6  # TRL's default
    vf_coef: float = 0.1
    kl_coef: float = 0.05
    cliprange: float = 0.2
    gae_lambda: float = 0.95

    @property
    def lengths(self) -> list[int]:
        """Response tokens of each row, the same multiset in every iteration and on both sides."""
        if not self.lognormal:
            return [self.response] * self.batch
        return lognormal_lengths(self.batch, self.response)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict) -> "Case":
        return cls(**(fields | {"size": Size(**fields["size"])}))


def case_of(tier: str, size: Size) -> Case:
    """Tiers are cumulative."""
    uneven = {"lognormal": True, "per_prompt": 4, "components": 2} if tier in "bcd" else {}
    return Case(size=size, critic="shared" if tier in "cd" else "separate", bf16=tier == "d", **uneven)


def lognormal_lengths(n: int, longest: int) -> list[int]:
    """`n` quantiles of a lognormal distribution cut at `longest`, its median such that the mean is 2/3 of that.

    Quantiles and not draws: no iteration has more to do than another. Shuffled once, so that neighbours differ.
    """
    z = [NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)]

    def cut(middle: float) -> list[int]:
        return [max(1, min(longest, round(middle * math.exp(SIGMA * x)))) for x in z]

    low, high = 1.0, float(longest)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(cut(middle)) < n * longest * MEAN_OVER_LONGEST else (low, middle)
    lengths = cut(high)
    stride = next(s for s in range(max(2, n * 3 // 8), 2 * n + 2) if math.gcd(s, n) == 1)
    return [lengths[i * stride % n] for i in range(n)]


def forward_flops(size: Size, prompt: int, responses: Sequence[int], *, heads: int) -> float:
    """One pass over a prompt and the responses to it, the prompt once.

        2 N_body (P + sum R)  +  2 L H (P^2 + sum (T^2 - P^2))  +  2 V H heads

    N_body counts multiplications of a token with weights; attention is causal, so half of T x T is computed; `heads` is
    the number of positions that the output embedding is applied to.
    """
    tokens = prompt + sum(responses)
    pairs = prompt**2 + sum((prompt + r) ** 2 - prompt**2 for r in responses)
    return 2 * size.body * tokens + 2 * size.layers * size.hidden * pairs + 2 * size.vocabulary * size.hidden * heads


def decode_flops(size: Size, prompt: int, response: int) -> float:
    """Writing the tokens after the first, which comes out of the prompt's pass: token by token with c before it."""
    each = 2 * size.body + 2 * size.vocabulary * size.hidden
    before = sum(range(prompt, prompt + response - 1))
    return (response - 1) * each + 4 * size.layers * size.hidden * before


def our_flops(case: Case) -> dict[str, float]:
    """What our algorithm must compute in one iteration: no padding, each prompt once, the head on response tokens.

    Values of a shared trunk and old log-probs come with the rollout, so no pass is counted for them, though the learner
    makes one; nor are prompts counted twice that mini-batches, drawn by sample, happen to tear apart. What is wasted so
    shows as a smaller share of the limit.
    """
    size, groups = case.size, [case.lengths[i : i + case.per_prompt] for i in range(0, case.batch, case.per_prompt)]
    full = sum(forward_flops(size, case.prompt, g, heads=sum(g)) for g in groups)
    bare = sum(forward_flops(size, case.prompt, g, heads=0) for g in groups)
    separate = case.critic == "separate"
    return {
        "rollout": len(groups) * forward_flops(size, case.prompt, [], heads=1)
        + sum(decode_flops(size, case.prompt, r) for r in case.lengths),
        "annotate": full + (bare if separate else 0),
        "update": 3 * case.epochs * (full + (bare if separate else 0)),
    }


def trl_flops(case: Case) -> dict[str, float]:
    """What TRL's algorithm computes: rows as long as the longest, the prompt in each, the head on every position."""
    size, longest = case.size, max(case.lengths)
    width = case.prompt + longest
    full = case.batch * forward_flops(size, case.prompt, [longest], heads=width)
    bare = case.batch * forward_flops(size, case.prompt, [longest], heads=0)
    return {
        "rollout": case.batch
        * (forward_flops(size, case.prompt, [], heads=1) + decode_flops(size, case.prompt, longest)),
        "annotate": full + bare,
        "update": 3 * case.epochs * (full + bare),
    }


def abba(blocks: int) -> list[str]:
    """`blocks` times TRL, ours, ours, TRL: a machine that slows down steadily slows both alike."""
    return ["trl", "ours", "ours", "trl"] * blocks


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Seconds of the iterations of one side."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        return cls(median=median(seconds), least=min(seconds), most=max(seconds))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.least:.3g}-{self.most:.3g})"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    goal: float  # ratio asked for
    needed: float  # the goal, or less where 70 % of the limit gives less
    ratio: float
    met: bool
    why: str  # empty where it is met

    @property
    def short(self) -> str:
        said = f"{self.goal:g}x" + ("" if self.needed == self.goal else f", 70 % of the limit: {self.needed:.2f}x")
        return f"{'met' if self.met else 'MISSED'} ({said})"


def judge(goal: float, *, ours_s: float, trl_s: float, our_limit_s: float, ours: dict, trl: dict) -> Verdict:
    """Whether TRL's seconds over ours reach the goal, or our share of our own limit reaches 70 %.

    Args:
        ours, trl: phase -> seconds of the medians, from which a missed goal is explained.
    """
    ratio, at_limit = trl_s / ours_s, GOAL_SHARE * trl_s / our_limit_s
    needed = min(goal, at_limit)
    met = ratio >= needed
    why = ""
    if not met:
        late = max(ours, key=ours.get)
        by_phase = ", ".join(f"{name} {trl[name] / ours[name]:.2f}x" for name in ours if ours[name] and trl.get(name))
        why = (
            f"{ours_s:.3g} s where {trl_s / needed:.3g} are needed; {ours[late] / ours_s:.0%} of it is {late};"
            f" by phase {by_phase}; {our_limit_s / ours_s:.0%} of the limit is used"
        )
    return Verdict(goal=goal, needed=needed, ratio=ratio, met=met, why=why)


def slope(at: dict[int, float]) -> float:
    """Bytes for each further entry of the vocabulary, between the smallest and the largest measured."""
    small, large = min(at), max(at)
    return (at[large] - at[small]) / (large - small)
