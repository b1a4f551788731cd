"""Responses of a ledger for a report: which steps are read, which responses are shown, and their numbers as they are.

    recorded steps -> at most MOST_STEPS of them, first and last among them -> totals of all their responses -> those
    that are shown -> every number of these

Nothing is drawn by chance: the same ledger gives the same samples.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core import ledger_table
from core.schema import Config
from launch.heat_map import pieces
from launch.report.curves import correlation, spaced
from launch.report.record import Number, Responses, Sample, TokenPay

MOST_STEPS = 12  # that are read, however many are recorded
MOST_TOKENS = 5000  # that are shown in a report
LONGEST = 1000  # tokens that are shown of one response
MOST_PROMPT = 2000  # characters of a prompt
SPREAD_STEPS = 5  # the last of those read: length against reward of single responses, and what tokens earn
MOST_POINTS = 500  # responses in that picture
MOST_TEXTS = 8  # rows of the tables of tokens
ELSEWHERE = ("ref_logprobs", "rollout_logprobs")  # numbers that core/trajectory_table.py has the columns of
_LIGHT = ["ordinal", "k", "prompt_text", "token_rewards", "action_mask"]


@dataclass(frozen=True)
class Row:
    """A response of one of the steps that are read, by which it is chosen."""

    step: int
    index: int  # in the table of its step
    ordinal: int
    k: int
    prompt: str
    total: float
    n_tokens: int
    length: int  # tokens of the policy


def of_run(folder: Path, cfg: Config, most_tokens: int = MOST_TOKENS) -> Responses:
    """What a report shows of the ledger of a run. Raises UserError for a ledger of another version.

    Args:
        cfg: of the run.
        most_tokens: that may be shown; fewer samples are where they are longer.
    """
    recorded = sorted({ledger_table.step_of(path) for path in ledger_table.files(folder)})
    if not recorded:
        return Responses(missing=_nothing(cfg.log.ledger))
    steps = spaced(recorded, MOST_STEPS)
    rows: list[Row] = []
    for step in steps:
        rows += _light_rows(step, ledger_table.read(folder, step, columns=_LIGHT)[0])
    chosen = choose(rows, most_tokens)
    samples, fraction = [], None
    for step in sorted({row.step for row in chosen}):
        table, said = ledger_table.read(folder, step)
        fraction = said[0]["fraction"]
        of_step = sorted((row for row in chosen if row.step == step), key=lambda row: row.index)
        credit = credit_of(table, said[0], cfg, {row.ordinal for row in of_step})
        for row in of_step:
            found = table.slice(row.index, 1).to_pylist()[0]
            samples.append(sample_of(found, step, chosen[row], credit.get(found["sample_uid"], {})))
    last = steps[-SPREAD_STEPS:]
    spread = [row for row in rows if row.step in last]
    points = spaced(spread, MOST_POINTS)
    earners, payers = token_pay([ledger_table.read(folder, s, columns=["tokens", "token_rewards"])[0] for s in last])
    return Responses(
        steps=steps,
        recorded=len(recorded),
        fraction=fraction,
        samples=samples,
        lengths=[row.length for row in points],
        totals=[float(f"{row.total:.6g}") for row in points],
        point_steps=[row.step for row in points],
        correlation=correlation([row.length for row in spread], [row.total for row in spread]),
        n_responses=len(spread),
        spread_steps=last,
        earners=earners,
        payers=payers,
    )


def _nothing(share: float) -> str:
    if share == 0:
        return (
            "This run recorded no responses (log.ledger is 0). Train with --log.ledger 0.1 to record a tenth of them."
        )
    return (
        f"No step of this run is recorded yet, or its ledger folder is gone. log.ledger is {share:g}: the first step"
        " writes one."
    )


def choose(rows: list[Row], most_tokens: int) -> dict[Row, list[str]]:
    """Row -> why it is shown. What matters most is taken first, as long as there is room for it: the extremes of the
    last step, prompts that come again, the extremes of the first step, of the others, and what lies in the middle."""
    by_step: dict[int, list[Row]] = {}
    for row in rows:
        by_step.setdefault(row.step, []).append(row)
    ranked = {s: sorted(of, key=lambda r: (-r.total, r.ordinal, r.k)) for s, of in by_step.items()}
    steps = sorted(ranked)
    order = [*steps[-1:], *steps[:1], *steps[-2:0:-1]]
    wanted: list[tuple[Row, str]] = []
    again = _come_again(rows)
    for i, step in enumerate(order):
        ranks = ranked[step]
        for n in range(min(3 if i == 0 else 1, (len(ranks) + 1) // 2)):
            wanted += [(ranks[n], "best"), (ranks[-1 - n], "worst")][: 1 + (n < len(ranks) - 1 - n)]
        if i == 0:
            wanted += [(row, "same prompt") for row in again]
    wanted += [(ranked[step][len(ranked[step]) // 2], "typical") for step in order]
    chosen: dict[Row, list[str]] = {}
    for row, why in wanted:
        size = min(row.n_tokens, LONGEST)
        if row in chosen:
            chosen[row] += [why] if why not in chosen[row] else []
        elif size <= most_tokens:
            chosen[row] = [why]
            most_tokens -= size
    return chosen


def _come_again(rows: list[Row], most: int = 2) -> list[Row]:
    """Of the prompts that most of the steps have, one response a step."""
    seen: dict[str, dict[int, Row]] = {}
    for row in sorted(rows, key=lambda r: (r.step, r.ordinal, r.k)):
        seen.setdefault(row.prompt, {}).setdefault(row.step, row)
    several = [of for of in seen.values() if len(of) > 1]
    several.sort(key=lambda of: (-len(of), min(of) - max(of), next(iter(of.values())).ordinal))
    return [row for of in several[:most] for row in of.values()]


def _light_rows(step: int, table: pa.Table) -> list[Row]:
    totals, n = row_sums(table["token_rewards"])
    lengths, _ = row_sums(pc.cast(table["action_mask"], pa.list_(pa.float32())))
    known = {name: table[name].to_pylist() for name in ("ordinal", "k", "prompt_text")}
    return [
        Row(step, i, known["ordinal"][i], known["k"][i], known["prompt_text"][i], totals[i], n[i], round(lengths[i]))
        for i in range(len(table))
    ]


def row_sums(column: pa.ChunkedArray) -> tuple[list[float], list[int]]:
    """Of each list of a column: the sum of its numbers, null being none, and its length."""
    lists = pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)
    values = pc.list_flatten(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.float64)
    sums = np.bincount(pc.list_parent_indices(lists).to_numpy(), weights=values, minlength=len(lists))
    return sums.tolist(), pc.list_value_length(lists).to_pylist()


def credit_of(
    table: pa.Table, said: dict[str, Any], cfg: Config, ordinals: set[int]
) -> dict[str, dict[str, np.ndarray]]:
    """uid -> part of the advantage -> [T], of all samples of these prompts. Nothing of a ledger that does not say what
    whitening did, as those of earlier versions."""
    if "credit" not in said:
        return {}
    from trainer.credit import split  # with torch

    rows = table.filter(pc.is_in(table["ordinal"], value_set=pa.array(sorted(ordinals), pa.int64())))
    return {credit.uid: credit.parts for credit in split(rows, said, cfg)}


def sample_of(row: dict[str, Any], step: int, why: list[str], credit: dict[str, np.ndarray] | None = None) -> Sample:
    """A row of core/ledger_table.py as it is shown: its first LONGEST tokens. `credit`: parts of its advantages."""
    n, ours = len(row["response_ids"]), row["action_mask"]
    top = slice(0, LONGEST)
    spans = list(zip(row["offset_starts"], row["offset_ends"], strict=True))
    cut = pieces(row["response_text"], spans)[top]
    applies = dict(row["component_mask"])
    raw = {
        name: [x if m and a else None for x, m, a in zip(values, ours, applies[name], strict=True)][top]
        for name, values in row["component_rewards"]
    }
    weighted = dict(row["weighted"])
    return Sample(
        step=step,
        ordinal=row["ordinal"],
        k=row["k"],
        why=why,
        prompt=row["prompt_text"][:MOST_PROMPT] + ("…" if len(row["prompt_text"]) > MOST_PROMPT else ""),
        finish=row["finish_reason"],
        total=_sum(row["token_rewards"]),
        parts={name: _sum(values) for name, values in weighted.items()},
        n_tokens=n,
        texts=[text for text, _ in cut],
        shares=[row["tokens"][i][:1] if shared else None for i, (_, shared) in enumerate(cut)],
        ids=row["response_ids"][top],
        versions=row["policy_version"][top],
        ours=ours[top],
        clipped=row["clipped"][top],
        numbers={name: decimals(row[name][top], ours) for name in (*ledger_table.NUMBERS, *ELSEWHERE)},
        raw={name: [_plain(x) for x in values] for name, values in raw.items()},
        normalized={name: decimals(values[top], ours) for name, values in row["normalized"]},
        weighted={name: decimals(values[top], ours) for name, values in weighted.items()},
        credit={name: decimals(values[top].tolist(), ours) for name, values in (credit or {}).items()},
    )


def decimals(values: list[float | None], ours: list[bool]) -> list[Number]:
    """float32 as the shortest decimals that read back to the same; None where an environment wrote the token."""
    return [
        None if x is None or not mine else _plain(float(str(np.float32(x))))
        for x, mine in zip(values, ours, strict=False)
    ]


def _sum(values: list[float | None]) -> Number:
    return _plain(float(f"{sum(x for x in values if x is not None):.6g}"))


def _plain(x: float | None) -> Number:
    if x is None or np.isfinite(x):
        return x
    return "NaN" if np.isnan(x) else "Infinity" if x > 0 else "-Infinity"


def token_pay(tables: list[pa.Table]) -> tuple[list[TokenPay], list[TokenPay]]:
    """The texts that earned most, and those that cost most, over all tokens of the tables."""
    texts = pa.concat_arrays([pc.list_flatten(c) for t in tables for c in t["tokens"].chunks]).dictionary_encode()
    rewards = pa.concat_arrays([pc.list_flatten(c) for t in tables for c in t["token_rewards"].chunks])
    paid = rewards.fill_null(0).to_numpy(zero_copy_only=False).astype(np.float64)
    names, which = texts.dictionary.to_pylist(), texts.indices.to_numpy()
    sums, counts = np.bincount(which, weights=paid), np.bincount(which)
    order = sorted(range(len(names)), key=lambda i: (-sums[i], names[i]))

    def rows(indices: list[int], sign: int) -> list[TokenPay]:
        found = [(names[i], int(counts[i]), float(sums[i])) for i in indices[:MOST_TEXTS] if sign * sums[i] > 0]
        return [TokenPay(text=text, count=n, total=round(paid, 4), mean=paid / n) for text, n, paid in found]

    return rows(order, 1), rows(order[::-1], -1)
