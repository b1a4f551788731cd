"""Weights to another process on the same GPU, and the broadcast's end there. Skipped where there is no CUDA device.

python -m pytest tests/gpu        # needs torch, numpy, xxhash; no Ray
"""

import multiprocessing
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from core.faults import TransitFault
from core.trajectory import PromptRequest
from core.weights import (
    Flat,
    Probe,
    WeightStream,
    as_bytes,
    bucket_digest,
    digest_of,
    in_buckets,
    make_manifest,
    version_digest,
)
from rollout.engines.engine import Generation
from rollout.weight_broadcast import BroadcastGroup, Rendezvous, open_store

pytest.importorskip("xxhash")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
PROBE = Probe(prompt_ids=np.array([[1]]), response_ids=np.array([[1]]))


def tensors(fill: float) -> dict[str, torch.Tensor]:
    table = torch.full((300, 64), fill, dtype=torch.bfloat16, device="cuda")
    return {"embed": table, "norm": torch.full((7,), fill, device="cuda"), "head": table}


class Engine:
    def __init__(self) -> None:
        self.tensors = tensors(0.0)

    def stream(
        self, requests: list[PromptRequest], begun: object = None, most: object = None
    ) -> Iterator[tuple[int, Generation]]:
        raise NotImplementedError

    def use_weights(self) -> None:
        """They are."""

    def live_tensors(self) -> dict[str, torch.Tensor]:
        return self.tensors

    def logprobs(self, prompt_ids: np.ndarray, response_ids: np.ndarray) -> np.ndarray:
        return np.array([[float(self.tensors["norm"][0])]], dtype=np.float32)


class _Tokenizer:
    all_special_ids = ()


def serve(inbox: multiprocessing.Queue, answers: multiprocessing.Queue) -> None:
    """A worker's process: calls of methods by name, as Ray would make them."""
    from rollout import turns, worker

    turns.OffsetMapper = lambda tokenizer: None
    it = worker.RolloutWorker("w", Engine, _Tokenizer, threads=1, deterministic=False)
    addresses = [x.data_ptr() for x in it._engine.tensors.values()]
    for method, args in iter(inbox.get, None):
        try:
            answer = getattr(it, method)(*args)
        except Exception as error:
            answer = error
        answers.put((answer, digest_of(it._engine.tensors)))
    answers.put(addresses == [x.data_ptr() for x in it._engine.tensors.values()])


def test_handles_of_gpu_memory_reach_a_worker_and_are_checked_there():
    from torch.multiprocessing.reductions import reduce_tensor

    context = multiprocessing.get_context("spawn")
    inbox, answers = context.Queue(), context.Queue()
    process = context.Process(target=serve, args=(inbox, answers), daemon=True)
    process.start()

    def call(method: str, *args: object) -> tuple:
        inbox.put((method, args))
        return answers.get(timeout=120)

    def deliver(version: int, damage: bool) -> tuple[tuple, str, list]:
        mine = tensors(version)
        stream = WeightStream.of(mine)
        manifest, kept, digests = make_manifest(version, stream.specs, 30_000), [], []
        call("begin_update", manifest)
        for index, bucket in enumerate(in_buckets(manifest, stream.tensors)):
            digests.append(bucket_digest(map(as_bytes, bucket)))
            kept.append(Flat(manifest, index).pack(bucket))
            if damage:
                kept[-1][0] ^= 1
            torch.cuda.synchronize()
            call("receive_shared", index, *reduce_tensor(kept[-1]))
        return call("commit_update", PROBE, tuple(digests)), version_digest(manifest, digests), kept

    try:
        (ack, in_use), digest, _ = deliver(1, damage=False)
        assert ack.digest == digest and in_use == digest_of(tensors(1.0)) and ack.probe_logprobs[0, 0] == 1
        (error, in_use), _, _ = deliver(2, damage=True)
        assert isinstance(error, TransitFault) and in_use == digest_of(tensors(1.0))
        (ack, in_use), digest, _ = deliver(2, damage=False)
        assert ack.digest == digest and in_use == digest_of(tensors(2.0))
        inbox.put(None)
        assert answers.get(timeout=60), "live tensors have moved: captured graphs would read the old ones"
    finally:
        process.kill()
        process.join(30)


def test_a_broadcast_group_on_a_gpu():
    """Of one member: what there is to see with one GPU is that NCCL takes our options and times out by them."""
    store = open_store("127.0.0.1", 20)
    place = Rendezvous(host="127.0.0.1", port=store.port, number=1, size=1, timeout_s=20)
    flat = torch.arange(256, device="cuda").to(torch.uint8)
    BroadcastGroup(place, 0, torch.device("cuda", 0), store).broadcast(flat)
    assert flat.tolist() == list(range(256))
