"""Batches that are written ahead (`rollout.max_staleness`): what they cost in learning, and what they save in time; and
what is saved where a chunk is handed on in parts (`rollout.stream_size`).

    python benchmarks/staleness.py --json docs/img/staleness.json             # all, about 25 minutes on two cores
    python benchmarks/staleness.py --json out.json --only curves --seeds 3 --set ppo.stop_kl=0.03
    python benchmarks/staleness.py --json out.json --only curves \\
        --set-stale ppo.stop_kl=0.03 --set-stale rollout.batch_size=128
    python benchmarks/staleness.py --json out.json --only curves --seeds 6   # and what chance alone does
    python benchmarks/staleness.py --json out.json --only overlap
    python benchmarks/staleness.py --json out.json --only parts

Curves: cards over as many samples with 0 and 1, held-out reward at each evaluation; is the mean of the stale runs
within the spread of the others? With at least six seeds also: how often is that so of three stale and three on-policy
seeds, whichever they are, and how often of three and three on-policy ones? Overlap: a random model whose responses have
geometric lengths (each token may be the last), with a reward that takes a known time; is a step as long as the longer
of writing and of scoring and learning? Parts: the same model and reward, on-policy, the batch written as one chunk, in
four, and as one chunk in parts.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from statistics import mean, median
from typing import Any

from train_command import CARDS, ROOT, Finished, circumstances, table, train, train_unless_done

EVAL_EVERY, WARM_UP, BATCH = 2, 2, 256
SEEDS = 3  # whose spread is the measure
LIMIT = 1.10  # of the longer of the two
REWARD = """import time


class Late:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, completions, **_):
        time.sleep(self.seconds * len(completions))
        return [-abs(len(text) - 60) / 60 for text in completions]
"""


def curve(run: Finished, batch: int) -> dict[int, float]:
    """Held-out reward by responses learned from."""
    return {row["step"] * batch: row["eval/reward/total"] for row in run.rows if "eval/reward/total" in row}


def curves(
    folder: Path, seeds: int, steps: int, more: dict[str, str], of_stale: dict[str, str]
) -> list[dict[str, Any]]:
    """`steps`: of 256 responses; runs with other batches have as many responses, and are evaluated at the same."""
    rows = []
    for seed in range(seeds):
        for staleness in (0, 1) if seed % 2 == 0 else (1, 0):
            own = more | (of_stale if staleness else {})
            batch = int(own.get("rollout.batch_size", BATCH))
            if BATCH % batch:
                raise SystemExit(f"rollout.batch_size = {batch}: a divisor of {BATCH}, so that evaluations meet")
            settings = {"run.seed": seed, "run.steps": steps * BATCH // batch, "run.save_every": 1000}
            settings |= {"run.eval_every": EVAL_EVERY * BATCH // batch, "data.eval_prompts": 256}
            settings |= {"rollout.max_staleness": staleness} | own
            run = train_unless_done(folder / f"cards-{staleness}-{seed}", CARDS, settings)
            if run.exit_code:
                raise SystemExit(f"a run failed:\n{run.last_words}")
            rows.append({"max_staleness": staleness, "seed": seed, "curve": curve(run, batch)})
            print(f"cards, max_staleness {staleness}, seed {seed}: done", file=sys.stderr, flush=True)
    return rows


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each evaluation: the spread over seeds on-policy, the stale mean, and whether it lies within."""
    judged = []
    for responses in sorted(rows[0]["curve"]):
        fresh, stale = ([r["curve"][responses] for r in rows if r["max_staleness"] == k] for k in (0, 1))
        at = {"responses": responses, "low": min(fresh), "high": max(fresh), "fresh": mean(fresh), "stale": mean(stale)}
        at |= {"stale_low": min(stale), "within": min(fresh) <= mean(stale)}  # better is no loss
        if len(fresh) >= 2 * SEEDS:
            spreads = [set(chosen) for chosen in combinations(range(len(fresh)), SEEDS)]
            others = [set(chosen) for chosen in combinations(range(len(stale)), SEEDS)]
            at["within_of_3"] = mean(_within(fresh, a, stale, b) for a in spreads for b in others)
            at["by_chance"] = mean(_within(fresh, a, fresh, b) for a in spreads for b in spreads if not a & b)
        judged.append(at)
    return judged


def _within(of_spread: list[float], spread: Iterable[int], of_mean: list[float], others: Iterable[int]) -> bool:
    return min(of_spread[i] for i in spread) <= mean(of_mean[i] for i in others)


def lengths_task(folder: Path, latency_s: float) -> dict[str, Any]:
    """Settings of a run whose responses have geometric lengths, and whose rewards take `latency_s` in all."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # benchmarks/rollout.py is no package
    import tiny_models

    (folder / "late.py").write_text(REWARD)
    model = tiny_models.save_model(folder / "model", "llama-tied")
    generation = json.loads((model / "generation_config.json").read_text())
    generation["eos_token_id"] = list(range(0, 320, 64))  # five of 320 ids: 64 tokens in the mean
    (model / "generation_config.json").write_text(json.dumps(generation))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"the cat {i}"}) + "\n" for i in range(512)))
    return {
        "model.path": model,
        "model.dtype": "float32",
        "data.path": folder / "prompts.jsonl",
        "rewards.late.fn": f"{folder / 'late.py'}:Late",
        "rewards.late.options": json.dumps({"seconds": latency_s / BATCH}),
        "rollout.batch_size": BATCH,
        "rollout.max_new_tokens": 192,
        "rollout.workers": 1,
        "ppo.micro_batch_size": 64,
        "run.save_every": 1000,
    }


def timed_rows(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the steps that are neither warm-up nor the last, which has nothing written beside it."""
    config = folder.parent / "empty.yaml"
    config.write_text("{}\n")
    run = train(folder, config, settings)
    if run.exit_code:
        raise SystemExit(f"a run failed:\n{run.last_words}")
    return run.rows[WARM_UP : len(run.rows) - 1]


def overlap(folder: Path, latency_s: float, steps: int) -> list[dict[str, Any]]:
    """Seconds of a step, of writing, and of scoring and learning, with 0 and 1."""
    task, rows = lengths_task(folder, latency_s) | {"run.steps": steps, "rollout.chunk_size": 64}, []
    for staleness in (0, 1):
        timed = timed_rows(folder / f"overlap-{staleness}", task | {"rollout.max_staleness": staleness})
        writing = [r["response/length_mean"] * BATCH / r["perf/rollout_tokens_per_s"] for r in timed]
        learning = [sum(r.get(f"time/{phase}", 0.0) for phase in ("annotate", "update", "sync")) for r in timed]
        row = {"max_staleness": staleness, "step_s": median(r["time/total"] for r in timed)}
        row |= {"writing_s": median(writing), "scoring_s": latency_s, "learning_s": median(learning)}
        rows.append(row | {"longer_s": max(row["writing_s"], latency_s + row["learning_s"])})
    return rows


def parts(folder: Path, latency_s: float, steps: int) -> list[dict[str, Any]]:
    """Seconds of a step and until all is scored, by how the batch is cut."""
    task, rows = lengths_task(folder, latency_s) | {"run.steps": steps}, []
    for chunk, stream in ((BATCH, None), (BATCH // 4, None), (BATCH, 32)):
        cut = {"rollout.chunk_size": chunk, "rollout.slots": chunk}
        cut |= {} if stream is None else {"rollout.stream_size": stream}
        timed = timed_rows(folder / f"parts-{chunk}-{stream}", task | cut)
        row = {"chunk_size": chunk, "stream_size": stream, "step_s": median(r["time/total"] for r in timed)}
        row["scored_early"] = median(r["perf/scored_early_frac"] for r in timed)
        row["rollout_tokens_per_s"] = median(r["perf/rollout_tokens_per_s"] for r in timed)
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where all numbers go")
    parser.add_argument("--only", choices=("curves", "overlap", "parts"), help="one part")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=24, help="of 256 responses on cards (default 24)")
    parser.add_argument("--overlap-steps", type=int, default=10)
    parser.add_argument(
        "--latency", type=float, default=2.0, help="seconds that the rewards of a step take (default 2)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of all runs on cards, e.g. optim.lr=3e-4"
    )
    parser.add_argument(
        "--set-stale", action="append", default=[], metavar="KEY=VALUE", help="of those that are stale alone"
    )
    parser.add_argument("--out", type=Path, help="folder for the run folders (default: a temporary one)")
    args = parser.parse_args()
    found: dict[str, Any] = {"circumstances": circumstances()}
    print(f"{circumstances()}\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.out or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if args.only in (None, "curves"):
            more, of_stale = (dict(pair.split("=", 1) for pair in given) for given in (args.set, args.set_stale))
            found["curves"] = curves(folder, args.seeds, args.steps, more, of_stale)
            found["judged"] = judged(found["curves"])
            heads = ["responses", "on-policy, seeds", "mean", "stale by 1: mean", "worst seed", "within"]
            lines = [
                [
                    f"{at['responses']:,}",
                    f"{at['low']:.2f} to {at['high']:.2f}",
                    f"{at['fresh']:.2f}",
                    f"{at['stale']:.2f}",
                    f"{at['stale_low']:.2f}",
                    "yes" if at["within"] else "NO",
                    *(f"{at[share]:.0%}" for share in ("within_of_3", "by_chance") if share in at),
                ]
                for at in found["judged"]
            ]
            if args.seeds >= 2 * SEEDS:
                heads += ["within, 3 seeds by 3", "on-policy seeds by each other"]
            print(f"cards, held-out reward\n\n{table(heads, lines)}\n")
            if args.seeds >= 2 * SEEDS:
                stale, chance = (sum(at[share] for at in found["judged"]) for share in ("within_of_3", "by_chance"))
                n = len(found["judged"])
                print(f"within at {stale:.1f} of {n} on average, on-policy seeds by each other {chance:.1f}\n")
        if args.only in (None, "overlap"):
            found["overlap"] = overlap(folder, args.latency, args.overlap_steps)
            heads = ["max_staleness", "step, s", "writing", "scoring + learning", "step / the longer"]
            lines = [
                [
                    str(row["max_staleness"]),
                    f"{row['step_s']:.2f}",
                    f"{row['writing_s']:.2f}",
                    f"{row['scoring_s']:.2f} + {row['learning_s']:.2f}",
                    f"{row['step_s'] / row['longer_s']:.2f}",
                ]
                for row in found["overlap"]
            ]
            print(f"rewards of a step take {args.latency:g} s, medians\n\n{table(heads, lines)}\n")
            ratio = found["overlap"][1]["step_s"] / found["overlap"][1]["longer_s"]
            missed = "" if ratio <= LIMIT else ", MISSED"
            print(f"stale by 1, a step is {ratio:.2f} of the longer, goal {LIMIT:.2f}{missed}")
        if args.only in (None, "parts"):
            found["parts"] = parts(folder, args.latency, args.overlap_steps)
            heads = ["chunk_size", "stream_size", "step, s", "scored before the last was written", "tokens/s"]
            lines = [
                [
                    str(row["chunk_size"]),
                    str(row["stream_size"]),
                    f"{row['step_s']:.2f}",
                    f"{row['scored_early']:.0%}",
                    f"{row['rollout_tokens_per_s']:.0f}",
                ]
                for row in found["parts"]
            ]
            print(f"rewards of a step take {args.latency:g} s, medians\n\n{table(heads, lines)}\n")
    args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
