"""The demo as it is shipped, over many seeds: does each run learn to state the facts, and how soon?

    python benchmarks/cards_seeds.py                           # 8 seeds, one after the other: 7 to 12 minutes
    python benchmarks/cards_seeds.py --seeds 3 --out runs/seeds
    python benchmarks/cards_seeds.py --jobs 4                  # where there are 2 cores for each

Prints a markdown table; exits 1 if a run failed or missed a target below. With --out the run folders are kept, and
those that ended well are not run again.
"""

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from train_command import CARDS, Finished, circumstances, table, train_unless_done

EVAL_EVERY = 5  # updates; so fine is "updates until"
SLOT_ERROR_TARGET, ENDED_TARGET, UPDATES_TARGET = 0.05, 0.98, 40
HEADS = ["seed", "before", "after", "best", "ended by eos", "updates until <= 5 %", "seconds", "targets"]


def updates_until(run: Finished, slot_error: float) -> int | None:
    """The first evaluation at or below `slot_error`, as a number of updates."""
    return next((row["step"] for row in run.rows if row.get("eval/slot_error", 1.0) <= slot_error), None)


def line_of(seed: int, run: Finished) -> tuple[list[str], bool]:
    """The run as a line of the table, and whether it met every target."""
    if run.exit_code:
        return [str(seed), *["-"] * (len(HEADS) - 2), f"FAILED, exit {run.exit_code}"], False
    evals = run.summary["eval"]
    errors = [evals[when]["slot_error"] for when in ("before", "after", "best")]
    ended = 1 - evals["after"]["response/truncated_frac"]
    reached = updates_until(run, SLOT_ERROR_TARGET)
    met = (
        errors[1] <= SLOT_ERROR_TARGET
        and ended >= ENDED_TARGET
        and reached is not None
        and run.summary["steps"] <= UPDATES_TARGET
    )
    seconds = run.summary["seconds"]["whole_run"]
    cells = [str(seed), *(f"{error:.1%}" for error in errors), f"{ended:.1%}", str(reached or "never")]
    return [*cells, f"{seconds:.0f}", "met" if met else "MISSED"], met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="seeds 0 to N-1 (default 8)")
    parser.add_argument("--steps", type=int, help="PPO updates of each run (default: those of the configuration)")
    parser.add_argument("--out", type=Path, help="folder for the run folders (default: a temporary one)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = args.out or Path(scratch)
        settings = {"run.eval_every": EVAL_EVERY} | ({"run.steps": args.steps} if args.steps else {})

        def one(seed: int) -> Finished:
            run_folder = folder / f"seed{seed}"
            run = train_unless_done(run_folder, CARDS, settings | {"run.seed": seed})
            print(f"seed {seed} done" if not run.exit_code else run.last_words, file=sys.stderr, flush=True)
            return run

        with ThreadPoolExecutor(args.jobs) as pool:
            try:
                results = [line_of(seed, run) for seed, run in enumerate(pool.map(one, range(args.seeds)))]
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise
    print(f"{circumstances()}: {CARDS.name}, held-out slot error, whole run in seconds\n")
    print(table(HEADS, [line for line, _ in results]))
    met = sum(ok for _, ok in results)
    print(
        f"\n{met} of {len(results)} seeds met the targets: slot error after training at most {SLOT_ERROR_TARGET:.0%},"
        f" {ENDED_TARGET:.0%} ended by eos, at most {UPDATES_TARGET} updates"
    )
    return 0 if met == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
