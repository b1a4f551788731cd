"""Does it matter where a reward stands? Each on the token that earned it, against the same sum on the last token.

    python benchmarks/dense_vs_terminal.py                        # all of it, 25 to 40 minutes on 2 cores
    python benchmarks/dense_vs_terminal.py --quick                # one seed, short cards, few updates: a minute
    python benchmarks/dense_vs_terminal.py --seeds 5 --facts 5 14

The cards task at several lengths of the response. Every run gets the same number of responses, the same settings and
the same held-out cards; only the rewards differ, by place and not by sum. As the usual lambda of 0.95 hardly carries a
reward from the last token to one 100 tokens before it, a third arm gives the terminal reward lambda 1, with which each
token is credited with the whole return: two arms differ in nothing but the place, the third shows what that one knob
can mend.

Rewards and KL penalty are divided by the number of facts, so that the best text is worth 1 at every length. Undivided,
the last token of a long response carries dozens of points, the squared error of the value head grows with their square,
and through the trunk that policy and value share it breaks the policy: the benchmark would measure that.

Draws held-out slot errors over responses to --out, and writes the numbers to a JSON file beside it. Runs are kept in
--out-runs; those that ended well are not run again, so that a benchmark that was stopped goes on. Exits 1 if a run
failed, and draws the others all the same.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from train_command import CARDS, ROOT, Finished, circumstances, table, train_unless_done

COMPONENTS = ("consistency", "quality", "coverage")
TERMINAL = {f"rewards.{name}.fn": f"{Path(__file__).with_name('terminal_rewards.py')}:{name}" for name in COMPONENTS}
# Colours of Okabe and Ito, told apart by people with any colour vision; the dashes repeat the difference.
ARMS: dict[str, tuple[dict[str, Any], str, str, str]] = {  # name -> settings, label, colour, line style
    "dense": ({}, "dense: where earned", "#0072b2", "-"),
    "terminal": (TERMINAL, "terminal: sum on the last token", "#d55e00", "--"),
    "terminal-lambda1": (TERMINAL | {"ppo.gae_lambda": 1.0}, "terminal, λ = 1 instead of 0.95", "#009e73", ":"),
}
KL_COEF = 0.02  # for rewards of one point for each fact
EVAL_SLOTS = 2000  # held-out facts asked for at each evaluation, in at least EVAL_CARDS cards
EVAL_CARDS = 100


@dataclass(frozen=True)
class Curve:
    """One run: held-out measures after so many responses, the first before training."""

    facts: int
    arm: str
    seed: int
    exit_code: int
    seconds: float
    responses: list[int]
    slot_error: list[float]
    reward: list[float]
    length: list[float]
    truncated: list[float]


def curve_of(run: Finished, facts: int, arm: str, seed: int, batch: int) -> Curve:
    summary = run.summary
    before = {f"eval/{name}": value for name, value in summary.get("eval", {}).get("before", {}).items()}
    points = [before | {"step": 0}] if before else []
    points += [row for row in run.rows if "eval/slot_error" in row]

    def past(name: str) -> list[float]:
        return [point[f"eval/{name}"] for point in points]

    return Curve(
        facts=facts,
        arm=arm,
        seed=seed,
        exit_code=run.exit_code,
        seconds=summary.get("seconds", {}).get("whole_run", 0.0),
        responses=[point["step"] * batch for point in points],
        slot_error=past("slot_error"),
        reward=past("reward/total"),
        length=past("response/length_mean"),
        truncated=past("response/truncated_frac"),
    )


def cards_of(facts: int, folder: Path) -> Path:
    """Cards of so many facts, made once."""
    data = folder / f"cards{facts}" / "data"
    if not (data / "heldout.jsonl").exists():
        make = [sys.executable, ROOT / "examples" / "cards" / "make.py", "--no-train", "--facts", str(facts)]
        subprocess.run([*make, "--out", str(data.parent)], check=True, stdout=subprocess.DEVNULL)
    return data.absolute()


def settings_of(facts: int, arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    data = cards_of(facts, args.out_runs)
    weights = {f"rewards.{name}.weight": 1 / facts for name in COMPONENTS}
    return {
        "data.path": data / "train.jsonl",
        "data.eval_path": data / "heldout.jsonl",
        "data.eval_prompts": max(EVAL_CARDS, EVAL_SLOTS // facts),
        "rollout.batch_size": args.batch,
        "rollout.max_new_tokens": 8 * facts + 8,  # a clean response has up to 5 tokens for each fact, and the eos
        "ppo.mini_batch_size": min(32, args.batch),
        "ppo.kl_coef": KL_COEF / facts,
        "optim.lr": args.lr,
        "run.steps": args.updates,
        "run.eval_every": args.eval_every,
        "run.seed": seed,
        **weights,
        **ARMS[arm][0],
    }


def run_all(args: argparse.Namespace) -> list[Curve]:
    """All runs, one after the other. Seed by seed, so that a benchmark that is stopped has something of everything."""
    curves = []
    for seed in range(args.seeds):
        for facts in args.facts:
            for arm in args.arms:
                name = f"{facts}facts-{arm}-lr{args.lr:g}-{args.updates}x{args.batch}-seed{seed}"
                started = time.monotonic()
                run = train_unless_done(args.out_runs / name, CARDS, settings_of(facts, arm, seed, args))
                curve = curve_of(run, facts, arm, seed, args.batch)
                curves.append(curve)
                end = f"slot error {curve.slot_error[0]:.1%} -> {curve.slot_error[-1]:.1%}" if curve.slot_error else ""
                print(f"{name}: {end} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
                if run.exit_code:
                    print(f"FAILED, exit {run.exit_code}:\n{run.last_words}", file=sys.stderr, flush=True)
    return curves


def responses_until(curve: Curve, slot_error: float) -> int | None:
    return next((n for n, e in zip(curve.responses, curve.slot_error, strict=True) if e <= slot_error), None)


def summary_table(curves: list[Curve], args: argparse.Namespace) -> str:
    """For each length and arm: slot errors, then what else became of the texts, reward (best 1) and length."""
    heads = ["facts", "arm", "slot error before", "at the end (lowest, highest)", "mean on the way"]
    heads += ["responses to half", "reward before, after", "tokens before, after", "cut", "s/run"]
    lines = []
    for facts in args.facts:
        for arm in args.arms:
            all_runs = [c for c in curves if (c.facts, c.arm) == (facts, arm)]
            runs = [c for c in all_runs if not c.exit_code]
            failed = f"{len(all_runs) - len(runs)} FAILED" if len(runs) < len(all_runs) else ""
            if not runs:
                lines.append([str(facts), arm, "-", failed, *["-"] * (len(heads) - 4)])
                continue
            ends = [c.slot_error[-1] for c in runs]
            halves = [responses_until(c, c.slot_error[0] / 2) for c in runs]
            lines.append(
                [
                    str(facts),
                    arm,
                    f"{mean(c.slot_error[0] for c in runs):.1%}",
                    f"{mean(ends):.1%} ({min(ends):.1%}, {max(ends):.1%}) {failed}".strip(),
                    f"{mean(mean(c.slot_error[1:]) for c in runs):.1%}",
                    ", ".join(str(n or "never") for n in halves),
                    f"{mean(c.reward[0] for c in runs):.2f}, {mean(c.reward[-1] for c in runs):.2f}",
                    f"{mean(c.length[0] for c in runs):.0f}, {mean(c.length[-1] for c in runs):.0f}",
                    f"{mean(c.truncated[-1] for c in runs):.1%}",
                    f"{mean(c.seconds for c in runs):.0f}",
                ]
            )
    return table(heads, lines)


def draw(curves: list[Curve], args: argparse.Namespace) -> None:
    """One panel for each length: the mean of the seeds as a thick line, each seed as a thin one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(
        1, len(args.facts), figsize=(1.2 + 3.6 * len(args.facts), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, facts in zip(panels[0], args.facts, strict=True):
        here = [c for c in curves if c.facts == facts]
        for arm in args.arms:
            _, label, colour, style = ARMS[arm]
            runs = [c for c in here if c.arm == arm and not c.exit_code]
            for curve in runs:
                percent = [100 * e for e in curve.slot_error]
                panel.plot(curve.responses, percent, color=colour, linewidth=0.9, alpha=0.45)
            if runs:
                means = [100 * mean(errors) for errors in zip(*(c.slot_error for c in runs), strict=True)]
                panel.plot(runs[0].responses, means, color=colour, linewidth=2.8, linestyle=style, label=label)
        failed = sum(bool(c.exit_code) for c in here)
        if failed:
            panel.text(0.97, 0.97, f"{failed} runs failed", transform=panel.transAxes, ha="right", va="top")
        tokens = [c.length[0] for c in here if c.length]
        panel.set_title(f"{facts} facts, about {mean(tokens):.0f} tokens" if tokens else f"{facts} facts", fontsize=12)
        panel.set_xlim(0, args.updates * args.batch)
        panel.grid(axis="y", color="#dddddd", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.set_xlabel("responses trained on")
    panels[0][0].set_ylim(bottom=0)  # of all panels; only now, because it ends the scaling to what is drawn
    panels[0][0].set_ylabel("held-out slot error, %\n(lower is better)")
    handles = {
        label: line for panel in panels[0] for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    seeds = "1 seed" if args.seeds == 1 else f"thick: mean of {args.seeds} seeds, thin: each seed"
    figure.legend(
        handles.values(), handles.keys(), title=seeds, loc="outside lower center", ncols=len(args.arms), frameon=False
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 seed, 5 facts, 6 updates, not the third arm")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1 (default 3)")
    parser.add_argument("--facts", type=int, nargs="+", default=[5, 14, 36], help="per card (default 5 14 36)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--updates", type=int, default=18, help="PPO updates of each run (default 18)")
    parser.add_argument("--batch", type=int, default=128, help="responses of each update (default 128)")
    parser.add_argument("--eval-every", type=int, default=3, help="updates between evaluations (default 3)")
    parser.add_argument("--lr", type=float, default=6e-4, help="the same for all arms and lengths (default 6e-4)")
    parser.add_argument("--out", type=Path, help="default docs/img/dense_vs_terminal.png; with --quick in --out-runs")
    parser.add_argument("--out-runs", type=Path, default=Path("runs/dense_vs_terminal"), help="folder of the runs")
    args = parser.parse_args()
    if args.quick:  # other defaults: what is given beside it counts
        arms = [arm for arm in ARMS if arm != "terminal-lambda1"]
        parser.set_defaults(seeds=1, facts=[5], updates=6, eval_every=2, arms=arms)
        args = parser.parse_args()
    if args.out is None:
        picture = "dense_vs_terminal.png"
        args.out = args.out_runs / picture if args.quick else ROOT / "docs" / "img" / picture

    curves = run_all(args)
    base = hashlib.sha256((ROOT / "examples" / "cards" / "base" / "model.safetensors").read_bytes()).hexdigest()
    asked = {name: value for name, value in vars(args).items() if name not in ("out", "out_runs")}
    record = {"where": circumstances(), "asked": asked, "base_sha256": base, "runs": [asdict(c) for c in curves]}
    draw(curves, args)
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{circumstances()}: {args.updates} updates of {args.batch} responses, learning rate {args.lr:g}\n")
    print(summary_table(curves, args))
    print(f"\n{sum(c.seconds for c in curves) / 60:.0f} minutes of runs; drawn to {args.out}, numbers beside it")
    return 1 if any(c.exit_code for c in curves) else 0


if __name__ == "__main__":
    sys.exit(main())
