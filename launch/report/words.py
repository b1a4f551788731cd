"""What a report says in words: the verdict on a run, and whether its reward is being gamed. Pure."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from core.metrics import METRICS, SHARE, lookup
from launch.report.curves import correlation, mean_of
from launch.report.record import Check, Found, Headline, Responses

LAST = 5  # steps that stand for the end of a run, and as many for its beginning
PAID_FOR_LENGTH = 0.8  # of core/diagnosis.py, as the two below
ALONE = 0.95
DRIFT = 0.3
CUT = 0.05  # of core/metrics.py


@dataclass(frozen=True, kw_only=True)
class Known:
    """What the words are about: rows of metrics.jsonl, and of summary.json what they do not have."""

    rows: list[dict[str, Any]]
    evals: dict[str, dict[str, float]]  # before, after, best: as summary.json has them, `step` among them
    n_prompts: int | None  # of an evaluation; None: not recorded
    most_prompts: int  # data.eval_prompts
    paid: list[str]  # components with a weight
    metrics: list[str]  # those without
    comparable: bool  # deviations of the training reward are in the unit of the held-out one: nothing normalises
    found: list[Found] = field(default_factory=list)
    failed: str | None = None  # why the run ended, where it did not end well
    over: bool = True


def figure(name: str, value: float | None) -> str:
    """A number of a metric as a person reads it: a share as per cent, else three digits."""
    if value is None or not math.isfinite(value):
        return "none"
    if unit_of(name) == SHARE:
        return f"{100 * value:.1f} %" if abs(value) < 1 else f"{100 * value:.0f} %"
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def unit_of(name: str) -> str:
    """Of a metric; empty where the table has none of this name, which older versions may have logged."""
    try:
        return lookup(name).unit
    except KeyError:
        return ""


def better(name: str) -> Literal["higher", "lower"] | None:
    """Which way a held-out number improves, where its name says it."""
    leaf = name.removeprefix("eval/")
    if leaf.endswith(("_error", "truncated_frac")):
        return "lower"
    return "higher" if leaf.startswith("reward/") else None


def headline(known: Known) -> Headline:
    """Learned or not, from what to what, on how many prompts; then what else must be known."""
    before, after = known.evals.get("before"), known.evals.get("after")
    notes = _notes(known)
    if not known.rows:
        return Headline(level="unknown", word="Nothing to judge yet", text="No step is done.", notes=notes)
    if before is None or after is None or before.get("reward/total") is None or after.get("reward/total") is None:
        level, word, text = _by_training(known)
        return Headline(level=level, word=word, text=text, notes=notes)
    a, b = before["reward/total"], after["reward/total"]
    noise = _noise(known)
    level, word = _judge(a, b, noise)
    on = f"On {_prompts(known)} the reward went from {figure('reward/total', a)} to {figure('reward/total', b)}"
    text = f"{on} (step {after['step']})" + _of_metrics(known, before, after) + "."
    if noise and word == "No clear change":
        text += f" A change of less than {noise:.2g} is within what chance does on so many prompts."
    top = known.evals.get("best")
    if top and top.get("reward/total") is not None and level != "bad":
        peak = top["reward/total"]
        if peak - a > 0 and peak - b > max(0.25 * (peak - a), noise or 0.0):
            level, word = "look", "Learned, then lost some of it"
            text += f" Best was {figure('reward/total', peak)} at step {top['step']}: its weights are in best/."
    gamed = [m for m in known.metrics if better(m) == "lower" and _worse(before, after, m)]
    if gamed and b > a:
        level, word = "bad", "The reward rose, the task did not"
    elif level == "good" and (any(f.holds for f in known.found) or known.failed):
        level = "look"
    return Headline(level=level, word=word, text=text, notes=notes)


def _judge(a: float, b: float, noise: float | None) -> tuple[Literal["good", "look", "bad"], str]:
    if abs(b - a) <= (noise or 0.0) or a == b:
        return "look", "No clear change"
    return ("good", "Learned") if b > a else ("bad", "Got worse")


def _noise(known: Known) -> float | None:
    """Twice the standard error of a difference of two evaluations, by the deviation between training responses."""
    ends = [mean_of(rows, "response/reward_std") for rows in (known.rows[:LAST], known.rows[-LAST:])]
    if not known.comparable or known.n_prompts is None or None in ends:
        return None
    return 2 * math.sqrt(sum(std**2 for std in ends) / known.n_prompts)


def _prompts(known: Known) -> str:
    if known.n_prompts is None:
        return f"held-out prompts (up to {known.most_prompts:,})"
    return f"{known.n_prompts:,} held-out prompt{'s' * (known.n_prompts != 1)}"


def _of_metrics(known: Known, before: dict[str, float], after: dict[str, float]) -> str:
    parts = [
        f"{m}, which no reward sees, from {figure(f'eval/{m}', before[m])} to {figure(f'eval/{m}', after[m])}"
        for m in known.metrics
        if before.get(m) is not None and after.get(m) is not None
    ]
    return "".join(f"; {part}" for part in parts[:3])


def _worse(before: dict[str, float], after: dict[str, float], name: str) -> bool:
    a, b = before.get(name), after.get(name)
    return a is not None and b is not None and b > a * 1.1 + 0.01


def _by_training(known: Known) -> tuple[Literal["good", "look", "bad", "unknown"], str, str]:
    name, n = "reward/total", min(LAST, len(known.rows) // 2)
    remedy = "There is no evaluation of held-out prompts before and after: data.eval_path or data.eval_frac gives one."
    if not n:
        return "unknown", "Nothing to judge yet", f"One step is done. {remedy}"
    a, b = mean_of(known.rows[:n], name), mean_of(known.rows[-n:], name)
    if a is None or b is None:
        return "unknown", "Nothing to judge yet", remedy
    level, word = _judge(a, b, 0.1 * max(abs(a), abs(b)))
    return (
        "look" if level == "good" else level,
        {"Learned": "Rose in training", "Got worse": "Fell in training"}.get(word, word),
        f"In training the reward went from {figure(name, a)} to {figure(name, b)} (means of the first and the last"
        f" {n} steps). {remedy}",
    )


def _notes(known: Known) -> list[str]:
    notes = [known.failed] if known.failed else []
    if not known.found:
        return [*notes, "No rule of the diagnosis spoke."]
    for which, says in ((True, "holds at the last step" if known.over else "holds now"), (False, "spoke, and passed")):
        if some := [f"{f.rule} (step {f.step})" for f in known.found if f.holds is which]:
            notes.append(f"Diagnosis: {', '.join(some)} {says}.")
    return notes


def checks(known: Known, responses: Responses) -> list[Check]:
    """What tells a reward that is gamed from one that is earned, each with its numbers."""
    rows, out = known.rows, []
    out.append(_length_over_training(rows))
    out.append(_length_within(responses))
    out.append(_one_component(rows, known.paid))
    out.append(_cut(rows))
    out += [_independent(known, m) for m in known.metrics]
    if not known.metrics:
        out.append(
            Check(
                title="An independent measure",
                level="unknown",
                text="None: a component of weight 0 is measured on held-out prompts and never paid. Give one, and this"
                " page says whether the task gets better with the reward.",
            )
        )
    return out


def _length_over_training(rows: list[dict[str, Any]]) -> Check:
    title, name = "Length and reward over training", "response/length_mean"
    a, b = mean_of(rows[:LAST], name), mean_of(rows[-LAST:], name)
    r = correlation([row.get(name) for row in rows], [row.get("reward/total") for row in rows])
    if a is None or b is None or not a or len(rows) < 2 * LAST:
        return Check(title=title, level="unknown", text=f"Too few steps: {2 * LAST} are needed.")
    drift = b / a - 1
    moved = f"Responses went from {a:.1f} to {b:.1f} tokens ({100 * drift:+.0f} %)"
    if r is None:
        return Check(title=title, level="good", text=f"{moved}; one of the two does not vary.")
    together = abs(r) > PAID_FOR_LENGTH and abs(drift) > DRIFT
    text = f"{moved}; over the steps length and reward correlate by {r:+.2f}."
    if together:
        text += " They move together: read responses below, is it length that is paid?"
    return Check(title=title, level="look" if together else "good", text=text)


def _length_within(responses: Responses) -> Check:
    title = "Length and reward within a step"
    if responses.missing:
        return Check(title=title, level="unknown", text="Wants a ledger: train with --log.ledger 0.1.")
    r, steps = responses.correlation, responses.spread_steps
    over = f"{responses.n_responses:,} responses of steps {', '.join(map(str, steps))}"
    if r is None:
        return Check(title=title, level="good", text=f"Over {over} length or reward does not vary.")
    looks = abs(r) > PAID_FOR_LENGTH
    says = "it is mostly length that is paid" if looks else "length explains little of it"
    return Check(
        title=title, level="look" if looks else "good", text=f"Over {over} the correlation is {r:+.2f}: {says}."
    )


def _one_component(rows: list[dict[str, Any]], paid: list[str]) -> Check:
    title = "One component alone"
    shares = {name: mean_of(rows[-LAST:], f"reward/{name}/variance_share") for name in paid}
    known = {name: share for name, share in shares.items() if share is not None}
    if len(paid) < 2:
        return Check(title=title, level="unknown", text="There is one component with a weight.")
    if not known:
        return Check(title=title, level="unknown", text="This run logged no shares of the variance.")
    name = max(known, key=lambda n: known[n])
    looks = known[name] > ALONE
    text = f"{name} has {100 * known[name]:.0f} % of what differs between responses in the last steps"
    text += ": the others hardly teach any more." if looks else "; the others have their part."
    return Check(title=title, level="look" if looks else "good", text=text)


def _cut(rows: list[dict[str, Any]]) -> Check:
    title, share = "Responses that were cut", mean_of(rows[-LAST:], "response/truncated_frac")
    if share is None:
        return Check(title=title, level="unknown", text="Not logged.")
    looks = share > CUT
    text = f"{100 * share:.1f} % in the last steps."
    if looks:
        text += " A policy that never stops may have found that being cut costs nothing."
    return Check(title=title, level="look" if looks else "good", text=text)


def _independent(known: Known, name: str) -> Check:
    title = f"{name}, which no reward sees"
    before, after = known.evals.get("before", {}), known.evals.get("after", {})
    a, b = before.get(name), after.get(name)
    total = (before.get("reward/total"), after.get("reward/total"))
    if a is None or b is None or None in total:
        return Check(title=title, level="unknown", text="No evaluation before and after.")
    went = f"From {figure(f'eval/{name}', a)} to {figure(f'eval/{name}', b)} on held-out prompts"
    rewards = f"while the reward went from {figure('reward/total', total[0])} to {figure('reward/total', total[1])}"
    if better(name) != "lower":
        return Check(
            title=title, level="unknown", text=f"{went}, {rewards}: whether that is better, its name does not say."
        )
    if _worse(before, after, name) and total[1] > total[0]:
        return Check(title=title, level="bad", text=f"{went}, {rewards}: the reward rises and the task does not.")
    return Check(title=title, level="good", text=f"{went}, {rewards}.")


def meaning_of(name: str) -> tuple[str, str, str]:
    """Meaning, unit and healthy range of a metric; empty where the table does not know it."""
    try:
        row = METRICS.get(name) or lookup(name)
    except KeyError:
        return "", "", ""
    return row.meaning, row.unit, row.healthy
