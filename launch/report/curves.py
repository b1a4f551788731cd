"""Rows of metrics.jsonl as curves of bounded length. Pure."""

import math
from typing import Any

import numpy as np

from launch.report.record import Curves, Evaluations

MOST_POINTS = 300
EVAL = "eval/"
_NOT_METRICS = ("step", "timestamp")


def curves_of(rows: list[dict[str, Any]], most: int = MOST_POINTS) -> Curves:
    """Every metric but the evaluations; at most `most` points, each of an equal share of the rows."""
    names = sorted({name for row in rows for name in row if name not in _NOT_METRICS and not name.startswith(EVAL)})
    if not rows:
        return Curves(steps=[], values={})
    n = len(rows)
    edges = np.linspace(0, n, min(n, most) + 1).astype(int)
    steps = [int(rows[end - 1]["step"]) for end in edges[1:]]
    if n <= most:
        return Curves(steps=steps, values={name: [short(row.get(name)) for row in rows] for name in names})
    table = np.array([[_float(row.get(name)) for name in names] for row in rows])  # [n, names]
    starts, there = edges[:-1], np.isfinite(table)
    counts = np.add.reduceat(there, starts, axis=0, dtype=np.float64)
    sums = np.add.reduceat(np.where(there, table, 0.0), starts, axis=0)
    low = np.minimum.reduceat(np.where(there, table, np.inf), starts, axis=0)
    high = np.maximum.reduceat(np.where(there, table, -np.inf), starts, axis=0)
    mean = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)

    def columns(x: np.ndarray) -> dict[str, list[float | None]]:
        return {name: [short(v) for v in x[:, i].tolist()] for i, name in enumerate(names)}

    return Curves(steps=steps, values=columns(mean), low=columns(low), high=columns(high), steps_per_point=n / most)


def evaluations_of(
    rows: list[dict[str, Any]], before: dict[str, float], most: int = MOST_POINTS
) -> dict[str, Evaluations]:
    """Name with `eval/` before it -> values over training, at most `most` of them, the first and the last among them;
    `before` are those of step 0, without the `eval/`."""
    names = sorted({name for row in rows for name in row if name.startswith(EVAL)} | {f"{EVAL}{x}" for x in before})
    out = {}
    for name in names:
        points = [(0, before[name.removeprefix(EVAL)])] if name.removeprefix(EVAL) in before else []
        points = spaced([*points, *((int(row["step"]), row[name]) for row in rows if name in row)], most)
        out[name] = Evaluations(steps=[s for s, _ in points], values=[short(v) for _, v in points])
    return out


def spaced(items: list[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[i] for i in sorted({round(i) for i in np.linspace(0, len(items) - 1, most)})]


def mean_of(rows: list[dict[str, Any]], name: str) -> float | None:
    """Over the rows that have it; None where none has."""
    values = [x for row in rows if math.isfinite(x := _float(row.get(name)))]
    return sum(values) / len(values) if values else None


def short(x: Any) -> float | None:
    """Six significant digits: more than any screen has. None where it is no finite number."""
    x = _float(x)
    return float(f"{x:.6g}") if math.isfinite(x) else None


def correlation(x: list[float], y: list[float]) -> float | None:
    """Pearson's; None of fewer than three pairs, or where one of the two does not vary."""
    pairs = np.array([(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None], dtype=np.float64)
    pairs = pairs[np.isfinite(pairs).all(axis=1)] if len(pairs) else pairs
    if len(pairs) < 3:
        return None
    off = pairs - pairs.mean(axis=0)
    spread = math.sqrt(float((off[:, 0] ** 2).sum() * (off[:, 1] ** 2).sum()))
    return float((off[:, 0] * off[:, 1]).sum()) / spread if spread > 1e-12 else None


def _float(x: Any) -> float:
    return math.nan if x is None else float(x)
