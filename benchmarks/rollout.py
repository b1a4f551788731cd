"""Tokens per second of the rollout engines: ours, transformers' `generate` with both of its caches, and vLLM.

    python benchmarks/rollout.py --json out.json                        # ours and generate, about 6 minutes
    python benchmarks/rollout.py --json out.json --vllm PYTHON          # and vLLM, in the interpreter that has it
    python benchmarks/rollout.py --json out.json --sizes 26M            # with a vocabulary of 32,000 ids, not 320
    python benchmarks/rollout.py --json out.json --device cuda --sizes 0.5B 1.5B --dtype bfloat16

64 requests of 16 + 64 tokens in fp32, of equal lengths or lognormal ones (sigma 1, cut at 256); only tokens that were
asked for count: what `generate` writes behind the end of a short response does not. Each engine is a process of its
own; they take turns, forwards and backwards, and one works at a time. Medians over the turns; the limit is the fastest
matrix product of this machine, before and after, with nothing but what these tokens need.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

from peer_cases import SIZES, Size, decode_flops, forward_flops
from peer_child import Child
from train_command import circumstances, table

MODELS = SIZES | {
    "34M": Size(vocabulary=320, hidden=512, layers=8, heads=8, inner=2048),
    "26M": Size(vocabulary=32_000, hidden=384, layers=6, heads=6, inner=1536),  # that of 14M, with so many ids
    "0.5B": Size(vocabulary=151_936, hidden=896, layers=24, heads=14, inner=4864),
    "1.5B": Size(vocabulary=151_936, hidden=1536, layers=28, heads=12, inner=8960),
}
# Against the better of the two caches of `generate`, and against vLLM on equal lengths.
GOALS = {
    "equal": {"1.1M": 2.0, "14M": 1.5, "34M": 1.2},
    "lognormal": {"1.1M": 4.0, "14M": 3.0, "34M": 2.5},
    "vllm": {"1.1M": 2.0, "14M": 1.2, "34M": 1.0},
}
PROMPT, EQUAL, LONGEST, SIGMA = 16, 64, 256, 1.0
QUIET_LOAD, QUIET_DRIFT = 0.3, 0.10


def lengths_of(kind: str, batch: int, equal: int = EQUAL) -> list[int]:
    """Response tokens of each request. Lognormal: quantiles with a median of `equal` / 2, cut at 4 times `equal`."""
    if kind == "equal":
        return [equal] * batch
    z = [NormalDist().inv_cdf((i + 0.5) / batch) for i in range(batch)]
    lengths = [max(1, min(4 * equal, round(equal / 2 * math.exp(SIGMA * x)))) for x in z]
    stride = next(s for s in range(max(2, batch * 3 // 8), 2 * batch + 2) if math.gcd(s, batch) == 1)
    return [lengths[i * stride % batch] for i in range(batch)]


def flops(size: Size, prompt: int, lengths: list[int]) -> float:
    """What writing these responses needs: each prompt once, then token by token over what is before it."""
    prompts = len(lengths) * forward_flops(size, prompt, [], heads=1)
    return prompts + sum(decode_flops(size, prompt, length) for length in lengths)


def roof(seconds: float, threads: int) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).with_name("gemm_roof.py")), "--seconds", str(seconds)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def measure(args: argparse.Namespace, model: str, kind: str, scratch: Path) -> list[dict[str, Any]]:
    """A row for each engine."""
    size, lengths = MODELS[model], lengths_of(kind, args.batch, args.tokens)
    pythons = {"slots": sys.executable, "generate-dynamic": sys.executable, "generate-static": sys.executable}
    if args.vllm is not None:
        pythons["vllm"] = str(args.vllm)
    environment = {"OMP_NUM_THREADS": str(args.threads)}
    with ExitStack() as stack:
        children = {}
        for name, python in pythons.items():
            log = scratch / f"{name}.log"
            child = stack.enter_context(Child(Path(python), "rollout_child.py", env=environment, log=log))
            shape = {"batch": args.batch, "longest": max(lengths), "prompt": PROMPT, "size": asdict(size)}
            child.ask("setup", engine=name, dtype=args.dtype, device=args.device, **shape)
            child.ask("write", prompt=PROMPT, lengths=lengths)  # not counted
            children[name] = child
        spent: dict[str, list[float]] = {name: [] for name in children}
        for turn in range(args.turns):
            for name in list(children) if turn % 2 == 0 else list(children)[::-1]:
                spent[name].append(children[name].ask("write", prompt=PROMPT, lengths=lengths)["seconds"])
    rates = {name: sum(lengths) / median(seconds) for name, seconds in spent.items()}
    generate = max(rates["generate-dynamic"], rates["generate-static"])
    return [
        {
            "engine": name,
            "model": model,
            "lengths": kind,
            "batch": args.batch,
            "dtype": args.dtype,
            "tok_s": rates[name],
            "ratio_to_generate": rates[name] / generate,
            "seconds": seconds,
            "flops": flops(size, PROMPT, lengths),
        }
        for name, seconds in spent.items()
    ]


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each goal that these rows are about."""
    lines = []
    for row in rows:
        model, kind = row["model"], row["lengths"]
        if row["engine"] == "slots" and model in GOALS[kind]:
            goal, ratio = GOALS[kind][model], row["ratio_to_generate"]
            lines.append(f"{model}, {kind}: {ratio:.2f}x generate, goal {goal:g}x{'' if ratio >= goal else ', MISSED'}")
        if row["engine"] == "vllm" and kind == "equal" and model in GOALS["vllm"]:
            (ours,) = [r for r in rows if (r["engine"], r["model"], r["lengths"]) == ("slots", model, kind)]
            goal, ratio = GOALS["vllm"][model], ours["tok_s"] / row["tok_s"]
            lines.append(f"{model}, {kind}: {ratio:.2f}x vLLM, goal {goal:g}x{'' if ratio >= goal else ', MISSED'}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where all numbers go")
    parser.add_argument("--vllm", type=Path, help="interpreter of the environment that has vLLM")
    parser.add_argument("--sizes", nargs="+", choices=MODELS, default=["1.1M", "14M", "34M"])
    parser.add_argument("--lengths", nargs="+", choices=["equal", "lognormal"], default=["equal", "lognormal"])
    parser.add_argument("--batch", type=int, default=64, help="requests (default 64)")
    parser.add_argument("--tokens", type=int, default=EQUAL, help=f"of each response of equal length (default {EQUAL})")
    parser.add_argument("--turns", type=int, default=6, help="of each engine that count (default 6)")
    parser.add_argument("--threads", type=int, default=2, help="of each engine (default 2)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    load, before = os.getloadavg()[0], roof(2.0, args.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.sizes:
            for kind in args.lengths:
                rows += measure(args, model, kind, Path(scratch))
                print("; ".join(f"{r['engine']} {r['tok_s']:,.0f} tok/s" for r in rows if (r["model"], r["lengths"]) == (model, kind)), flush=True)  # fmt: skip  # noqa: E501
    after = roof(2.0, args.threads)
    kind = "bf16" if args.dtype == "bfloat16" else "fp32"
    fastest, drift = max(before[kind], after[kind]), abs(before[kind] - after[kind]) / max(before[kind], after[kind])
    for row in rows:
        seconds = median(row["seconds"])
        row["share_of_gemm_limit"] = row["flops"] / seconds / fastest if args.device == "cpu" else None
    heads = ["model", "lengths", "engine", "tok/s", "spread", "to generate", "of the limit"]
    lines = [
        [
            row["model"],
            row["lengths"],
            row["engine"],
            f"{row['tok_s']:,.0f}",
            f"{min(row['seconds']):.2f}-{max(row['seconds']):.2f} s",
            f"{row['ratio_to_generate']:.2f}x",
            "-" if row["share_of_gemm_limit"] is None else f"{row['share_of_gemm_limit']:.0%}",
        ]
        for row in rows
    ]
    print(
        f"\n{circumstances()}, {args.threads} threads, {args.dtype}, {args.batch} requests\n\n{table(heads, lines)}\n"
    )
    print("\n".join(verdicts(rows)))
    quiet = load <= QUIET_LOAD and drift <= QUIET_DRIFT
    if not quiet:
        print(f"NOT QUIET: load {load:.1f} at the start, products {drift:.0%} apart: rely on ratios, not on seconds")
    found = {"circumstances": circumstances(), "threads": args.threads, "quiet": quiet, "roof": [before, after]}
    args.json.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
