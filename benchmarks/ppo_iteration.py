"""What one PPO iteration costs: seconds by phase, samples per second, memory of all processes together.

    python benchmarks/ppo_iteration.py                                    # the cards task, about a minute
    python benchmarks/ppo_iteration.py --config my.yaml --steps 30
    python benchmarks/ppo_iteration.py --out runs/iteration               # keep the run folder
    python benchmarks/ppo_iteration.py --against rollout.emit_values=true # the same with another setting, in turns

The run is a real one, by the command. Seconds are the `time/<phase>` of its metrics.jsonl: medians over the steps, the
first two left out. An evaluation is no part of an iteration and is left out too.

Memory is the proportional set size (PSS: shared pages count once, divided among those who share them) of the command
and all its descendants, read twice a second by a thread of this script. Reading walks the page tables of every
process, which costs CPU time that the run would use (the last line says how much); `--no-memory` does without.

`--against` runs both ways `--turns` times, one after the other and the other way round in the next turn, without
reading memory: seconds are medians over all steps of a way, ratios the median of those of each turn.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from train_command import CARDS, Finished, circumstances, table, train

WARM_UP_STEPS = 2
WORK = ("rollout", "annotate", "update")  # what PPO cannot do without; all else is overhead
PHASES = ("rollout", "reward", "annotate", "update", "sync", "log", "other")
OVERHEAD_LIMIT = 0.15
SAMPLE_EVERY_S = 0.5


class PeakMemory:
    """The largest PSS, in bytes, of a process and its descendants, sampled by a thread until `stop`."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.peak_by_name: dict[str, int] = {}
        self.samples = 0
        self.cpu_s = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, pid: int) -> None:
        self._thread = threading.Thread(target=self._sample, args=(pid,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Waits for the thread, which looks at the event after each sample."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _sample(self, pid: int) -> None:
        while not self._ended.wait(SAMPLE_EVERY_S):
            by_name: dict[str, int] = {}
            try:
                root = psutil.Process(pid)
                family = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in family:
                try:
                    name, size = process.name(), process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended just now
                    continue
                by_name[name] = by_name.get(name, 0) + size
            total = sum(by_name.values())
            if total > self.peak_bytes:
                self.peak_bytes, self.peak_by_name = total, by_name
            self.samples += 1
            self.cpu_s = time.thread_time()


def phase_seconds(run: Finished) -> list[dict[str, float]]:
    """Seconds by phase and in total of each step after the first two, evaluations taken out."""
    steps = []
    for row in run.rows[WARM_UP_STEPS:]:
        step = {phase: row.get(f"time/{phase}", 0.0) for phase in PHASES}
        steps.append(step | {"total": row["time/total"] - row.get("time/evaluate", 0.0)})
    return steps


def report(run: Finished) -> str:
    """The table of phases, the overhead and the speed."""
    steps = phase_seconds(run)
    median = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    overhead = statistics.median(1 - sum(step[phase] for phase in WORK) / step["total"] for step in steps)
    shares = {
        phase: statistics.median(step[phase] / step["total"] for step in steps) if phase != "total" else 1.0
        for phase in median
    }
    lines = [[phase, f"{median[phase]:.3f}", f"{shares[phase]:.1%}"] for phase in [*PHASES, "total"]]
    rows = run.rows[WARM_UP_STEPS:]
    samples = [row["perf/samples_per_s"] * row["time/total"] for row in rows]
    rate = statistics.median(n / step["total"] for n, step in zip(samples, steps, strict=True))
    tokens = statistics.median(row["response/length_mean"] for row in rows)
    verdict = "within" if overhead <= OVERHEAD_LIMIT else "ABOVE"
    return "\n".join(
        [
            table(["phase", "seconds", "share"], lines),
            "",
            f"{len(steps)} steps, {statistics.median(samples):.0f} responses of {tokens:.0f} tokens each",
            f"{rate:.0f} samples/s",
            f"overhead (all but {', '.join(WORK)}): {overhead:.1%}, {verdict} the limit of {OVERHEAD_LIMIT:.0%}",
        ]
    )


def compared(of_turns: list[tuple[list[dict[str, float]], list[dict[str, float]]]]) -> str:
    """The table of phases of two ways: for each turn the steps of both, as `phase_seconds` has them."""

    def middle(steps: list[dict[str, float]], phase: str) -> float:
        return statistics.median(step[phase] for step in steps)

    lines = []
    for phase in [*PHASES, "total"]:
        one, other = (middle([step for turn in of_turns for step in turn[way]], phase) for way in (0, 1))
        ratios = [middle(b, phase) / middle(a, phase) for a, b in of_turns if middle(a, phase) > 0]
        lines.append([phase, f"{one:.3f}", f"{other:.3f}", f"{statistics.median(ratios):.2f}" if ratios else ""])
    return table(["phase", "seconds", "with it", "ratio"], lines)


def in_turns(
    config: Path, settings: dict[str, Any], against: dict[str, str], n: int
) -> list[tuple[list[dict[str, float]], list[dict[str, float]]]]:
    """What `compared` takes. Raises SystemExit where a run fails."""
    turns = []
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(n):
            steps: dict[int, list[dict[str, float]]] = {}
            for way in (0, 1) if turn % 2 == 0 else (1, 0):
                done = train(Path(scratch) / f"turn-{turn}-{way}", config, settings | (against if way else {}))
                if done.exit_code:
                    raise SystemExit(f"a run failed:\n{done.last_words}")
                steps[way] = phase_seconds(done)
                print(f"turn {turn + 1} of {n}, {'with it' if way else 'without'}: done", file=sys.stderr, flush=True)
            turns.append((steps[0], steps[1]))
    return turns


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CARDS, help="default: configs/cards.yaml")
    parser.add_argument("--steps", type=int, default=12, help="PPO updates (default 12)")
    parser.add_argument("--out", type=Path, help="run folder to keep, which must be new")
    parser.add_argument("--no-memory", action="store_true", help="do not read the memory of the processes")
    parser.add_argument("--against", action="append", metavar="KEY=VALUE", help="another way, in turns; repeatable")
    parser.add_argument("--turns", type=int, default=3, help="of --against (default 3)")
    args = parser.parse_args()
    if args.steps <= WARM_UP_STEPS:
        parser.error(f"--steps must be more than {WARM_UP_STEPS}, the steps that are left out; got {args.steps}")
    if args.against:
        against = dict(pair.split("=", 1) for pair in args.against)
        turns = in_turns(args.config, {"run.steps": args.steps, "run.eval_every": args.steps}, against, args.turns)
        print(f"{circumstances()}: {args.config.name}, {args.steps} steps, {args.turns} turns, with {against}\n")
        print(compared(turns))
        return 0
    memory = PeakMemory()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.out or Path(scratch) / "iteration"
        settings = {"run.steps": args.steps, "run.eval_every": args.steps}
        run = train(folder, args.config, settings, None if args.no_memory else memory.watch)
        memory.stop()
        if run.exit_code:
            print(run.last_words, file=sys.stderr)
            return run.exit_code
        print(f"{circumstances()}: {args.config.name}, {args.steps} steps\n")
        print(report(run))
    if not args.no_memory:
        largest = sorted(memory.peak_by_name.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in largest[:6])
        print(f"peak PSS of all processes together: {memory.peak_bytes / 2**20:.0f} MiB ({shown})")
        print(f"read {memory.samples} times, which cost {memory.cpu_s:.1f} s of CPU time beside the run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
