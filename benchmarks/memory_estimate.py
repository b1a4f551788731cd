"""What launch/memory.py says a learner needs, over what one really has resident, for a 14 M model on this CPU.

    python benchmarks/memory_estimate.py                              # all cases, some minutes
    python benchmarks/memory_estimate.py --only one ddp --json o.json

Each case is a launch of its own. A rank counts from what it has resident when it has joined the launch, before it has a
model, up to the peak of two updates, the greatest of all ranks. glibc gives large blocks back at once, so that nothing
that was freed before is used again unseen. Responses are made up: the rollout is no part of it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from launch import cluster, memory  # noqa: E402

PROMPT = RESPONSE = 64
ROWS, MICRO = 16, 8
SIZE = {"vocab_size": 8000, "hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4} | {
    "num_key_value_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": PROMPT + RESPONSE,
    "tie_word_embeddings": True,
}
CASES = {  # name -> accelerate file, settings
    "one": ("cpu", {}),
    "one, separate": ("cpu", {"model.value": "separate"}),
    "one, LoRA 8": ("cpu", {"model.lora_rank": 8}),
    "one, bfloat16": ("cpu", {"model.dtype": "bfloat16"}),
    "ddp": ("ddp", {}),
    "zero0": ("zero1", {}),
    "zero1": ("zero1", {}),
    "zero2": ("zero2", {}),
    "zero3": ("zero3", {}),
}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def configured(settings: dict) -> object:
    from core.config import load

    given = {
        "model.path": "made-here",
        "model.dtype": "float32",
        "data.path": "made-here.jsonl",
        "data.max_prompt_tokens": PROMPT,
        "rewards.a.fn": "made_here.py:f",
        "rollout.batch_size": ROWS,
        "rollout.max_new_tokens": RESPONSE,
        "ppo.mini_batch_size": ROWS,
        "ppo.micro_batch_size": MICRO,
        "ppo.ppo_epochs": 1,
        "resources.device": "cpu",
        "resources.learner_threads": 1,
        "run.checks": False,
    }
    return load(None, given | settings, folder=ROOT)


def resident(key: str) -> int:
    """Bytes that this process has resident (VmRSS), or had at most since the last reset (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def trajectories(n: int) -> list:
    import numpy as np

    from core.trajectory import PromptRequest, Trajectory, sample_uid

    rng = np.random.default_rng(0)

    def one(i: int) -> Trajectory:
        ids = rng.integers(1, SIZE["vocab_size"], size=PROMPT + RESPONSE)
        request = PromptRequest(
            ordinal=i, k=0, sample_uid=sample_uid("m", i, 0), prompt_ids=ids[:PROMPT], columns={"prompt": ""}, seed=0
        )
        ones = np.ones(RESPONSE, dtype=bool)
        return Trajectory(
            request=request,
            response_ids=ids[PROMPT:],
            rollout_logprobs=np.full(RESPONSE, -9.0, dtype=np.float32),
            action_mask=ones,
            token_offsets=np.zeros((RESPONSE, 2), dtype=np.int64),
            policy_version=np.zeros(RESPONSE, dtype=np.int64),
            finish_reason="length",
            finished_at=0.0,
            component_rewards={"a": rng.normal(size=RESPONSE)},
            component_mask={"a": ones},
        )

    return [one(i) for i in range(n)]


def child(settings: dict, out: Path) -> None:
    """A rank: writes what it had resident before its model and at most, and what is estimated, into `out`.rank."""
    cluster.prepare_environment()
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from launch import build, learners
    from trainer.batch import TrainBatch
    from trainer.learner import Learner
    from trainer.loop import credit

    cfg = configured(settings)
    with ExitStack() as stack:
        accelerator, ranks = learners.join(cfg, stack, print)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
        torch.manual_seed(0)
        models = [
            AutoModelForCausalLM.from_config(LlamaConfig(**SIZE), dtype=torch.float32).eval()
            for _ in range(2 if cfg.reference == "copy" else 1)
        ]
        shape = build.shape_of(models[0])
        it = Learner(cfg, accelerator, models[0], models[1] if len(models) > 1 else None, ranks)
        for _ in range(2):
            batch, _ = it.annotate(TrainBatch.collate(trajectories(ROWS // ranks.size), ["a"]))
            rewards = batch.component_rewards["a"].float()
            batch = batch.fill(token_rewards=rewards, normalized_rewards={"a": rewards})
            it.update(credit(cfg, batch, 0.02, ranks.sum, weights={"a": 1.0}))
        peak = resident("VmHWM")
        kind = memory.Sharding.of(yaml.safe_load(Path(os.environ["ESTIMATED_FILE"]).read_text()), ranks.size)
        said = memory.learner(cfg, shape, kind, "cpu")
        numbers = {"before": before, "peak": peak - before, "estimate": said.most, "parts": said.parts()}
        out.with_suffix(f".{ranks.index}").write_text(json.dumps(numbers | {"parameters": shape.parameters}))


def measure(name: str, folder: Path) -> dict:
    file, settings = CASES[name]
    tree = yaml.safe_load((ROOT / "launch" / "accelerate" / f"{file}.yaml").read_text())
    if name == "zero0":
        tree["deepspeed_config"]["zero_stage"] = 0
    place = folder / "accelerate.yaml"
    place.write_text(yaml.safe_dump(tree))
    out = folder / name.replace(", ", "-").replace(" ", "-")
    command = [sys.executable, "-P", "-m", "launch.accelerate_launch", "--quiet", "--config_file", str(place)]
    command += [__file__, "--child", json.dumps(settings), "--out", str(out)]
    environment = os.environ | GIVE_BACK | THREADS | {"PYTHONPATH": str(ROOT), "ESTIMATED_FILE": str(place)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    ranks = [json.loads(p.read_text()) for p in sorted(folder.glob(f"{out.name}.*"))]
    if done.returncode or not ranks:
        raise SystemExit(f"{name}: {done.stdout[-2000:]}{done.stderr[-3000:]}")
    return max(ranks, key=lambda rank: rank["peak"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(CASES), help="these cases")
    parser.add_argument("--json", type=Path, help="where all numbers go")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(json.loads(args.child), args.out)
        return 0
    found = {}
    print("| learner | estimate, MiB | peak, MiB | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only or CASES:
            found[name] = of = measure(name, Path(folder))
            print(
                f"| {name} | {of['estimate'] / 2**20:,.0f} | {of['peak'] / 2**20:,.0f}"
                f" | {of['estimate'] / of['peak']:.2f} |",
                flush=True,
            )
    befores = [of["before"] / 2**20 for of in found.values()]
    print(f"\na rank without a model: {min(befores):,.0f} to {max(befores):,.0f} MiB")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
