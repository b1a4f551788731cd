"""Memory of one loss step of the learner over the size of the vocabulary, here and in TRL's PPO loop.

    python benchmarks/learner_memory.py --json out.json           # V = 8,000 and 50,000, one sequence of 4,096 tokens
    python benchmarks/learner_memory.py --json out.json --quick   # smaller, a minute

One process for each measurement. It takes one whole update, after which weights and the optimizer's state are there,
and then three more: what is reported is the median, over these, of the peak of its resident memory above what it held
when the epochs began (gradients are part of it, weights and optimizer are not). The allocator gives blocks of a
megabyte back at once, so that nothing that was freed before is used again unseen. Responses are made up, so that the
rollout is no part: TRL's loop would also hold the logits of its whole rollout, [batch, R, V], until the update is over.

A small model on purpose: its activations are small, and what grows with the vocabulary is what one sees.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from peer_cases import Case, Size, slope
from ppo_vs_trl import PASSIVE, Bench
from train_command import circumstances, table
from trl_venv import DEFAULT, python_with_trl

PROMPT = 64
MEASURED = 3  # updates, after the first
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # fixed: glibc would raise it to the largest block freed so far
SHARE_GOAL, SLOPE_GOAL = 1 / 6, 1.2


def measure(bench: Bench, case: Case, side: str) -> dict[str, Any]:
    """Bytes above weights and optimizer at the peak of an update."""
    with bench.ours() as ours:
        setup = bench.setup(case, bench.model(case.size, ours), fake_rollout=True)
        if side == "ours":
            told, answers = ours.ask("setup", **setup), [ours.ask("iterate") for _ in range(1 + MEASURED)]
    if side == "trl":
        with bench.trl() as trl:
            told, answers = trl.ask("setup", **setup), [trl.ask("iterate") for _ in range(1 + MEASURED)]
    above = [a["memory"]["peak_bytes"] - a["memory"]["before_update"] for a in answers[1:]]
    return {
        "above_bytes": median(above),
        "each_above_bytes": above,
        "weights_bytes": 4 * told["parameters"],
        "seconds": median(a["phases"]["update"] for a in answers[1:]),
    }


def report(found: dict[str, dict[int, dict[str, Any]]], tokens: int) -> tuple[str, list[str]]:
    """The table, and a line for each goal of each of our learners.

    Args:
        found: who ("TRL", or our kind of value function) -> vocabulary -> what `measure` said.
    """
    lines = [
        [who, f"{v:,}", f"{m['weights_bytes'] / 2**20:,.0f}", f"{m['above_bytes'] / 2**20:,.0f}", f"{m['seconds']:.2f}"]
        for who, by_size in found.items()
        for v, m in by_size.items()
    ]
    said, largest = [], max(found["TRL"])
    for who in found.keys() - {"TRL"}:
        share = found[who][largest]["above_bytes"] / found["TRL"][largest]["above_bytes"]
        per_entry = {
            what: slope({v: m[f"{what}_bytes"] for v, m in found[who].items()}) for what in ("above", "weights")
        }
        steep = per_entry["above"] / per_entry["weights"]
        said.append(
            f"{who}: {share:.3f} of TRL's memory above weights and optimizer at V = {largest:,}, T = {tokens:,}"
            f" (goal at most {SHARE_GOAL:.3f}): {'met' if share <= SHARE_GOAL else 'MISSED'}"
        )
        said.append(
            f"{who}: {per_entry['above']:,.0f} bytes for each entry of the vocabulary, {steep:.2f} times the weights'"
            f" (goal at most {SLOPE_GOAL}): {'met' if steep <= SLOPE_GOAL else 'MISSED'}"
        )
    heads = ["learner", "V", "trained weights, MiB", "peak above, MiB", "seconds of the update"]
    return table(heads, lines), sorted(said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where all numbers go")
    parser.add_argument("--venv", type=Path, default=DEFAULT, help=f"environment with TRL (default {DEFAULT})")
    parser.add_argument("--vocabularies", nargs=2, type=int, default=[8_000, 50_000], metavar="V")
    parser.add_argument("--tokens", type=int, default=4096, help="T of the one sequence (default 4096)")
    parser.add_argument("--threads", type=int, default=2, help="of each process (default 2)")
    parser.add_argument("--passive", action="store_true", help=PASSIVE)
    parser.add_argument("--quick", action="store_true", help="V = 2,000 and 8,000, T = 512")
    args = parser.parse_args()
    vocabularies, tokens = ([2_000, 8_000], 512) if args.quick else (args.vocabularies, args.tokens)

    found: dict[str, dict[int, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(python_with_trl(args.venv), Path(folder), args.threads, passive=args.passive, env=GIVE_BACK)
        for who, critic in (("TRL", "separate"), ("ours, separate", "separate"), ("ours, shared", "shared")):
            for v in vocabularies:
                size = Size(vocabulary=v, hidden=256, layers=2, heads=4, inner=512)
                case = Case(
                    size=size, prompt=PROMPT, response=tokens - PROMPT, batch=1, epochs=1, minis=1, critic=critic
                )
                found.setdefault(who, {})[v] = measure(bench, case, "trl" if who == "TRL" else "ours")
                print(f"{who}, V = {v:,}: {found[who][v]['above_bytes'] / 2**20:,.0f} MiB", flush=True)
    shown, said = report(found, tokens)
    print(f"\n{circumstances()}, {args.threads} threads\n\n{shown}\n", *said, sep="\n")
    if args.quick:
        print("QUICK: small sizes, which is not what the goals are about")
    result = {"circumstances": circumstances(), "tokens": tokens, "quick": args.quick, "found": found, "said": said}
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
