"""Tokens per second of one rollout engine, and seconds to put new weights to use. For one interpreter at a time:

    python benchmarks/engines.py --engine transformers
    $(bash launch/vllm_venv.sh) benchmarks/engines.py --engine vllm

Random Llamas, float32 on one thread; compare what ran in turns on one machine, and quote no single line.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from core.trajectory import PromptRequest, sample_uid  # noqa: E402

SIZES = {"1m": (128, 4, 4, 2), "13m": (384, 8, 6, 2), "29m": (512, 10, 8, 4)}  # width, layers, heads, key-value heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("transformers", "vllm"), required=True)
    parser.add_argument("--size", choices=SIZES, default="13m")
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, args.size)
        shape = {"dtype": "float32", "device": "cpu", "temperature": 1.0, "max_new_tokens": args.tokens}
        started = time.perf_counter()
        if args.engine == "vllm":
            from rollout.engines.vllm_engine import VLLMEngine

            engine = VLLMEngine.load(folder, (), max_prompt_tokens=16, requests=args.responses, **shape)
        else:
            from rollout.engines.transformers_engine import TransformersEngine

            engine = TransformersEngine.load(folder, (), slots=args.responses, **shape)
        loaded = time.perf_counter() - started
    rng, rates, syncs = np.random.default_rng(0), [], []
    for turn in range(args.rounds + 1):  # the first is not counted
        requests = [
            PromptRequest(
                ordinal=turn * args.responses + i,
                k=0,
                sample_uid=sample_uid("b", i, 0),
                prompt_ids=rng.integers(1, 1000, size=16),
                columns={},
                seed=0,
            )
            for i in range(args.responses)
        ]
        begun = time.perf_counter()
        written = sum(len(g.response_ids) for g in engine.generate(requests))
        rates.append(written / (time.perf_counter() - begun))
        begun = time.perf_counter()
        engine.use_weights()
        syncs.append(time.perf_counter() - begun)
    print(
        f"{args.engine} {args.size}: {statistics.median(rates[1:]):.0f} tokens/s ({min(rates[1:]):.0f} to"
        f" {max(rates[1:]):.0f}), weights in use after {statistics.median(syncs[1:]):.3f} s, loaded in {loaded:.0f} s"
    )


def save_model(folder: str, size: str) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    width, layers, heads, kv_heads = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


if __name__ == "__main__":
    main()
