"""Which of two policies is better, and how sure that is: statistics of numbers that come in pairs, one for each prompt.

Pure: numpy and scipy. Legend: n prompts. The prompt is the unit everywhere: of several samples of one prompt comes one
number, their mean, because they are no independent witnesses. Intervals are of 95 %; their coverage was measured
(docs/evaluation.md). Importing this takes a second, for scipy: only who compares should.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 9999
FEW = 30  # prompts; below it no coverage was measured
TIE = 1e-6  # totals within this, of their size or of 1, are one: sums of the same rewards in another order
SEED = 0  # of the resampling: the same numbers give the same interval
_PSEUDO = 0.25


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over n prompts and its 95 % interval; both ends None where one prompt or none is all there is."""

    value: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.value:.4g} (one prompt: no interval)"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """How often the first policy wins, a tie counting half, and who won in how many prompts.

    A prompt of several samples is won where more of its pairs are won than lost. `sign_test_p`: of the two-sided exact
    sign test on prompts that are no ties; how probable so lopsided a count is if neither policy is better.
    """

    rate: Estimate
    wins: int
    ties: int
    losses: int
    sign_test_p: float


@dataclass(frozen=True, kw_only=True)
class AtEqualLength:
    """`length_adjusted`'s answer. `per_token`: what a longer answer brings. `extrapolated`: one policy is longer in
    every prompt, so that no pair was ever near equal length."""

    difference: Estimate
    per_token: float
    extrapolated: bool


def mean(x: np.ndarray) -> Estimate:
    """Mean of x ([n] float64) with a bootstrap interval. ValueError for n = 0.

    Percentiles of the means of 9,999 resamples of prompts are too narrow by what the deviation of a small sample is too
    small; so they are taken further out, as far as makes them Student's interval where x is normal (the expanded
    percentile interval, Hesterberg 2015, doi 10.1080/00031305.2015.1089789):

        q = Phi(-sqrt(n / (n - 1)) * t_{0.975, n - 1}),   1 - q        instead of 0.025, 0.975
    """
    return _bootstrap((np.asarray(x, dtype=np.float64),), lambda x, axis: x.mean(axis))


def proportion(x: np.ndarray) -> Estimate:
    """Mean of x ([n] in [0, 1]) with an interval that holds for rates near 0 and 1 too, where a bootstrap of equal
    values has no width. ValueError for n = 0.

    Wilson's score interval with as many trials as the variance of x is worth: ties and means of several samples vary
    less than a coin. A quarter of a win and a quarter of a loss are counted besides, so that values which are all
    equal are no certainty. p and v are mean and variance with these, m = n + 1/2 and z = 1.96:

        N = p (1 - p) m / v,      (p + z^2 / 2N  +-  z sqrt(p (1 - p) / N + z^2 / 4N^2)) / (1 + z^2 / N)
    """
    x = np.asarray(x, dtype=np.float64)
    n = len(x)
    if n == 0:
        raise ValueError("a mean of no prompts")
    if n == 1:
        return Estimate(value=float(x[0]), low=None, high=None, n=1)
    m = n + 2 * _PSEUDO
    p = (x.sum() + _PSEUDO) / m
    v = (np.square(x).sum() + _PSEUDO) / m - p * p
    z, trials = stats.norm.ppf((1 + LEVEL) / 2), p * (1 - p) * m / v
    centre = p + z * z / (2 * trials)
    half = z * np.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    low, high = (centre + np.array([-half, half])) / (1 + z * z / trials)
    value = float(x.mean())  # at 0 and 1 rounding, or the quarters, could put it outside
    return Estimate(value=value, low=float(min(low, value)), high=float(max(high, value)), n=n)


def outcomes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 where a wins, 0 where b does, 0.5 for a tie; all [n], more is better."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    ties = np.abs(a - b) <= TIE * np.maximum(1.0, np.maximum(np.abs(a), np.abs(b)))
    return np.where(ties, 0.5, (a > b).astype(np.float64))


def win_rate(wins: np.ndarray) -> WinRate:
    """`wins`: [n], the mean of `outcomes` over the samples of each prompt. ValueError for n = 0."""
    won, lost = int((wins > 0.5).sum()), int((wins < 0.5).sum())
    p = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    return WinRate(
        rate=proportion(wins), wins=won, ties=len(wins) - won - lost, losses=lost, sign_test_p=float(min(p, 1.0))
    )


def length_adjusted(difference: np.ndarray, length_difference: np.ndarray) -> AtEqualLength | None:
    """What the difference would be between answers of one length; None for fewer than FEW prompts, and where lengths
    differ alike in all.

    Args: [n] each, first policy less second, of the metric and of the tokens. The intercept a of the least squares line

        d_i = a + b l_i        a = mean(d) - b mean(l),   b = cov(d, l) / var(l)

    as in length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475), which regresses wins on the difference in
    length and predicts at 0; here the difference itself is regressed, so the line is straight. The interval is that of
    `mean`, prompts resampled; resamples whose lengths differ alike have no line and are left out.
    """
    d, length = (np.asarray(x, dtype=np.float64) for x in (difference, length_difference))
    if len(d) < FEW or np.ptp(length) == 0:
        return None
    return AtEqualLength(
        difference=_bootstrap((d, length), lambda d, length, axis: _line(d, length, axis)[0]),
        per_token=float(_line(d, length, -1)[1]),
        extrapolated=bool(length.min() > 0 or length.max() < 0),
    )


def _line(d: np.ndarray, length: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Intercept and slope along an axis; NaN where there is no line."""
    off = length - length.mean(axis, keepdims=True)
    square = np.square(off).sum(axis)
    slope = np.divide((off * d).sum(axis), square, out=np.full_like(square, np.nan), where=square > 0)
    return d.mean(axis) - slope * length.mean(axis), slope


def _bootstrap(data: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray]) -> Estimate:
    n = len(data[0])
    if n == 0:
        raise ValueError("a mean of no prompts")
    value = float(statistic(*data, axis=-1))
    if n == 1:
        return Estimate(value=value, low=None, high=None, n=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # of resamples without a line, left out below
        drawn = stats.bootstrap(
            data,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, 2**21 // n),  # 16 MB of indices at a time
            method="percentile",
            rng=np.random.default_rng(SEED),
        ).bootstrap_distribution
    tail = stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf((1 + LEVEL) / 2, n - 1))
    low, high = np.quantile(drawn[~np.isnan(drawn)], [tail, 1 - tail])
    return Estimate(value=value, low=float(low), high=float(high), n=n)
