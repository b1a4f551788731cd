"""What a report shows, as plain numbers and words: gathered from run folders by gather.py, drawn by render.py.

The fields go into the page as JSON under the names they have here. Legend: N points of a curve, T tokens shown of a
response. Numbers of tokens are the ledger's float32, written as the shortest decimals that read back to the same bits.
"""

from dataclasses import dataclass, field
from typing import Literal

Level = Literal["good", "look", "bad", "unknown"]
Number = float | str | None  # None: there is none; a text where it is not finite: "NaN", "Infinity", "-Infinity"


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The verdict: `word` is it, `text` says from what to what, `notes` what else must be known beside it."""

    level: Level
    word: str
    text: str
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question about a reward that may be gamed, answered."""

    title: str
    level: Level
    text: str


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Every metric over training. Where a run has more steps than points, a point is the mean over `steps_per_point`
    steps, `steps` has the last of them, and `low` and `high` what they lay between."""

    steps: list[int]  # [N]
    values: dict[str, list[float | None]]  # metric -> [N]
    low: dict[str, list[float | None]] = field(default_factory=dict)  # empty where a point is one step
    high: dict[str, list[float | None]] = field(default_factory=dict)
    steps_per_point: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """One number on held-out prompts."""

    steps: list[int]
    values: list[float | None]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response of the ledger. Every list has T entries; token t of each is the same token."""

    step: int
    ordinal: int
    k: int
    why: list[str]  # it is shown: "best", "worst", "typical" of its step, "same prompt"
    prompt: str
    finish: str
    total: Number  # sums over the whole response
    parts: dict[str, Number]  # component -> what it adds to `total`
    n_tokens: int  # of the whole response; more than T where the page shows its beginning only
    texts: list[str]  # the characters that a token is the first to have
    shares: list[str | None]  # the character that it has together with a token before it
    ids: list[int]
    versions: list[int]
    ours: list[bool]  # written by the policy; else by an environment, and every number is None
    clipped: list[bool | None]
    numbers: dict[str, list[Number]]  # of core/ledger_table.py: NUMBERS, ref_logprobs, rollout_logprobs
    raw: dict[str, list[Number]]  # component -> None where it does not apply
    normalized: dict[str, list[Number]]
    weighted: dict[str, list[Number]]
    credit: dict[str, list[Number]]  # parts of the advantage, by trainer/credit.py; empty where a ledger cannot tell


@dataclass(frozen=True, kw_only=True)
class TokenPay:
    """What all tokens of one text earned in the responses that were looked at."""

    text: str
    count: int
    total: float
    mean: float


@dataclass(frozen=True, kw_only=True)
class Responses:
    """What was read of a ledger. `missing` says what is not there, and how to get it."""

    missing: str | None = None
    steps: list[int] = field(default_factory=list)  # that were read, of `recorded`
    recorded: int = 0
    fraction: float | None = None  # of the prompts
    samples: list[Sample] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # of single responses of `spread_steps`, tokens of the policy
    totals: list[float] = field(default_factory=list)
    point_steps: list[int] = field(default_factory=list)
    correlation: float | None = None  # of the two, over all responses of those steps
    n_responses: int = 0
    spread_steps: list[int] = field(default_factory=list)
    earners: list[TokenPay] = field(default_factory=list)
    payers: list[TokenPay] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Component:
    """A row of the table of components; None where the run has no such number."""

    name: str
    fn: str
    paid: bool
    weight: float | None
    first: float | None  # raw, mean over the first steps
    last: float | None
    adds: float | None  # weighted, the last steps
    share: float | None  # of the variance, the last steps
    length_corr: float | None


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    name: str
    unit: str
    before: float | None
    after: float | None
    best: float | None
    better: Literal["higher", "lower"] | None
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a rule of the diagnosis said."""

    rule: str
    step: int
    text: str
    remedy: str
    holds: bool  # to the last step


@dataclass(frozen=True, kw_only=True)
class Fault:
    name: str
    count: int
    meaning: str


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    name: str
    state: str
    over: bool
    steps: int
    planned: int
    headline: Headline
    tiles: list[tuple[str, str, str]]  # label, number, remark
    evals: list[EvalRow]
    eval_curves: dict[str, Evaluations]
    curves: Curves
    components: list[Component]
    checks: list[Check]
    diagnosis: list[Found]
    phases: dict[str, float]  # seconds
    start_s: float | None
    faults: list[Fault]
    responses: Responses
    changed: list[tuple[str, str, str]]  # key, value, default
    config: str  # as YAML
    environment: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a figure. `curve` is a metric of Curves, or of the evaluations; `against` what it is drawn over."""

    run: int
    label: str
    curve: str
    of: Literal["curves", "evals", "responses"] = "curves"
    against: str | None = None  # None: steps


@dataclass(frozen=True, kw_only=True)
class Figure:
    id: str
    kind: Literal["lines", "stack", "scatter"]
    title: str
    caption: str
    unit: str
    lines: list[Line]
    x_title: str = "step"
    alt: str = ""  # in words, for who does not see it


@dataclass(frozen=True, kw_only=True)
class Difference:
    key: str
    values: list[str]  # of each run


@dataclass(frozen=True, kw_only=True)
class Report:
    runs: list[RunRecord]
    differences: list[Difference]
    key_figures: list[Figure]
    all_figures: dict[str, list[Figure]]  # section of core/metrics.py ->
    run_figures: dict[str, list[list[Figure]]]  # "components", "gaming", "time" -> of each run
    version: str
    made_at: str
