"""Responses in rounds (`rollout.round_tokens`): what a step's writing takes where lengths have a long tail.

    python benchmarks/rounds.py --json out.json                        # a 1.8 M model on the CPU, minutes
    python benchmarks/rounds.py --json out.json --device cuda --size small --dtype bfloat16

The engine alone, with random weights and without a learner; lengths are drawn, lognormal, and the engine ends each
response at its own. Whole batches and rounds are timed in turns over the same steps. `passes` are those of the model
that were waited for, a token of every slot each, by the tokens that came into batches: what a GPU, whose time for a
pass hardly depends on how many slots are in use, can win at most. `busy` is the share of slots that were in use.
`older` is the mean number of steps between a token and the batch that it is in.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_command import circumstances, table
from transformers import AutoModelForCausalLM, LlamaConfig

from core.trajectory import PromptRequest, Trajectory, sample_uid
from core.under_way import UnderWay
from rollout.engines.engine import Begun
from rollout.engines.transformers_engine import TransformersEngine
from rollout.rounds import RoundPlan

VOCABULARY, PROMPT = 8192, 32
SIZES = {
    "tiny": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
}
WARM_UP = 2  # steps until as much is under way as always


class Drawn(TransformersEngine):
    """Ends each response at a length that was drawn for it; no id ends one."""

    def __init__(self, *args: Any, middle: int, spread: float, **more: Any) -> None:
        self._lengths, self._middle, self._spread = torch.zeros(0), middle, spread
        self.waited = self.alive = 0  # tokens that the longest of each call took, and tokens of all
        super().__init__(*args, **more)

    def length(self, request: PromptRequest) -> int:
        drawn = np.random.default_rng(request.ordinal).lognormal(np.log(self._middle), self._spread)
        return int(np.clip(drawn, 1, self.max_new_tokens))

    def generate(self, requests: list, begun: list | None = None, most: int | None = None) -> list:
        self._lengths = torch.tensor([self.length(r) for r in requests], device=self.device)
        written = super().generate(requests, begun, most)
        old = [0 if b is None else len(b.response_ids) for b in begun or [None] * len(requests)]
        new = [len(g.response_ids) - n for g, n in zip(written, old, strict=True)]
        self.waited, self.alive = self.waited + max(new), self.alive + sum(new)
        return written

    def _is_last(self, token: torch.Tensor, request: torch.Tensor, written: torch.Tensor, out: Any) -> torch.Tensor:
        return written >= self._lengths[request]


def request(ordinal: int) -> PromptRequest:
    ids = np.random.default_rng([ordinal, 1]).integers(1, VOCABULARY, PROMPT)
    uid = sample_uid("b", ordinal, 0)
    return PromptRequest(ordinal=ordinal, k=0, sample_uid=uid, prompt_ids=ids, columns={}, seed=0)


def trajectory(r: PromptRequest, ids: np.ndarray, logprobs: np.ndarray, over: bool, versions: np.ndarray) -> Trajectory:
    n = len(ids)
    return Trajectory(
        request=r,
        response_ids=ids,
        rollout_logprobs=logprobs,
        action_mask=np.ones(n, dtype=bool),
        token_offsets=np.zeros((n, 2), dtype=np.int64),
        policy_version=versions,
        finish_reason="stop" if over else None,
        finished_at=0.0,
    )


class Steps:
    """Steps of a run that only writes: whole batches where `tokens` is None."""

    def __init__(self, engine: Drawn, batch: int, tokens: int | None, extra: int) -> None:
        self.engine, self.tokens, self.extra = engine, tokens, extra
        self.plan = RoundPlan(tokens=tokens or 0, prompts_per_step=batch, chunk_size=batch)
        self.way, self.over = UnderWay(), dict[str, Trajectory]()
        self.taken = self.step = 0

    def __call__(self) -> dict[str, float]:
        """One step: seconds, share of slots in use, tokens of the batch, mean age of these."""
        self.step += 1
        until = self.step * self.plan.prompts_per_step + self.extra
        self.way = self.way.take(map(request, range(self.taken, until)))
        self.taken, rounds = until, 0
        self.engine.waited = self.engine.alive = 0
        began = time.perf_counter()
        while (self.way.begun and not rounds) or len(self.way.ready) < self.plan.prompts_per_step:
            self.way, rounds = self.way.after_round(self.round()), rounds + 1
        seconds = time.perf_counter() - began
        slots = min(self.engine.slots, self.plan.prompts_per_step + self.extra)
        chosen, self.way = self.way.batch(self.plan.prompts_per_step)
        batch = [self.over.pop(r.sample_uid) for r in chosen]
        versions = np.concatenate([t.policy_version for t in batch])
        return {
            "seconds": seconds,
            "rounds": rounds,
            "tokens": len(versions),
            "passes": self.engine.waited,
            "busy": self.engine.alive / (self.engine.waited * slots),
            "older": float(self.step - versions.mean()),
        }

    def round(self) -> list[Trajectory]:
        left = []
        requests = self.way.writing
        begun = [self.way.begun[r.sample_uid] for r in requests]
        starts = [None if t is None else Begun(response_ids=t.response_ids, logprobs=t.rollout_logprobs) for t in begun]
        for r, old, g in zip(requests, begun, self.engine.generate(requests, starts, self.tokens), strict=True):
            before = np.zeros(0, dtype=np.int64) if old is None else old.policy_version
            versions = np.append(before, np.full(len(g.response_ids) - len(before), self.step))
            t = trajectory(r, g.response_ids, g.logprobs, g.finish_reason is not None, versions)
            if g.finish_reason is None:
                left.append(t)
            else:
                self.over[r.sample_uid] = t
        return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where all numbers go")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--batch", type=int, default=64, help="responses of a step (default 64)")
    parser.add_argument("--middle", type=int, default=60, help="median length (default 60)")
    parser.add_argument("--spread", type=float, default=0.8, help="of its logarithm (default 0.8)")
    parser.add_argument("--longest", type=int, default=480)
    parser.add_argument("--steps", type=int, default=6, help="that are timed (default 6)")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, **SIZES[args.size])
    lm = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).to(args.device)
    drawn = {"middle": args.middle, "spread": args.spread, "max_new_tokens": args.longest}
    ways = {"whole": (None, 0)}
    for tokens in (args.longest // 8, args.longest // 4):
        ways |= {f"rounds of {tokens}, {extra} more": (tokens, extra) for extra in (args.batch // 2, args.batch)}
    steps = {
        name: Steps(Drawn(lm, (), temperature=1.0, slots=args.batch + extra, **drawn), args.batch, tokens, extra)
        for name, (tokens, extra) in ways.items()
    }
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(WARM_UP + args.steps):
        for name, step in steps.items():  # in turns: what else the machine does hits all alike
            rows[name] += [step()] if number >= WARM_UP else [step()][:0]
        print(f"step {number + 1} of {WARM_UP + args.steps}", file=sys.stderr, flush=True)

    def beside_whole(name: str, what: str) -> str:
        a_token = [sum(r[what] for r in rows[n]) / sum(r["tokens"] for r in rows[n]) for n in (name, "whole")]
        return f"{a_token[0] / a_token[1]:.2f}"

    lines = [
        [
            name,
            f"{median(r['seconds'] for r in of):.2f}",
            beside_whole(name, "seconds"),
            beside_whole(name, "passes"),
            f"{mean(r['busy'] for r in of):.2f}",
            f"{mean(r['rounds'] for r in of):.1f}",
            f"{mean(r['older'] for r in of):.2f}",
        ]
        for name, of in rows.items()
    ]
    heads = ["way", "step, s", "time a token / whole", "passes a token / whole", "busy", "rounds", "older"]
    print(f"{circumstances()}\n\n{table(heads, lines)}")
    args.json.write_text(json.dumps({"circumstances": circumstances(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
