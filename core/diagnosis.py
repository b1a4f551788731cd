"""Diagnosis: what the numbers of a run mean when they go wrong, in words, with the number, its bound and a remedy.

    diagnosis = Diagnosis(Facts.of(cfg))
    for step, row in rows:                          # of metrics.jsonl, or as they come
        for verdict in diagnosis.add(step, row):    # new ones only
            print(verdict.text)

A rule looks at the last rows of a run and at nothing else, so whoever has `metrics.jsonl` comes to the same verdicts:
the run itself, one that goes on from a checkpoint, a report. It speaks once, when what it looks for has held for so
many steps in a row, and again only after it was gone for as many. `docs/diagnosis.md` is this table:

    python -m core.diagnosis > docs/diagnosis.md
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean, median

from core.schema import Config

PAGE = "docs/diagnosis.md"
_KEEP = 64  # rows that rules may look back on


@dataclass(frozen=True)
class Facts:
    """What a rule must know of the configuration: which numbers are to be expected."""

    dtype: str = "float32"
    oldest: float = 0.0  # versions that a token may be behind
    components: int = 1  # that have a weight

    @classmethod
    def of(cls, cfg: Config) -> "Facts":
        rollout, weighted = cfg.rollout, [spec for spec in cfg.rewards.values() if spec.paid]
        oldest = rollout.max_staleness
        if rollout.in_rounds:  # a step has a round at least, and what is ready may wait for the step after
            oldest += math.ceil(rollout.max_new_tokens / rollout.round_tokens) + 1
        return cls(dtype=cfg.model.dtype, oldest=float(oldest), components=len(weighted))

    @property
    def same_logprob(self) -> tuple[float, float]:
        """Mean and largest distance, in nats, of log-probs of one model that two programs compute."""
        return (1e-5, 1e-3) if self.dtype == "float32" else (0.02, 1.0)


@dataclass(frozen=True)
class Finding:
    """What a rule saw in the last row."""

    metric: str
    value: float
    bound: float


@dataclass(frozen=True)
class Verdict:
    """One finding that held for as long as its rule asks."""

    rule: str
    step: int
    metric: str
    value: float
    bound: float
    title: str  # what is wrong, without the number
    remedy: str

    @property
    def text(self) -> str:
        """One line, as it is shown."""
        return (
            f"step {self.step}: {self.title}: {self.metric} is {self.value:.3g} (bound {self.bound:.3g}); {self.remedy}"
            f" ({PAGE}#{self.rule})"
        )


class History:
    """The last rows, the newest last. Values that are missing or no number are not there."""

    def __init__(self) -> None:
        self._rows: deque[dict[str, float]] = deque(maxlen=_KEEP)
        self._first: dict[str, list[float]] = {}
        self.n = 0

    def add(self, row: dict[str, float]) -> None:
        finite = {name: x for name, x in row.items() if math.isfinite(x)}
        self._rows.append(finite)
        self.n += 1
        for name, x in finite.items():
            if len(self._first.setdefault(name, [])) < 5:
                self._first[name].append(x)

    def now(self, name: str) -> float | None:
        """In the last row."""
        return self._rows[-1].get(name)

    def before(self, name: str, n: int) -> list[float]:
        """The last n values before the last row; fewer where there are no more."""
        return [row[name] for row in list(self._rows)[:-1] if name in row][-n:]

    def first(self, name: str) -> list[float]:
        """The first values of the run, five at most."""
        return self._first.get(name, [])

    def components(self) -> list[str]:
        """Names of the rewards in the last row."""
        return [x.split("/")[1] for x in self._rows[-1] if x.startswith("reward/") and x.endswith("/raw")]


Look = Callable[[History, Facts], Iterator[Finding]]


@dataclass(frozen=True)
class Rule:
    name: str
    title: str
    bound: str  # in words, for the page
    steps: int  # in a row
    causes: tuple[str, ...]
    remedy: str
    look: Look


def _above(name: str, bound: float) -> Look:
    def look(h: History, facts: Facts) -> Iterator[Finding]:
        value = h.now(name)
        if value is not None and value > bound:
            yield Finding(name, value, bound)

    return look


def _first_ratio(h: History, facts: Facts) -> Iterator[Finding]:
    bound = 1e-4 if facts.dtype == "float32" else 0.2
    yield from _above("ppo/first_ratio_error", bound)(h, facts)


def _entropy(h: History, facts: Facts) -> Iterator[Finding]:
    """Few choices are left while there is still something to gain: a task that is solved needs none."""
    name, total = "objective/entropy", "reward/total"
    value, first, past = h.now(name), h.first(name), h.before(total, _KEEP)
    if value is None or len(first) < 5 or len(past) < 10 or h.now(total) is None:
        return
    bound = 0.05 * fmean(first)
    best = max(fmean(past[i : i + 5]) for i in range(len(past) - 4))
    last, start = fmean([*past[-4:], h.now(total)]), fmean(h.first(total))
    fallen = best - last > 0.25 * max(best - start, abs(best) * 0.1)
    spread = h.first("response/reward_std")
    never_rose = best - start <= (0.25 * fmean(spread) if spread else 0.1 * abs(start))
    if value < bound and (fallen or never_rose):
        yield Finding(name, value, bound)


def _critic(h: History, facts: Facts) -> Iterator[Finding]:
    value = h.now("value/explained_variance")
    if h.n > 10 and value is not None and value < -0.1:
        yield Finding("value/explained_variance", value, -0.1)


def _shrunk(h: History, facts: Facts) -> Iterator[Finding]:
    name = "response/length_mean"
    value, first = h.now(name), h.first(name)
    if value is not None and value < 1.5 and first and fmean(first) >= 4:
        yield Finding(name, value, 1.5)


def _no_spread(h: History, facts: Facts) -> Iterator[Finding]:
    spread, total = h.now("response/reward_std"), h.now("reward/total")
    if spread is not None and total is not None:
        bound = 1e-6 * max(1.0, abs(total))
        if spread <= bound:
            yield Finding("response/reward_std", spread, bound)
    yield from _above("data/no_signal_frac", 0.9)(h, facts)


def _kl_jump(h: History, facts: Facts) -> Iterator[Finding]:
    value, past = h.now("objective/kl"), h.before("objective/kl", 8)
    if value is None or not past:
        return
    bound = 4 * max(0.0, *past) + (1.0 if len(past) == 8 else 20.0)
    if value > bound:
        yield Finding("objective/kl", value, bound)


def _dominates(h: History, facts: Facts) -> Iterator[Finding]:
    if facts.components < 2:
        return
    for component in h.components():
        yield from _above(f"reward/{component}/variance_share", 0.95)(h, facts)


def _pays_for_length(h: History, facts: Facts) -> Iterator[Finding]:
    """A correlation alone may be the task's own: lengths must have moved to where it pays."""
    first, recent = h.first("response/length_mean"), h.before("response/length_mean", 5)
    if len(first) < 5 or len(recent) < 5 or h.n < 10:
        return
    drift = fmean(recent) / fmean(first) - 1
    for component in h.components():
        name = f"reward/{component}/length_corr"
        corr, share = h.now(name), h.now(f"reward/{component}/variance_share")
        if corr is None or share is None or abs(corr) <= 0.8 or share <= 0.5:
            continue
        if corr * drift > 0 and abs(drift) > 0.3:
            yield Finding(name, corr, math.copysign(0.8, corr))


def _mismatch(h: History, facts: Facts) -> Iterator[Finding]:
    for name, bound in zip(("logprob_diff/mean", "logprob_diff/max"), facts.same_logprob, strict=True):
        yield from _above(name, bound)(h, facts)


def _stale(h: History, facts: Facts) -> Iterator[Finding]:
    yield from _above("staleness/mean", facts.oldest + 1e-9)(h, facts)
    yield from _above("ppo/importance_capped_frac", 0.1)(h, facts)


def _gradient(h: History, facts: Facts) -> Iterator[Finding]:
    value, past = h.now("optim/grad_norm"), h.before("optim/grad_norm", 16)
    if value is not None and len(past) >= 8 and value > (bound := 10 * median(past)) > 0:
        yield Finding("optim/grad_norm", value, bound)


RULES: tuple[Rule, ...] = (
    Rule(
        "first-ratio",
        "old and new log-probs of one policy differ",
        "above 1e-4 in float32, 0.2 in bfloat16",
        1,
        ("dropout or another mode of the model in one of the two passes", "kernels that round differently"),
        "look at run.checks: true, which ends the run there",
        _first_ratio,
    ),
    Rule(
        "clipping",
        "steps are too large: many tokens are clipped",
        "above 0.3",
        3,
        ("the learning rate is too high", "too many passes over a batch", "advantages that are not whitened"),
        "lower optim.lr or ppo.ppo_epochs, or set ppo.stop_kl",
        _above("ppo/pg_clipfrac", 0.3),
    ),
    Rule(
        "entropy-collapse",
        "the policy has few choices left and earns no more for it",
        "below 5 % of its mean over the first 5 steps, while reward/total has fallen or never rose",
        3,
        ("the learning rate is too high", "a reward that one phrase satisfies", "no KL penalty and no entropy bonus"),
        "go back to a checkpoint before it; raise ppo.kl_coef or ppo.entropy_coef, or lower optim.lr",
        _entropy,
    ),
    Rule(
        "critic",
        "the critic is worse than a constant",
        "below -0.1 after step 10",
        5,
        ("returns of a size that moves", "a value head that learns too slowly", "values clipped too narrowly"),
        "set ppo.scale_values: running, raise ppo.vf_coef, or widen ppo.cliprange_value",
        _critic,
    ),
    Rule(
        "length-pinned",
        "most responses are cut at the longest length",
        "above 0.5",
        3,
        ("rollout.max_new_tokens is too small for the task", "length is paid", "the model has never learnt to stop"),
        "raise rollout.max_new_tokens, or fine what is cut",
        _above("response/truncated_frac", 0.5),
    ),
    Rule(
        "length-vanished",
        "responses have shrunk to nothing",
        "below 1.5 tokens, from 4 and more",
        3,
        ("every token costs more than it earns", "an empty answer is never wrong"),
        "fine empty answers, or make a right one worth more than silence",
        _shrunk,
    ),
    Rule(
        "no-spread",
        "all responses earn the same: there is nothing to learn from",
        "reward/total without deviation between responses, or data/no_signal_frac above 0.9",
        3,
        ("prompts that are all too easy or all too hard", "a reward that does not look at the response"),
        "see data.skip_solved and data.difficulty_column; tokenppo check-reward shows what a reward pays",
        _no_spread,
    ),
    Rule(
        "kl-jump",
        "the policy leapt away from the reference within a step",
        "above 4 times the largest of the last 8 steps, and a nat more (20 more in the first 8 steps)",
        1,
        ("a batch with outliers of reward", "the learning rate is too high", "a reward that was found to be gamed"),
        "read responses of this step; lower optim.lr, set ppo.stop_kl, clip that reward",
        _kl_jump,
    ),
    Rule(
        "one-component",
        "one reward alone decides what is learnt",
        "above 0.95, with two weighted components and more",
        5,
        ("components of different sizes", "the others are constant by now, or hardly ever apply"),
        "normalise the components (rewards.<component>.normalize), or change the weights",
        _dominates,
    ),
    Rule(
        "paid-for-length",
        "a reward pays for length, and lengths follow",
        "beyond 0.8 or -0.8 for a component with more than half of the variance, while lengths moved by 30 %",
        5,
        ("a sum over tokens where a mean was meant", "a judge that prefers long answers"),
        "divide by length, add rewards.<component> for brevity, or look whether the task wants it so",
        _pays_for_length,
    ),
    Rule(
        "mismatch",
        "rollout workers and learner do not compute the same",
        "logprob_diff/mean above 1e-5 or /max above 1e-3 in float32; 0.02 and 1 in bfloat16",
        1,
        ("weights that did not arrive", "another precision or kernel in the engine", "another temperature"),
        "set ppo.importance_cap if the engine rounds differently; else nothing that is trained from here on is right",
        _mismatch,
    ),
    Rule(
        "staleness",
        "responses are older than they may be, or too old for their weights",
        "staleness/mean above its bound, or ppo/importance_capped_frac above 0.1",
        3,
        ("a policy that moves far in a step", "responses that wait for many rounds"),
        "lower rollout.max_staleness or optim.lr",
        _stale,
    ),
    Rule(
        "gradient",
        "gradients have grown",
        "above 10 times the median of the last 16 steps",
        3,
        ("the run is about to diverge", "returns have grown"),
        "lower optim.lr or optim.max_grad_norm; go back to a checkpoint if the reward falls too",
        _gradient,
    ),
)


class Diagnosis:
    """The verdicts of one run, row after row."""

    def __init__(self, facts: Facts) -> None:
        self._facts, self._history = facts, History()
        self._held: dict[tuple[str, str], int] = {}  # (rule, metric) -> rows in a row in which it was seen
        self._active: dict[tuple[str, str], tuple[Verdict, int]] = {}  # -> and rows in which it was not seen since
        self.verdicts: list[Verdict] = []

    @property
    def active(self) -> list[Verdict]:
        """Those that hold."""
        return [verdict for verdict, _ in self._active.values()]

    def add(self, step: int, row: dict[str, float]) -> list[Verdict]:
        """The verdicts that this row brings, where the one before it did not have them.

        Args:
            row: names of core/metrics.py; NaN where a mean had nothing to divide by.
        """
        self._history.add(row)
        new = []
        for rule in RULES:
            found = {(rule.name, f.metric): f for f in rule.look(self._history, self._facts)}
            for key in [key for key in self._held if key[0] == rule.name and key not in found]:
                del self._held[key]
            for key in [key for key in self._active if key[0] == rule.name and key not in found]:
                verdict, quiet = self._active[key]
                self._active[key] = (verdict, quiet + 1)
                if quiet + 1 >= rule.steps:
                    del self._active[key]
            for key, f in found.items():
                self._held[key] = self._held.get(key, 0) + 1
                if key in self._active:
                    self._active[key] = (self._active[key][0], 0)
                elif self._held[key] >= rule.steps:
                    verdict = Verdict(rule.name, step, f.metric, f.value, f.bound, rule.title, rule.remedy)
                    self._active[key] = (verdict, 0)
                    new.append(verdict)
        self.verdicts += new
        return new


def markdown() -> str:
    """docs/diagnosis.md, whole."""
    lines = [
        "# Diagnosis",
        "",
        "Generated from `core/diagnosis.py` by `python -m core.diagnosis > docs/diagnosis.md`: change it there.",
        "",
        "After each step these rules look at the numbers of the last ones. What holds for so many steps in a row",
        "is said once, in one line with the number, its bound and what to do: above the panel, in `summary.json`",
        "under `verdicts`, as an alert of W&B and among TensorBoard's texts. It is said again only after it was",
        "gone for as many steps. No rule ends a run; what would make numbers wrong does so by itself",
        "(`run.checks`). [Metrics](metrics.md) says what each number is. Whoever has `metrics.jsonl` comes to the",
        "same verdicts.",
    ]
    for rule in RULES:
        lines += [
            "",
            f"## {rule.name}",
            "",
            f"**{rule.title[0].upper()}{rule.title[1:]}.** When: {rule.bound}; {_in_words(rule.steps)}.",
            "",
            *(f"* {cause}" for cause in rule.causes),
            "",
            f"What to do: {rule.remedy}.",
        ]
    return "\n".join(lines) + "\n"


def _in_words(steps: int) -> str:
    return "at once" if steps == 1 else f"{steps} steps in a row"


if __name__ == "__main__":
    print(markdown(), end="")
