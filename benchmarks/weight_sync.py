"""Seconds from the end of an optimizer step to the first token that every worker samples with the new weights.

    python benchmarks/weight_sync.py --json sync.json            # all sizes, 10 to 30 minutes on two cores
    python benchmarks/weight_sync.py --json sync.json --quick    # one size

The real publisher, transports, actors and receivers; the model is a stub whose tensors have the asked sizes (float32)
and whose token costs nothing, so that no forward pass is in the figures. All that is checked in a run is checked here.
`rpc_per_tensor` is the naive way: each tensor is put into the object store and handed to all workers by one call each,
one after the other, without any digest. Ways are timed in turns, round by round, on the same workers; seconds are
medians, the ratio is the median of those within a round. `read` is what the memory allows: one read of all bytes by one
core (xxh3, which the learner does once and each node once). A transport that misses a goal is said so.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train_command import CARDS, ROOT, circumstances, table

sys.path.insert(0, str(ROOT))  # before this folder, whose rollout.py is not our package

from launch import cluster  # noqa: E402

cluster.prepare_environment()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from core.config import load  # noqa: E402
from core.schema import SyncConfig  # noqa: E402
from core.trajectory import PromptRequest, sample_uid  # noqa: E402
from core.weights import Probe, WeightStream, as_bytes, bucket_digest  # noqa: E402
from launch import build, weight_transport  # noqa: E402
from rollout.engines.engine import Generation  # noqa: E402
from rollout.group import RolloutGroup  # noqa: E402
from rollout.shares import Rollouts, Shares  # noqa: E402
from rollout.weight_receiver import WeightReceiver  # noqa: E402
from trainer.ranks import Ranks  # noqa: E402
from trainer.weight_sender import WeightPublisher  # noqa: E402

TRANSPORTS, NAIVE = ("object_store", "collective"), "rpc_per_tensor"
S_PER_GB, RATIO, GROWTH = 0.08, 20.0, 1.10  # goals
MB = 10**6
SIZES = ["10x10", "10x1000", "100x100", "500x10", "500x1000"]
TIMEOUT_S = 120.0
PROBE = Probe(prompt_ids=np.array([[1]]), response_ids=np.array([[1]]))
Cell = tuple[int, int]  # MB, tensors


def sizes(mb: int, n: int) -> list[int]:
    """Elements of n float32 tensors, of `mb` MB together, as uneven as 1 to 3."""
    weights = [1 + 2 * (i % 5) / 4 for i in range(n)]
    return [max(1, int(mb * MB / 4 * w / sum(weights))) for w in weights]


class Stub:
    """Engine and learner in one: tensors, and a token whose log-prob is a number out of each of them."""

    ranks = Ranks()

    def __init__(self, elements: list[int]) -> None:
        self.tensors = {f"t{i}": torch.nn.Parameter(torch.empty(n), False) for i, n in enumerate(elements)}

    def live_tensors(self) -> dict[str, torch.Tensor]:
        return self.tensors

    def stream_weights(self) -> WeightStream:
        return WeightStream.of(self.tensors)

    def logprobs(self, prompt_ids: np.ndarray, response_ids: np.ndarray) -> np.ndarray:
        return np.array([[float(sum(x[-1] for x in self.tensors.values()))]], dtype=np.float32)

    def probe_logprobs(self, probe: Probe) -> np.ndarray:
        return self.logprobs(probe.prompt_ids, probe.response_ids)

    def use_weights(self) -> None:
        """They are."""

    def stream(
        self, requests: list[PromptRequest], begun: object = None, most: object = None
    ) -> Iterator[tuple[int, Generation]]:
        one = Generation(
            response_ids=np.array([1]),
            logprobs=self.logprobs(PROBE.prompt_ids, PROBE.response_ids)[0],
            finish_reason="length",
        )
        yield from enumerate([one] * len(requests))

    def step(self, number: int) -> None:
        for i, x in enumerate(self.tensors.values()):
            x.fill_(number + i / 1000)


def resize(worker: Any, elements: list[int]) -> None:
    """In the worker's process: another model, which nothing was sent to yet."""
    worker._engine.__init__(elements)
    worker._weights = WeightReceiver(worker._engine.live_tensors)


def put_one(worker: Any, name: str, array: np.ndarray) -> None:
    """In the worker's process: a tensor of the naive way."""
    worker._engine.tensors[name].data = torch.from_numpy(array.copy())


@contextmanager
def workers(n: int) -> Iterator[Rollouts]:
    def make_args(name: str) -> tuple[tuple, dict]:
        tokenizer = str(load(CARDS).model.path)
        return (name, lambda: Stub([1]), lambda: build.load_tokenizer(tokenizer)), {
            "threads": 1,
            "deterministic": False,
        }

    group = RolloutGroup(
        list(range(n)),
        make_args,
        actor_options=lambda i: {"num_cpus": 0},
        timeout_s=TIMEOUT_S,
        max_losses=0,
        note=print,
    )
    try:
        group.wait_ready()
        yield Rollouts(Shares(n_workers=n), group)
    finally:
        group.close()


class Bench:
    def __init__(self, rollouts: Rollouts, cell: Cell) -> None:
        import ray

        self._ray, self.rollouts = ray, rollouts
        self.actors = [slot.actor for slot in rollouts._group._slots]
        elements = sizes(*cell)
        rollouts._group._latest = None
        self._all(resize, elements)
        self.learner, self.number, self.put_one = Stub(elements), 0, ray.put(put_one)
        settings = {"device": torch.device("cpu"), "ranks": Ranks(), "note": print}
        self.publishers = {}
        for name in TRANSPORTS:
            transport = weight_transport.make_transport(
                SyncConfig(transport=name, timeout_s=TIMEOUT_S), rollouts, **settings
            )
            self.publishers[name] = WeightPublisher(
                self.learner, transport, PROBE, bucket_bytes=int(SyncConfig().bucket_mb * 2**20), tolerance=1e-3
            )

    def _all(self, call: Any, *args: Any) -> None:
        self._ray.get([a.__ray_call__.remote(call, *args) for a in self.actors], timeout=TIMEOUT_S)

    def naive(self) -> None:
        for name, tensor in self.learner.tensors.items():
            self._all(self.put_one, name, self._ray.put(tensor.numpy()))

    def timed(self, way: str) -> float:
        """Seconds of one sync, first tokens included. The tokens must be those of the new weights."""
        self.number += 1
        self.learner.step(self.number)
        started = time.perf_counter()
        if way == NAIVE:
            self.naive()
        else:
            self.publishers[way].publish(self.number)
        request = PromptRequest(
            ordinal=0, k=0, sample_uid=sample_uid("b", 0, 0), prompt_ids=np.array([1]), columns={}, seed=0
        )
        chunks = [[request] for _ in self.actors]
        tokens = [ref for _, ref, _ in self.rollouts._group.generate(chunks)]
        seconds = time.perf_counter() - started
        want = float(self.learner.logprobs(PROBE.prompt_ids, PROBE.response_ids)[0, 0])
        for (trajectory,) in self._ray.get(tokens, timeout=TIMEOUT_S):
            assert abs(float(trajectory.rollout_logprobs[0]) - want) < 1e-3, "a token of old weights"
        return seconds


def measure(cells: list[Cell], counts: list[int], rounds: int, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    for n in counts:
        with workers(n) as rollouts:
            for mb, tensors in cells:
                bench = Bench(rollouts, (mb, tensors))
                ways = (NAIVE, *TRANSPORTS)
                for _ in range(2):  # pages of the object store are touched for the first time, groups connect
                    for way in ways:
                        bench.timed(way)
                seconds = {way: [] for way in ways}
                for turn in range(rounds):
                    for way in ways if turn % 2 else reversed(ways):
                        seconds[way].append(bench.timed(way))
                for way in ways:
                    middle = statistics.median(seconds[way])
                    ratios = [a / b for a, b in zip(seconds[NAIVE], seconds[way], strict=True)]
                    rows.append(
                        {
                            "transport": way,
                            "mb": mb,
                            "tensors": tensors,
                            "workers": n,
                            "seconds": round(middle, 4),
                            "s_per_gb": round(middle / mb * 1000, 3),
                            "ratio_to_rpc_per_tensor": round(statistics.median(ratios), 2),
                        }
                    )
                tell(
                    " ".join(f"{r['transport']} {r['seconds']:.3f} s" for r in rows[-len(ways) :])
                    + f" {mb, tensors, n}"
                )
    return rows


def read_s_per_gb() -> float:
    """One read of 200 MB by xxh3 on one core, best of 3."""
    raw = [as_bytes(torch.randn(50 * MB))]
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        bucket_digest(raw)
        taken.append(time.perf_counter() - started)
    return min(taken) / 0.2


def verdicts(rows: list[dict[str, Any]]) -> str:
    """Each goal, in how many sizes it was met by the better transport of the size, and the worst."""
    cells = {}
    for row in rows:
        if row["transport"] != NAIVE:
            cells.setdefault((row["mb"], row["tensors"], row["workers"]), []).append(row)
    best = {cell: min(of_cell, key=lambda r: r["seconds"]) for cell, of_cell in cells.items()}
    speed = [row["s_per_gb"] for row in best.values()]
    ratio = [row["ratio_to_rpc_per_tensor"] for row in best.values()]
    growth = [
        best[mb, n, 8]["seconds"] / best[mb, n, 1]["seconds"] for mb, n, w in best if w == 8 and (mb, n, 1) in best
    ]

    def line(what: str, values: list[float], met: list[bool], worst: float) -> str:
        word = "met" if all(met) else "MISSED"
        return (
            f"{what}: {word}, in {sum(met)} of {len(values)} sizes; worst {worst:.2f}"
            if values
            else f"{what}: not measured"
        )

    return "\n".join(
        [
            line(f"at most {S_PER_GB} s/GB", speed, [x <= S_PER_GB for x in speed], max(speed)),
            line(
                f"at least {RATIO:g} times as fast as one RPC per tensor",
                ratio,
                [x >= RATIO for x in ratio],
                min(ratio),
            ),
            line(
                "1 to 8 workers cost at most 10 % more", growth, [x <= GROWTH for x in growth], max(growth, default=0)
            ),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="MBxTENSORS", help=f"default {' '.join(SIZES)}")
    parser.add_argument("--quick", action="store_true", help="10 MB in 10 tensors, 2 workers, 1 round")
    asked = parser.parse_args()
    if asked.quick:
        asked.sizes, asked.workers, asked.rounds = ["10x10"], [2], 1
    cells = [tuple(map(int, size.split("x"))) for size in asked.sizes]
    torch.set_num_threads(1)
    read = read_s_per_gb()
    with cluster.ray_session(load(CARDS, {"resources.object_store_mb": 200 if asked.quick else 3000})):
        rows = measure(cells, asked.workers, asked.rounds, lambda line: print(line, flush=True))
    asked.json.write_text(json.dumps({"read_s_per_gb": read, "rows": rows}, indent=1) + "\n")
    print(f"{circumstances()}, {asked.rounds} rounds; one core reads 1 GB in {read:.3f} s")
    heads = list(rows[0])
    print(table(heads, [[str(row[head]) for head in heads] for row in rows]))
    print(verdicts(rows))


if __name__ == "__main__":
    main()
