"""What the token ledger costs a run: the loop's wait, and the CPU time of its thread, as shares of an iteration.

    python benchmarks/ledger.py                       # cards, 8 steps for each share of prompts, 2 minutes
    python benchmarks/ledger.py --config configs/cards.yaml --steps 20 --fractions 0 0.1 1

The wait is `record` in the loop, by the clock: copies, and room in the queue. The thread's part is its CPU time, which
a busy machine does not lengthen; where the loop waits for workers it costs nothing, so its share is an upper bound.
Iteration: median of time/total without evaluation. The first step, which warms up, is left out of everything.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_command import circumstances, table

from core.config import load
from core.ledger_table import FOLDER
from launch import cluster


class Timed:
    """The ledger's two halves, measured where they run."""

    def __init__(self) -> None:
        self.waited: list[float] = []
        self.worked: list[float] = []
        from trainer.ledger import Ledger  # after the environment: it imports torch

        self._ledger, self._record, self._write = Ledger, Ledger.record, Ledger._write

    def __enter__(self) -> "Timed":
        def record(ledger: Any, *args: Any) -> None:
            began = time.perf_counter()
            self._record(ledger, *args)
            self.waited.append(time.perf_counter() - began)

        def write(ledger: Any, recorded: Any) -> None:
            began = time.thread_time()
            self._write(ledger, recorded)
            self.worked.append(time.thread_time() - began)

        self._ledger.record, self._ledger._write = record, write
        return self

    def __exit__(self, *_: object) -> None:
        self._ledger.record, self._ledger._write = self._record, self._write


def measure(config: Path, fraction: float, steps: int) -> dict[str, Any]:
    from launch.run import run

    with tempfile.TemporaryDirectory() as folder, Timed() as timed:
        values = {"run.dir": folder, "run.name": "run", "run.steps": steps, "log.ledger": fraction, "log.trackers": []}
        cfg = load(config, values)
        run(cfg, lives_on=True)
        rows = [json.loads(line) for line in (cfg.run.folder / "metrics.jsonl").read_text().splitlines()[1:]]
        iteration = median(row["time/total"] - row.get("time/evaluate", 0.0) for row in rows)
        files = sorted((cfg.run.folder / FOLDER).glob("*.parquet"))
        waited = median(timed.waited[1:])
        worked = median(timed.worked[1:]) if timed.worked[1:] else 0.0
        return {
            "fraction": fraction,
            "steps": len(rows),
            "tokens": median(row["response/length_mean"] for row in rows) * cfg.rollout.batch_size,
            "iteration_s": iteration,
            "record_ms": 1000 * waited,
            "thread_cpu_ms": 1000 * worked,
            "share_of_iteration": (waited + worked) / iteration,
            "kib_per_step": sum(f.stat().st_size for f in files) / 1024 / len(files) if files else 0.0,
            "missed": sum(row.get("faults/ledger_missed", 0) for row in rows[-1:]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[1] / "configs" / "cards.yaml")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cluster.prepare_environment()
    found = [measure(args.config, fraction, args.steps) for fraction in args.fractions]
    heads = [
        "share of prompts",
        "tokens",
        "iteration s",
        "wait ms",
        "thread CPU ms",
        "of an iteration",
        "KiB",
        "missed",
    ]
    cells = [
        [
            f"{x['fraction']:g}",
            f"{x['tokens'] * x['fraction']:.0f}",
            f"{x['iteration_s']:.2f}",
            f"{x['record_ms']:.2f}",
            f"{x['thread_cpu_ms']:.1f}",
            f"{x['share_of_iteration']:.2%}",
            f"{x['kib_per_step']:.0f}",
            f"{x['missed']:g}",
        ]
        for x in found
    ]
    print(f"{circumstances()}\n\n{table(heads, cells)}")
    if args.json:
        args.json.write_text(json.dumps({"circumstances": circumstances(), "rows": found}, indent=1))


if __name__ == "__main__":
    main()
