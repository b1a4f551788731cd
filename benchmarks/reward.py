"""What scoring costs: tokens per second in process, through Ray and over HTTP; and how much of a slow reward is hidden.

    python benchmarks/reward.py                  # all of it, about five minutes
    python benchmarks/reward.py --only overlap   # or speed, codec, overhead
    python benchmarks/reward.py --rounds 3 --tokens 8192

Ways to score are timed in turns, round by round, on the same responses; figures are medians, and ratios are medians of
the ratios within a round, so that a busy machine slows all of them alike.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from train_command import CARDS, circumstances, table, train

LATENCY_S = 1.0
CHUNK, CHUNKS = 32, 32  # of one step of the overlap runs
WARM_UP_STEPS = 2


def in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; every way has had one call before."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def overlap(steps: int) -> str:
    """Iterations with and without a second of latency on the first chunk of each step, while others are written."""
    totals: dict[float, list[float]] = {}
    waits: dict[float, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for turn, delay in enumerate((0.0, LATENCY_S, 0.0, LATENCY_S)):
            settings = {
                "run.steps": steps,
                "run.eval_every": steps,
                "data.eval_path": "null",
                "rollout.workers": 1,
                "rollout.batch_size": CHUNK * CHUNKS,
                "rollout.chunk_size": CHUNK,
                "ppo.mini_batch_size": CHUNK * CHUNKS // 4,
                "ppo.ppo_epochs": 1,
                "log.trackers": "[]",
                "rewards.late.fn": f"{Path(__file__).with_name('late_reward.py')}:FirstChunkLate",
                "rewards.late.weight": 0,
                "rewards.late.options.delay_s": delay,
                "rewards.late.options.chunks": CHUNKS,
            }
            run = train(Path(scratch) / f"turn-{turn}", CARDS, settings)
            if run.exit_code:
                print(run.last_words, file=sys.stderr)
                raise SystemExit(run.exit_code)
            rows = run.rows[WARM_UP_STEPS:]
            totals.setdefault(delay, []).extend(row["time/total"] for row in rows)
            waits.setdefault(delay, []).extend(row["time/reward"] for row in rows)
    median = {delay: statistics.median(values) for delay, values in totals.items()}
    grown = median[LATENCY_S] - median[0.0]
    lines = [
        [f"{delay:g} s", f"{median[delay]:.3f}", f"{statistics.median(waits[delay]):.3f}", str(len(totals[delay]))]
        for delay in sorted(totals)
    ]
    return "\n".join(
        [
            table(["latency", "iteration", "waiting for scores", "steps"], lines),
            "",
            f"{LATENCY_S:g} s of latency while rollouts run lengthens an iteration by {grown:+.3f} s:"
            f" {grown / LATENCY_S:.1%} of it (limit 10 %)",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("overlap",), help="one part")
    parser.add_argument("--steps", type=int, default=8, help=f"of each overlap run; {WARM_UP_STEPS} are left out")
    args = parser.parse_args()
    print(circumstances(), "\n")
    print(overlap(args.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
