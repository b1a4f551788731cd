"""Where the value function lives, as learning curves: `model.value` shared, shared_detached, separate.

    python benchmarks/value_functions.py --json OUT           # cards as shipped and with 14 facts, 3 seeds: 18 runs
    python benchmarks/value_functions.py --json OUT --png OUT --out FOLDER   # goes on where it was stopped
    python benchmarks/value_functions.py --tasks cards --seeds 1 --steps 5

Each run is one of `configs/cards.yaml` by the command. The longer task has responses of some 55 tokens; its rewards and
KL penalty are divided by the number of facts, as in dense_vs_terminal.py. Prints a markdown table; `--png` draws the
curves, over updates and over seconds of training.
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
HEADS += ["s an iteration"]
COLOURS = {"shared": "#0072b2", "shared_detached": "#999999", "separate": "#d55e00"}  # told apart by everybody
TITLES = {"cards": "cards, 21 tokens", "long": f"{FACTS} facts, 55 tokens"}


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


def draw(rows: list[dict], to: Path) -> None:
    """For each task errors over updates and over seconds: thick the mean of the seeds, thin each of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, panels = plt.subplots(len(tasks), 2, figsize=(10, 3.9 * len(tasks)), squeeze=False, layout="constrained")
    for line, task in zip(panels, tasks, strict=True):
        for row in (r for r in rows if r["task"] == task and r["curves"]):
            seconds = statistics.median(row["seconds"])
            for panel, unit in ((line[0], 1.0), (line[1], seconds)):
                x = [0.0, *(step * unit for step in row["steps"])]
                curves = [[100 * b, *(100 * e for e in c)] for b, c in zip(row["before"], row["curves"], strict=True)]
                for curve in curves:
                    panel.plot(x, curve, color=COLOURS[row["value"]], linewidth=0.9, alpha=0.45)
                means = [statistics.mean(errors) for errors in zip(*curves, strict=True)]
                panel.plot(x, means, color=COLOURS[row["value"]], linewidth=2.6, label=row["value"])
        for panel, words in zip(line, ("updates", "seconds of training, at the median iteration"), strict=True):
            panel.set_yscale("log")
            panel.set_title(TITLES[task], fontsize=12)
            panel.set_xlabel(words)
            panel.set_xlim(left=0)
            panel.grid(axis="y", color="#dddddd", linewidth=0.8)
            low, high = panel.get_ylim()
            panel.set_yticks([t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low < t < high], minor=False)
            panel.yaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()
        line[0].set_ylabel("held-out slot error, %\n(log, lower is better)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["cards", "long"], choices=["cards", "long"])
    parser.add_argument("--values", nargs="+", default=list(VALUES), choices=VALUES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, help="folder for the run folders (default: a temporary one)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
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
                steps = [row["step"] for row in runs[0].rows if "eval/slot_error" in row] if runs else []
                seconds = [statistics.median(row["time/total"] for row in r.rows[2:] or r.rows) for r in runs]
                rows.append({"task": task, "value": value, "before": before, "curves": curves, "explained": explained})
                rows[-1] |= {"steps": steps, "seconds": seconds}
                ends = [curve[-1] for curve in curves]
                if runs:
                    numbers = (before, ends, [x for curve in curves for x in curve])
                    first, last, way = (f"{statistics.mean(x):.1%}" for x in numbers)
                    by_seed = ", ".join(f"{x:.1%}" for x in ends)
                    lines.append([task, value, first, last, by_seed, way, f"{statistics.mean(explained):.2f}"])
                    lines[-1] += [f"{statistics.median(seconds):.2f}"]
    print(f"{circumstances()}: held-out slot error, {args.seeds} seeds\n")
    print(table(HEADS, lines))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.png:
        draw(rows, args.png)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
