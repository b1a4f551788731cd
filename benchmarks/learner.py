"""What share of the matrix rate of a device the learner reaches, and what one PPO iteration costs there.

    python benchmarks/learner.py --json OUT                     # on a GPU: 0.5 B and 1.5 B parameters, Qwen2's shapes
    python benchmarks/learner.py --device cpu --sizes tiny      # anywhere, seconds

No Ray: the learner, and for the iteration the rollout engine, in this process. Weights are random. Useful FLOPs only:
forward 2 N T + 2 V H R + 2 L H T^2 (causal attention), training three times that; the roof is the best of several large
matrix products in the dtype of the forward passes, measured in the same run.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen2Config  # noqa: E402

from core.config import load  # noqa: E402
from core.trajectory import PromptRequest, Trajectory, sample_uid  # noqa: E402
from rollout.engines.transformers_engine import TransformersEngine  # noqa: E402
from trainer.batch import TrainBatch  # noqa: E402
from trainer.learner import Learner  # noqa: E402
from trainer.loop import credit  # noqa: E402

QWEN2 = {"num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True}
SIZES = {  # hidden, intermediate, layers, heads, vocabulary
    "0.5B": (896, 4864, 24, 14, 151_936),
    "1.5B": (1536, 8960, 28, 12, 151_936),
    "tiny": (64, 128, 2, 4, 512),
}


def make_model(size: str, device: str) -> torch.nn.Module:
    hidden, intermediate, layers, heads, vocabulary = SIZES[size]
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        **QWEN2,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def roof(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of the best of ten square products."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        started = now(device)
        a @ b
        best = min(best, now(device) - started)
    return 2 * n**3 / best


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def forward_flops(size: str, tokens: int, scored: int, lengths: list[int]) -> float:
    hidden, intermediate, layers, heads, vocabulary = SIZES[size]
    kv = QWEN2["num_key_value_heads"] * hidden // heads
    body = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * intermediate)
    return (
        2.0 * body * tokens + 2.0 * vocabulary * hidden * scored + 2.0 * layers * hidden * sum(t * t for t in lengths)
    )


def trajectories(size: str, n: int, samples: int, prompt: int, lengths: list[int]) -> list[Trajectory]:
    rng, rows, vocabulary = np.random.default_rng(0), [], SIZES[size][-1]
    for ordinal in range(n // samples):
        ids = rng.integers(1, vocabulary, size=prompt)
        for k in range(samples):
            t = lengths[ordinal * samples + k]
            rows.append(
                Trajectory(
                    request=PromptRequest(
                        ordinal=ordinal, k=k, sample_uid=sample_uid("b", ordinal, k), prompt_ids=ids, columns={}, seed=0
                    ),
                    response_ids=rng.integers(1, vocabulary, size=t),
                    rollout_logprobs=np.zeros(t, dtype=np.float32),
                    action_mask=np.ones(t, dtype=bool),
                    token_offsets=np.zeros((t, 2), dtype=np.int64),
                    policy_version=np.zeros(t, dtype=np.int64),
                    finish_reason="stop",
                    finished_at=0.0,
                    component_rewards={"a": rng.normal(size=t)},
                    component_mask={"a": np.ones(t, dtype=bool)},
                )
            )
    return rows


def configured(args: argparse.Namespace, **more: object) -> object:
    return load(
        None,
        {
            "model.path": "random",
            "data.path": "none.jsonl",
            "rewards.a.fn": "none.py:f",
            "model.dtype": args.dtype,
            "rollout.batch_size": args.batch,
            "rollout.n_samples_per_prompt": args.samples,
            "rollout.max_new_tokens": args.response,
            "ppo.mini_batch_size": args.batch,
            "ppo.micro_batch_size": args.batch,
            "ppo.micro_batch_tokens": args.tokens,
            "ppo.ppo_epochs": 1,
            "model.gradient_checkpointing": args.gradient_checkpointing,
            "model.compile": args.compile,
            "run.checks": False,
            "optim.lr": 1e-6,
            **more,
        },
        folder=ROOT,
    )


def measure(size: str, args: argparse.Namespace, peak_flops: float) -> dict[str, object]:
    """Seconds of annotate and update on one batch, and their share of the roof."""
    device = args.device
    cfg = configured(args)
    torch.cuda.reset_peak_memory_stats() if device == "cuda" else None
    learner = Learner(cfg, Accelerator(cpu=device == "cpu"), make_model(size, device), make_model(size, device))
    lengths = [args.response] * args.batch
    batch = TrainBatch.collate(trajectories(size, args.batch, args.samples, args.prompt, lengths), ["a"])
    annotated, updated = [], []
    for _ in range(args.rounds + 1):
        started = now(device)
        filled, _ = learner.annotate(batch)
        middle = now(device)
        filled = credit(cfg, filled.fill(token_rewards=filled.component_rewards["a"].float()), 0.02, learner.ranks.sum)
        before = now(device)
        learner.update(filled)
        annotated.append(middle - started)
        updated.append(now(device) - before)
    tokens = args.batch // args.samples * args.prompt + args.batch * args.response
    wholes = [args.prompt + t for t in lengths]
    forward = forward_flops(size, tokens, sum(lengths), wholes)
    annotate, update = (statistics.median(x[1:]) for x in (annotated, updated))  # the first of each warms up
    row = {
        "size": size,
        "packed": learner.policy.reader.packed,
        "tokens": tokens,
        "annotate_s": annotate,
        "update_s": update,
        "annotate_share": 2 * forward / annotate / peak_flops,
        "update_share": 3 * forward / update / peak_flops,
        "update_tokens_per_s": tokens / update,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
    }
    return row


def iteration(size: str, args: argparse.Namespace) -> dict[str, object]:
    """One PPO iteration: generate, score (random), annotate, credit, update, copy the weights into the engine."""
    device = args.device
    cfg = configured(args)
    learner = Learner(cfg, Accelerator(cpu=device == "cpu"), make_model(size, device), make_model(size, device))
    engine_model = make_model(size, device).to(getattr(torch, args.dtype))
    engine = TransformersEngine(engine_model, (0,), temperature=1.0, max_new_tokens=args.response)
    rows = trajectories(size, args.batch, args.samples, args.prompt, [1] * args.batch)
    seconds: dict[str, list[float]] = {name: [] for name in ("rollout", "annotate", "update", "sync")}
    difference = 0.0
    for _ in range(args.rounds):
        t0 = now(device)
        answers = engine.generate([row.request for row in rows])
        t1 = now(device)
        written = []
        for row, g in zip(rows, answers, strict=True):
            t = len(g.response_ids)
            per_token = {"action_mask": np.ones(t, dtype=bool), "token_offsets": np.zeros((t, 2), dtype=np.int64)}
            written.append(
                replace(
                    row,
                    response_ids=g.response_ids,
                    rollout_logprobs=g.logprobs,
                    policy_version=np.zeros(t, dtype=np.int64),
                    component_rewards={"a": np.ones(t)},
                    component_mask={"a": np.ones(t, dtype=bool)},
                    **per_token,
                )
            )
        batch = TrainBatch.collate(written, ["a"])
        t2 = now(device)
        batch, means = learner.annotate(batch)
        difference = max(difference, means["logprob_diff/mean"])
        t3 = now(device)
        learner.update(
            credit(cfg, batch.fill(token_rewards=batch.component_rewards["a"].float()), 0.02, learner.ranks.sum)
        )
        t4 = now(device)
        live = engine.live_tensors()
        for name, x in learner.export_weights().items():
            live[name].copy_(x)
        engine.use_weights()
        t5 = now(device)
        for name, spent in zip(seconds, (t1 - t0, t3 - t2, t4 - t3, t5 - t4), strict=True):
            seconds[name].append(spent)
    medians = {f"{name}_s": statistics.median(x) for name, x in seconds.items()}
    total = sum(medians.values())
    return {"size": size, **medians, "samples_per_s": args.batch / total, "logprob_diff_mean": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--sizes", nargs="+", default=["0.5B", "1.5B"], choices=SIZES)
    parser.add_argument("--batch", type=int, default=16, help="responses")
    parser.add_argument("--samples", type=int, default=1, help="to each prompt")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--response", type=int, default=1536)
    parser.add_argument("--tokens", type=int, default=16_384, help="of a micro-batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--iteration", action="store_true", help="a whole PPO iteration instead")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    peak_flops = roof(getattr(torch, args.dtype), args.device)
    where = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(f"{where}, {args.dtype}: matrix products {peak_flops / 1e12:.3g} TFLOP/s", flush=True)
    rows = []
    for size in args.sizes:
        row = iteration(size, args) if args.iteration else measure(size, args, peak_flops)
        rows.append(row)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        if args.device == "cuda":
            torch.cuda.empty_cache()
    if args.json:
        out = {
            "device": where,
            "dtype": args.dtype,
            "roof": peak_flops,
            "arguments": vars(args) | {"json": None},
            "rows": rows,
        }
        args.json.write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
