"""One PPO iteration here and in TRL's last PPO (trl 1.12.0): same weights, prompts, lengths and hyper-parameters.

    python benchmarks/ppo_vs_trl.py --json out.json           # all of it, about 40 minutes on 2 quiet cores
    python benchmarks/ppo_vs_trl.py --json out.json --quick   # small batches, under 3 minutes: does it work at all
    python benchmarks/ppo_vs_trl.py --json out.json --sizes 1.1M --tiers a b --blocks 3

First it shows that both compute the same: loss and gradients of one batch that TRL's own loop had. Then, tier by tier,
each side is a process of its own, and they take turns (TRL, ours, ours, TRL), never both at work. TRL gets an
environment of its own (`--venv`, made if need be).

Tiers are cumulative: (a) separate critic, fp32, equal lengths; (b) lognormal lengths, 4 samples of each prompt, two
reward components; (c) value head on the policy's trunk; (d) bf16, where TRL runs in whichever dtype is faster for it.
From (b) on the two sides do not do the same work, which is the point: the column "limit" says how much each algorithm
has to compute, as seconds at the rate of the fastest matrix product of this machine, measured before and after.

TRL is set to its best: no gradient checkpointing, no sample generations, no tracker, no saving, its whole batch in one
rollout. Rewards are rules on ids on both sides and cost neither a forward pass. Both sides warm up once (reported).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from peer_cases import GOALS, SIZES, TIERS, Case, Size, Spread, abba, case_of, judge, our_flops, trl_flops
from peer_child import Child
from train_command import circumstances, table
from trl_venv import DEFAULT, python_with_trl

TOLERANCE = 1e-5
PASSIVE = "threads that wait sleep, on both sides: slower, but on a busy machine spinning is far worse"
QUIET_LOAD, QUIET_DRIFT = 0.3, 0.10


class Bench:
    def __init__(
        self, trl_python: Path, scratch: Path, threads: int, *, passive: bool, env: dict[str, str] | None = None
    ) -> None:
        self._trl_python, self._scratch = trl_python, scratch
        self._env = {"OMP_NUM_THREADS": str(threads)} | (env or {})
        if passive:
            self._env["OMP_WAIT_POLICY"] = "PASSIVE"
        self.versions: dict[str, dict[str, str]] = {}

    def ours(self) -> Child:
        return Child(Path(sys.executable), "peer_ours.py", env=self._env, log=self._scratch / "ours.log")

    def trl(self) -> Child:
        return Child(self._trl_python, "peer_trl.py", env=self._env, log=self._scratch / "trl.log")

    def model(self, size: Size, child: Child) -> str:
        folder = self._scratch / f"model-{size.parameters}-{size.vocabulary}"
        if not folder.exists():
            child.ask("make", model=str(folder), size=asdict(size))
        return str(folder)

    def setup(self, case: Case, model: str, **more: Any) -> dict[str, Any]:
        """What a child is told first: the same for both sides."""
        rng = random.Random(0)
        prompts = [
            [rng.randrange(1, case.size.vocabulary - 2) for _ in range(case.prompt)]
            for _ in range(case.batch // case.per_prompt)
        ]
        scratch = str(self._scratch / "trl-output")
        return {"case": case.to_json(), "model": model, "prompts": prompts, "scratch": scratch, **more}

    def roof(self, seconds: float) -> dict[str, float]:
        command = [sys.executable, str(Path(__file__).with_name("gemm_roof.py")), "--seconds", str(seconds)]
        return json.loads(
            subprocess.run(command, env=os.environ | self._env, check=True, capture_output=True, text=True).stdout
        )

    def equality(self) -> dict[str, dict[str, Any]]:
        """Differences between the two on one batch of TRL's loop, with equal and with lognormal lengths."""
        found = {}
        for name, lognormal in (("equal lengths", False), ("lognormal lengths", True)):
            case = Case(size=SIZES["1.1M"], batch=8, response=32, epochs=1, minis=1, lognormal=lognormal)
            stored = str(self._scratch / f"{lognormal}.pt")
            with self.ours() as ours, self.trl() as trl:
                model = self.model(case.size, ours)
                trl.ask("setup", **self.setup(case, model))
                trl.ask("capture", to=stored)
                found[name] = ours.ask("compare", case=case.to_json(), model=model, **{"from": stored})["found"]
        return found

    def row(self, tier: str, case: Case, blocks: int) -> dict[str, Any]:
        """Both sides in turns: every answer of every iteration."""
        with self.ours() as ours:
            setup = self.setup(case, self.model(case.size, ours))
            told = ours.ask("setup", **setup)
            warm = {"ours": ours.ask("iterate")["seconds"]}
            bf16, tried = self._faster(setup) if case.bf16 else (False, {})
            with self.trl() as trl:
                trl_told = trl.ask("setup", **setup, bf16=bf16)
                warm["trl"] = trl.ask("iterate")["seconds"]
                answers: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
                for name in abba(blocks):
                    answers[name].append((ours if name == "ours" else trl).ask("iterate"))
        for a, b in zip(answers["ours"], answers["trl"], strict=True):
            if a["lengths"] != b["lengths"]:
                raise RuntimeError(f"tier {tier}: lengths differ, ours {a['lengths']}, TRL's {b['lengths']}")
        steps = {a["optimizer_steps"] for a in answers["trl"]}
        if steps != {case.epochs * case.minis}:
            raise RuntimeError(f"TRL took {steps} optimizer steps, not {case.epochs * case.minis}")
        self.versions = {"ours": told["versions"], "trl": trl_told["versions"]}
        return {
            "tier": tier,
            "case": case.to_json(),
            "warm_up_s": warm,
            "trl_dtypes_tried_s": tried,
            "trl_bf16": bf16,
            "parameters": {"ours": told["parameters"], "trl": trl_told["parameters"]},
            "answers": answers,
        }

    def _faster(self, setup: dict[str, Any]) -> tuple[bool, dict[str, float]]:
        """Whether TRL is faster in bf16, by the better of two iterations after a warm-up."""
        tried = {}
        for bf16 in (False, True):
            with self.trl() as trl:
                trl.ask("setup", **setup, bf16=bf16)
                tried["bf16" if bf16 else "fp32"] = min([trl.ask("iterate")["seconds"] for _ in range(3)][1:])
        return tried["bf16"] < tried["fp32"], tried


def summed_up(row: dict[str, Any], size: str, roof: dict[str, float]) -> dict[str, Any]:
    """Medians, limits, shares and the verdict of a row."""
    case, goal = Case.from_json(row["case"]), GOALS[size][row["tier"]]
    rates = {"ours": roof["bf16" if case.bf16 else "fp32"], "trl": roof["bf16" if row["trl_bf16"] else "fp32"]}
    flops = {"ours": our_flops(case), "trl": trl_flops(case)}
    limit = {side: sum(flops[side].values()) / rates[side] for side in rates}
    spread = {side: Spread.of([a["seconds"] for a in row["answers"][side]]) for side in rates}
    phases = {
        side: {name: median(a["phases"][name] for a in answers) for name in answers[0]["phases"]}
        for side, answers in row["answers"].items()
    }
    verdict = judge(
        goal,
        ours_s=spread["ours"].median,
        trl_s=spread["trl"].median,
        our_limit_s=limit["ours"],
        ours=phases["ours"],
        trl=phases["trl"],
    )
    return {
        "size": size,
        "flops": flops,
        "limit_s": limit,
        "seconds": {side: asdict(s) for side, s in spread.items()},
        "shown": {side: str(s) for side, s in spread.items()},
        "samples_per_s": {side: case.batch / s.median for side, s in spread.items()},
        "share": {side: limit[side] / spread[side].median for side in rates},
        "phases_s": phases,
        "learner_only_s": {side: p["annotate"] + p["update"] for side, p in phases.items()},
        "peak_bytes": {
            side: max(a["memory"]["peak_bytes"] for a in answers) for side, answers in row["answers"].items()
        },
        "verdict": asdict(verdict) | {"short": verdict.short},
    }


def iteration_table(rows: list[dict[str, Any]]) -> str:
    heads = ["model", "tier", "TRL: s", "share of its limit", "ours: s", "share of our limit", "ratio"]
    heads += ["ratio of limits", "goal"]
    lines = []
    for row in rows:
        limit, share = row["limit_s"], row["share"]
        lines.append(
            [
                row["size"],
                row["tier"],
                row["shown"]["trl"],
                f"{share['trl']:.0%} of {limit['trl']:.3g} s",
                row["shown"]["ours"],
                f"{share['ours']:.0%} of {limit['ours']:.3g} s",
                f"{row['verdict']['ratio']:.2f}x",
                f"{limit['trl'] / limit['ours']:.2f}x",
                row["verdict"]["short"],
            ]
        )
    return table(heads, lines)


def phase_table(rows: list[dict[str, Any]]) -> str:
    """Medians of each phase, so that one sees where a ratio comes from."""
    lines = []
    for row in rows:
        ours, trl = row["phases_s"]["ours"], row["phases_s"]["trl"]
        parts = {name: (trl.get(name), ours[name]) for name in ours}
        parts["learner only (annotate + update)"] = (row["learner_only_s"]["trl"], row["learner_only_s"]["ours"])
        for name, (theirs, own) in parts.items():
            ratio = f"{theirs / own:.2f}x" if theirs and own else "-"
            lines.append(
                [row["size"], row["tier"], name, "-" if theirs is None else f"{theirs:.3g}", f"{own:.3g}", ratio]
            )
    return table(["model", "tier", "phase", "TRL: s", "ours: s", "ratio"], lines)


def equality_table(found: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    """The table, and whether nothing that was compared is off by more than the tolerance."""
    lines, equal = [], True
    for lengths, differences in found.items():
        for name, value in differences.items():
            if isinstance(value, str):
                lines.append([lengths, name, value])
            else:
                equal &= value <= TOLERANCE
                lines.append(
                    [lengths, name, f"{value:.1e}" + ("" if value <= TOLERANCE else f" > {TOLERANCE:g}: UNEQUAL")]
                )
    return table(["batch", "what", "greatest difference"], lines), equal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where all numbers go")
    parser.add_argument("--venv", type=Path, default=DEFAULT, help=f"environment with TRL (default {DEFAULT})")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS))
    parser.add_argument("--blocks", type=int, default=5, help="times TRL, ours, ours, TRL in each tier (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="of each side (default 2)")
    parser.add_argument("--passive", action="store_true", help=PASSIVE)
    parser.add_argument("--quick", action="store_true", help="1.1M, 8 responses of at most 32 tokens, 1 block")
    args = parser.parse_args()
    sizes, blocks = (["1.1M"], 1) if args.quick else (args.sizes, args.blocks)

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(python_with_trl(args.venv), Path(folder), args.threads, passive=args.passive)
        before = bench.roof(0.5 if args.quick else 2.0)
        equality = bench.equality()
        shown, equal = equality_table(equality)
        print(f"{circumstances()}, {args.threads} threads\n\n{shown}\n", flush=True)
        rows = []
        for size in sizes:
            for tier in args.tiers:
                case = case_of(tier, SIZES[size])
                case = replace(case, batch=8, response=32, minis=2) if args.quick else case
                rows.append(bench.row(tier, case, blocks) | {"size": size})
                seconds = {side: median(a["seconds"] for a in got) for side, got in rows[-1]["answers"].items()}
                print(f"{size} {tier}: TRL {seconds['trl']:.3g} s, ours {seconds['ours']:.3g} s", flush=True)
        after = bench.roof(0.5 if args.quick else 2.0)

    roof = {dtype: max(before[dtype], after[dtype]) for dtype in before}
    drift = max(abs(before[d] - after[d]) / roof[d] for d in roof)
    rows = [row | summed_up(row, row["size"], roof) for row in rows]
    quiet = load <= QUIET_LOAD and drift <= QUIET_DRIFT
    machine = {"load": load, "roof_before": before, "roof_after": after, "drift": drift, "quiet": quiet}
    for tier in args.tiers:
        print(f"\n({tier}) {TIERS[tier]}", end="")
    print(f"\n\n{iteration_table(rows)}\n\n{phase_table(rows)}\n")
    print(f"fastest product: {roof['fp32'] / 1e9:.0f} GFLOP/s fp32, {roof['bf16'] / 1e9:.0f} bf16")
    for row in rows:
        if row["verdict"]["why"]:
            print(f"{row['size']} {row['tier']}, goal missed: {row['verdict']['why']}")
        if row["trl_dtypes_tried_s"]:
            tried = ", ".join(f"{dtype} {s:.3g} s" for dtype, s in row["trl_dtypes_tried_s"].items())
            print(f"{row['size']} {row['tier']}: TRL ran in {'bf16' if row['trl_bf16'] else 'fp32'} ({tried})")
    if not quiet:
        print(f"NOT QUIET: load {load:.1f} at the start, products {drift:.0%} apart: these are no figures to quote")
    if args.quick:
        print("QUICK: small batches, which is not what the goals are about")
    found = {
        "circumstances": circumstances(),
        "quick": args.quick,
        "threads": args.threads,
        "passive": args.passive,
        "machine": machine,
    }
    found |= {"versions": bench.versions, "equality": equality, "equal": equal, "rows": rows}
    args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
