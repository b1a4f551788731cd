"""A report of `tokenppo eval` as a page for people, or as one JSON object for programs."""

import json
from dataclasses import asdict
from typing import Any

from core.plain_text import one_line
from launch.comparison import Comparison, Report
from launch.paired import FEW, Estimate
from launch.requirement import Requirement

Judged = list[tuple[Requirement, bool, str]]


def to_dict(report: Report, judged: Judged) -> dict[str, Any]:
    """Plain values: the fields of launch/comparison.py, those of `whole` at the top."""
    found = asdict(report)
    whole = found.pop("whole")
    requirements = [{"require": r.text, "met": met, "why": why} for r, met, why in judged]
    return found | whole | {"requirements": requirements}


def to_json(report: Report, judged: Judged) -> str:
    return json.dumps(to_dict(report, judged), allow_nan=False)


def to_text(report: Report, judged: Judged) -> str:
    """Lines of a page."""
    whole = report.whole
    against = "" if report.against is None else f" against {report.against}"
    each = "one sample each" if report.samples == 1 else f"{report.samples} samples each"
    lines = [f"{report.policy}{against}: {whole.prompts} held-out prompts, {each}; means with their 95 % intervals"]
    for side, n in report.samples_dropped.items():
        if n:
            lines.append(f"{n} samples of {getattr(report, side)} have no reward and count nowhere")
    lines += ["", *_table(report, whole)]
    if report.against is not None:
        lines += ["", *_verdict(report, whole)]
    if report.by is not None:
        lines += ["", f"by {report.by}"]
        for part in report.slices:
            few = f"  (few: under {FEW} prompts, its intervals were never tried)" if part.few else ""
            lines.append(f"  {one_line(json.dumps(part.value, ensure_ascii=False, default=str))}{few}")
            lines += [f"    {line}" for line in _slice(report, part.comparison)]
    lines += ["", *_diversity(report)]
    for example in report.examples:
        lines += ["", f"{example.which}: {_decider(report)} {example.difference:+.4g}", f"  {one_line(example.prompt)}"]
        lines += _columns([[report.policy, one_line(example.policy)], [report.against, one_line(example.against)]], 2)
    if judged:
        lines += ["", *(f"{'met' if met else 'NOT MET'}: {r.text}: {why}" for r, met, why in judged)]
    return "\n".join(lines)


def _decider(report: Report) -> str:
    return report.decides.removeprefix("-")


def _table(report: Report, whole: Comparison) -> list[str]:
    head = ["", report.policy] + ([] if report.against is None else [report.against, "difference"])
    rows = [head]
    for name, metric in whole.metrics.items():
        row = [name, str(metric.policy)]
        if report.against is not None:
            row += ["" if metric.against is None else str(metric.against), _signed(metric.difference)]
        rows.append(row)
    return _columns(rows)


def _signed(x: Estimate | None) -> str:
    if x is None:
        return ""
    return f"{x.value:+.4g}" if x.low is None else f"{x.value:+.4g} [{x.low:+.4g}, {x.high:+.4g}]"


def _verdict(report: Report, compared: Comparison) -> list[str]:
    won, lines = compared.win_rate, []
    better = "less" if report.decides.startswith("-") else "more"
    if won is not None:
        lines.append(f"win rate {won.rate} by {_decider(report)} ({better} is better, a tie counts half)")
        lines.append(
            f"  {won.wins} prompts won, {won.ties} tied, {won.losses} lost; sign test p = {won.sign_test_p:.3g}"
        )
    if (equal := compared.length_controlled) is not None:
        note = "; no pair was near equal length, this is far from what was seen" if equal.extrapolated else ""
        lines.append(
            f"length-controlled: {_decider(report)} {_signed(equal.difference)} between answers of equal length"
            f" ({equal.per_token:+.3g} for each token more{note})"
        )
    return lines


def _slice(report: Report, compared: Comparison) -> list[str]:
    metric = compared.metrics.get(_decider(report))
    if metric is None:
        return [f"{compared.prompts} prompts, to none of which {_decider(report)} applies"]
    lines = [f"{compared.prompts} prompts  {_decider(report)} {metric.policy}"]
    if metric.difference is not None:
        lines[0] += f"  difference {_signed(metric.difference)}"
    return lines + _verdict(report, compared)[:1]


def _diversity(report: Report) -> list[str]:
    names = list(report.diversity["policy"])
    head = ["diversity", report.policy] + ([] if report.against is None else [report.against])
    figures = [["" if of[name] is None else f"{of[name]:.3g}" for of in report.diversity.values()] for name in names]
    return _columns([head, *([name, *row] for name, row in zip(names, figures, strict=True))])


def _columns(rows: list[list[str]], indent: int = 0) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [
        " " * indent + "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
