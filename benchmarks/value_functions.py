"""Where the value function lives, as learning curves: `model.value` shared, shared_detached, separate.

    python benchmarks/value_functions.py --json OUT           # cards as shipped and with 14 facts, 3 seeds: 18 runs
    python benchmarks/value_functions.py --tasks cards --seeds 1 --steps 5

Each run is one of `configs/cards.yaml` by the command. The longer task has responses of some 55 tokens; its rewards and
KL penalty are divided by the number of facts, as in dense_vs_terminal.py. Prints a markdown table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from train_command import CARDS, ROOT, circumstances, table, train_unless_done

VALUES = ("shared", "shared_detached", "separate")
FACTS = 14
HEADS = ["task", "model.value", "slot error before", "at the end", "by seed", "mean on the way", "explained variance"]


def settings_of(task: str, scratch: Path) -> dict[str, object]:
    """What a task changes in the shipped configuration; the longer one's cards are made at first use."""
    if task == "cards":
        return {"run.eval_every": 5}
    cards = scratch / f"cards{FACTS}"
    if not cards.exists():
        make = [sys.executable, str(ROOT / "examples" / "cards" / "make.py"), "--no-train", "--facts", str(FACTS)]
        subprocess.run([*make, "--out", str(cards)], check=True, capture_output=True, timeout=600)
    weights = {f"rewards.{name}.weight": 1 / FACTS for name in ("consistency", "quality", "coverage")}
    return weights | {
        "data.path": str(cards / "data" / "train.jsonl"),
        "data.eval_path": str(cards / "data" / "heldout.jsonl"),
        "data.eval_prompts": 200,
        "rollout.batch_size": 128,
        "rollout.max_new_tokens": 120,
        "ppo.mini_batch_size": 32,
        "ppo.kl_coef": 0.02 / FACTS,
        "optim.lr": 6e-4,
        "run.steps": 18,
        "run.eval_every": 3,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["cards", "long"], choices=["cards", "long"])
    parser.add_argument("--values", nargs="+", default=list(VALUES), choices=VALUES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, help="folder for the run folders (default: a temporary one)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    lines, rows, failed = [], [], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        for task in args.tasks:
            settings = settings_of(task, folder) | ({"run.steps": args.steps} if args.steps else {})
            for value in args.values:
                runs = []
                for seed in range(args.seeds):
                    changes = settings | {"model.value": value, "run.seed": seed}
                    run = train_unless_done(folder / f"{task}-{value}-{seed}", CARDS, changes)
                    print(f"{task} {value} {seed}: exit {run.exit_code}", file=sys.stderr, flush=True)
                    runs += [] if run.exit_code else [run]
                    failed += bool(run.exit_code)
                curves = [[row["eval/slot_error"] for row in r.rows if "eval/slot_error" in row] for r in runs]
                explained = [r.rows[-1]["value/explained_variance"] for r in runs]
                before = [r.summary["eval"]["before"]["slot_error"] for r in runs]
                rows.append({"task": task, "value": value, "before": before, "curves": curves, "explained": explained})
                ends = [curve[-1] for curve in curves]
                if runs:
                    numbers = (before, ends, [x for curve in curves for x in curve])
                    first, last, way = (f"{statistics.mean(x):.1%}" for x in numbers)
                    by_seed = ", ".join(f"{x:.1%}" for x in ends)
                    lines.append([task, value, first, last, by_seed, way, f"{statistics.mean(explained):.2f}"])
    print(f"{circumstances()}: held-out slot error, {args.seeds} seeds\n")
    print(table(HEADS, lines))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
