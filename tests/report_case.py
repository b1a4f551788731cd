"""A run folder made by hand, whose every number is known, for the tests of the report in Python and in a browser."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from core import config, ledger_table
from launch import run_folder

CARDS = Path(__file__).parents[1] / "configs" / "cards.yaml"
COMPONENTS = ("consistency", "quality", "coverage", "slot_error")
EVIL = "<script>window.pwned=1</script></script><img src=x onerror='window.pwned=2'>&amp;<!--"
# Text of each token. The coffee is three tokens of a byte each, which all have its range; the last has no characters.
PIECES = [
    "Ein",
    " é",
    EVIL,
    "\n",
    "\tnext",
    " a ",
    "☕",
    "☕",
    "☕",
    "\u202eright",
    "\x1b[31m",
    "👩\u200d🚀",
    "TOOL",
    "",
]
SHARED = (6, 7, 8)
THEIRS = 12  # an environment wrote it
N = len(PIECES)


def text_and_offsets() -> tuple[str, list[tuple[int, int]]]:
    text, spans = "", []
    for i, piece in enumerate(PIECES):
        if i in SHARED[1:]:
            spans.append(spans[SHARED[0]])
            continue
        spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, spans


def row(ordinal: int, *, k: int = 0, seed: int = 0, reward: float = 1.0, prompt: str | None = None) -> dict[str, Any]:
    """A row of a ledger with a number of its own in every place, none of them round."""
    rng = np.random.default_rng([seed, ordinal, k])
    text, spans = text_and_offsets()
    ours = [i != THEIRS for i in range(N)]

    def numbers() -> list[float | None]:
        return [float(np.float32(x)) if mine else None for x, mine in zip(rng.normal(size=N), ours, strict=True)]

    paid = [float(np.float32(reward * (i + 1) / 8)) if mine else None for i, mine in enumerate(ours)]
    applies = {name: [name != "coverage"] * N for name in COMPONENTS}
    return {
        **{"ordinal": ordinal, "k": k, "sample_uid": f"{ordinal:032x}", "attempt": 0, "seed": 0, "prompt_ids": [1, 2]},
        **{"columns": "{}", "response_ids": list(range(100, 100 + N)), "rollout_logprobs": [-0.125] * N},
        **{"action_mask": ours, "offset_starts": [a for a, _ in spans], "offset_ends": [b for _, b in spans]},
        **{"policy_version": [3] * N, "finish_reason": "stop", "finished_at": 0.0, "scored_at": 0.0},
        **{"kept_ids": None, "kept_starts": None, "ref_logprobs": [x or 0.0 for x in numbers()]},
        "component_rewards": [(name, [x or 0.0 for x in numbers()]) for name in COMPONENTS],
        "component_mask": list(applies.items()),
        **{"prompt_text": prompt or f"prompt {ordinal} {EVIL}", "response_text": text},
        "tokens": [text[a:b] for a, b in spans],
        **{name: numbers() for name in ledger_table.NUMBERS},
        "token_rewards": paid,
        "clipped": [None if not mine else i % 3 == 0 for i, mine in enumerate(ours)],
        "bootstrap_value": 0.0,
        "normalized": [(name, numbers()) for name in COMPONENTS],
        "weighted": [(name, numbers()) for name in COMPONENTS],
    }


def write_ledger(folder: Path, step: int, rows: list[dict[str, Any]]) -> None:
    said = {"step": step, "rank": 0, "ranks": 1, "fraction": 0.5, "weights": {}, "before": {}}
    metadata = ledger_table.SCHEMA.metadata | {ledger_table.STEP_KEY: json.dumps(said).encode()}
    table = pa.Table.from_pylist(rows, schema=ledger_table.SCHEMA.with_metadata(metadata))
    path = ledger_table.file_of(folder, step, 0)
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(table, path)


def metrics(step: int, **more: float) -> dict[str, Any]:
    row = {"step": step, "timestamp": 1e9 + step, "reward/total": 1.0 + step / 8, "response/length_mean": 20.0}
    row |= {"response/reward_std": 1.0, "response/truncated_frac": 0.0, "objective/kl": step / 4, "time/rollout": 0.5}
    row |= {"time/update": 1.0, "time/total": 1.5, "faults/scores_retried": 0}
    for i, name in enumerate(COMPONENTS):
        row |= {f"reward/{name}/raw": i + step / 8, f"reward/{name}/weighted": 0.0 if i == 3 else 0.25}
        row |= {f"reward/{name}/weight": float(i != 3), f"reward/{name}/variance_share": 0.0 if i == 3 else 1 / 3}
    return row | more


BEFORE = {"reward/total": 0.5, "slot_error": 0.4, "response/length_mean": 20.0, "step": 0}
AFTER = {"reward/total": 4.5, "slot_error": 0.01, "response/length_mean": 21.0}


def make_run(
    folder: Path,
    *,
    steps: int = 6,
    before: dict[str, float] | None = BEFORE,
    after: dict[str, float] | None = AFTER,
    overrides: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    ledger: dict[int, list[dict[str, Any]]] | None = None,
) -> Path:
    """A run of `steps` steps that is over, evaluated at its last step, as a run leaves it behind."""
    keys = {"run.dir": str(folder.parent), "run.name": folder.name, "run.steps": max(1, steps)}
    cfg = config.load(CARDS, keys | (overrides or {}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml(cfg))
    rows = [metrics(step) for step in range(1, steps + 1)]
    if rows and after is not None:
        rows[-1] |= {f"eval/{name}": x for name, x in after.items()}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    evals = {}
    if before is not None:
        evals["before"] = before
    if after is not None and steps:
        evals |= {"after": after | {"step": steps}, "best": after | {"step": steps}}
    whole = {"eval": evals, "seconds": {"start": 2.0, "whole_run": 30.0}, "steps": steps, "exit": 0}
    whole |= {"resumed_from": None, "versions": {"tokenppo": "0.1.0"}, "eval_prompts": 400}
    run_folder.write_summary(folder, whole | (summary or {}))
    for step, its in (ledger or {}).items():
        write_ledger(folder, step, its)
    return folder
