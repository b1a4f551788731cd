"""The most FLOP per second that a matrix product reaches on this machine, as JSON: the roof of ppo_vs_trl.py.

    python benchmarks/gemm_roof.py [--seconds 2]

Best of many products of several sizes, in fp32 and bf16; threads by OMP_NUM_THREADS.
"""

import argparse
import json
import time

import torch

SIZES = (512, 1024, 2048)


def best(dtype: torch.dtype, seconds: float) -> float:
    """FLOP per second of the fastest product; a size with too few products in its time is tried three times."""
    found = 0.0
    for n in SIZES:
        a, b, out = (torch.randn(n, n).to(dtype) for _ in range(3))
        torch.mm(a, b, out=out)
        started, done = time.perf_counter(), 0
        while done < 3 or time.perf_counter() - started < seconds / len(SIZES):
            before = time.perf_counter()
            torch.mm(a, b, out=out)
            found = max(found, 2 * n**3 / (time.perf_counter() - before))
            done += 1
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each dtype (default 2)")
    seconds = parser.parse_args().seconds
    with torch.inference_mode():
        print(json.dumps({"fp32": best(torch.float32, seconds), "bf16": best(torch.bfloat16, seconds)}))
