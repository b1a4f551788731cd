"""Weights to real workers by each transport that a CPU has: kills, hangs and damage on the way, and whole runs."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch

import tiny_models
from cards_run import Run, same_numbers
from core.config import load
from core.faults import InvariantFault, ProcessFault, TransitFault
from core.weights import Probe, WeightStream, digest_of
from launch import build, cluster, weight_transport
from rollout.engines.transformers_engine import TransformersEngine
from rollout.group import RolloutGroup
from rollout.shares import Rollouts
from trainer.ranks import Ranks
from trainer.weight_sender import WeightPublisher

pytestmark = pytest.mark.slow
TRANSPORTS = ("object_store", "collective")
TIMEOUT_S = 6


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sync")
    tiny_models.save_model(folder / "model")
    cfg = load(
        None,
        {
            "model.path": str(folder / "model"),
            "model.dtype": "float32",
            "data.path": str(folder / "prompts.jsonl"),
            "rewards.none.fn": "r.py:none",
            "rollout.workers": 2,
            "rollout.max_worker_losses": 9,
            "sync.timeout_s": TIMEOUT_S,
            "run.deterministic": True,
        },
    )
    cluster.prepare_environment()
    with cluster.ray_session(cfg):
        yield cfg


class Sender:
    """Stands in for a learner: a model whose weights move with every version."""

    ranks = Ranks()

    def __init__(self, path: str) -> None:
        self.engine = TransformersEngine.load(
            path, (0,), dtype="float32", device="cpu", temperature=1.0, max_new_tokens=4
        )

    def step(self) -> None:
        with torch.no_grad():
            for parameter in self.engine.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)

    def stream_weights(self) -> WeightStream:
        return WeightStream.of(self.engine.live_tensors())

    def probe_logprobs(self, probe: Probe) -> np.ndarray:
        return self.engine.logprobs(probe.prompt_ids, probe.response_ids)


class Sync:
    """Two workers, a sender, and a transport that may be disturbed at its steps."""

    def __init__(self, cfg, transport: str) -> None:
        self.notes: list[str] = []
        cfg = cfg.model_copy(update={"sync": cfg.sync.model_copy(update={"transport": transport})})
        self.rollouts: Rollouts = build.rollouts(cfg, build.load_tokenizer(cfg.model.path), "cpu", self.notes.append)
        self.rollouts.wait_ready()
        self.sender = Sender(cfg.model.path)
        self.transport = weight_transport.make_transport(
            cfg.sync, self.rollouts, ranks=Ranks(), device=torch.device("cpu"), note=self.notes.append
        )
        probe = Probe(prompt_ids=np.array([[1, 2, 3]]), response_ids=np.array([[4, 5, 6]]))
        # Buckets of 20 kB: several, so that a sync can break in the middle.
        self.publisher = WeightPublisher(self.sender, self.transport, probe, bucket_bytes=20_000, tolerance=1e-4)

        self.version, self.by_broadcast = -1, transport == "collective"

    def publish(self) -> float:
        self.sender.step()
        self.version += 1
        started = time.monotonic()
        self.publisher.publish(self.version)
        return time.monotonic() - started

    def before(self, step: str, do: Callable[[int], None]) -> None:
        """Call `do` with the number of the call, once before each call of a step of the transport."""
        original, calls = getattr(self.transport, step), iter(range(1000))

        def disturbed(*args):
            do(next(calls))
            return original(*args)

        setattr(self.transport, step, disturbed)  # of the object: `del` brings back the method

    def ask(self, of: Callable[[object], object]) -> list:
        """What `of` gives in the process of each worker, told the worker."""
        actors = [slot.actor for slot in self.rollouts._group._slots]
        return ray.get([actor.__ray_call__.remote(of) for actor in actors], timeout=60)

    def in_use(self) -> set[str]:
        """Digests of what the workers compute with, asked of the workers."""
        return set(self.ask(lambda worker: digest_of(worker._engine.live_tensors())))

    def wanted(self) -> set[str]:
        return {digest_of(self.sender.engine.live_tensors())}


@pytest.fixture(scope="module", params=TRANSPORTS)
def workers(cfg, request):
    it = Sync(cfg, request.param)
    yield it
    it.rollouts.close()


@pytest.fixture
def sync(workers):
    """In use at one version, and undisturbed."""
    workers.publish()
    workers.notes.clear()
    workers.rollouts.counters.clear()
    yield workers
    for step in ("send", "offer", "_keep"):
        vars(workers.transport).pop(step, None)
    vars(workers.rollouts._group).pop("_send", None)
    workers.transport._rollouts = workers.rollouts


def test_weights_arrive_bit_for_bit_version_after_version(sync):
    for _ in range(3):
        sync.publish()
        assert sync.in_use() == sync.wanted()
    assert not sync.rollouts.counters and not sync.notes


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_worker_lost_during_a_sync_costs_nobody_else_anything(sync, how):
    """Between begin and commit, in the middle of the buckets. The other one commits; the successor gets this version
    before anything else, and takes part in the next."""
    name, victim = next(iter(sync.rollouts.pids.items()))
    sync.before("send", lambda number: os.kill(victim, how) if number == 1 else None)
    took = sync.publish()
    del sync.transport.send
    # At most the deadline of the broadcast and that of the commit, and the work between them.
    assert took < 3 * TIMEOUT_S, sync.notes
    (lost,) = [note for note in sync.notes if note.startswith(f"{name} ")]
    assert ("died" if how == signal.SIGKILL else "missed its deadline") in lost
    assert f"while weights of version {sync.version} were sent" in lost
    sync.rollouts.wait_ready()
    assert f"serves with weights of version {sync.version}" in sync.notes[-1]
    assert victim not in sync.rollouts.pids.values() and len(sync.rollouts.pids) == 2
    assert sync.in_use() == sync.wanted()
    notes = len(sync.notes)
    sync.publish()
    assert sync.in_use() == sync.wanted() and len(sync.notes) == notes
    assert sync.rollouts.counters["worker_lost"] == 1


def test_what_was_damaged_on_the_way_is_sent_again_once(sync):
    """The copy in the object store is whole; what was handed over first is not."""
    bad = [np.zeros(3, np.uint8)]
    if sync.by_broadcast:
        sync.before("offer", lambda _: sync.rollouts.stage("__ray_call__", lambda w: w._weights.receive(1, bad)))
    else:
        other_buckets_once_for_each(sync.rollouts._group, lambda buckets: [buckets[0], ray.put(bad), *buckets[2:]])
    sync.publish()
    assert sync.in_use() == sync.wanted() and sync.rollouts.counters == {"weights_resent": 2}
    assert len([note for note in sync.notes if "arrived damaged" in note and "sent again" in note]) == 2


def test_what_arrives_damaged_twice_ends_the_run_and_changes_nothing(sync):
    before, keep = sync.wanted(), sync.transport._keep

    def damaged(index: int, raw: list[np.ndarray]) -> None:
        raw = [piece.copy() for piece in raw]
        raw[0][0] ^= index == 1
        keep(index, raw)

    sync.transport._keep = damaged
    if sync.by_broadcast:
        sync.transport._rollouts = _Forgetful(sync.rollouts)  # the broadcast is lost, so the copy is needed
    with pytest.raises(TransitFault, match=f"version {sync.version + 1} arrived damaged: bucket 1"):
        sync.publish()
    assert sync.in_use() == before
    assert sync.rollouts.counters == {"weights_resent": 2}  # refused by who read it for its host, and by the others


def test_a_lost_bucket_is_sent_again_and_an_older_version_is_refused(sync):
    if sync.by_broadcast:
        sync.transport._rollouts = _Forgetful(sync.rollouts)
    else:
        other_buckets_once_for_each(sync.rollouts._group, lambda buckets: buckets[:-1])
    sync.publish()
    assert sync.in_use() == sync.wanted() and sync.rollouts.counters == {"weights_resent": 2}
    assert all("sent again" in note for note in sync.notes[-2:])
    before, sync.version = sync.in_use(), sync.version - 2
    with pytest.raises(InvariantFault, match=f"version {sync.version + 1} offered, {sync.version + 2} is in use"):
        sync.publish()
    assert sync.in_use() == before
    sync.version += 1


def once_per_host(sync: Sync) -> None:
    if sync.by_broadcast:
        pytest.skip("what a broadcast brings is each worker's own memory, which each reads itself")


def reads_by(sync: Sync, digest: Callable[[Callable, list], str] | None) -> None:
    """The first worker reads buckets for its host by `digest`, which is given the real way too; None: as ever."""

    def change(worker: object) -> None:
        import rollout.worker

        original = getattr(rollout.worker, "original", rollout.worker.bucket_digest)
        rollout.worker.original = original
        rollout.worker.bucket_digest = original if digest is None else lambda pieces: digest(original, pieces)

    ray.get(sync.rollouts._group._slots[0].actor.__ray_call__.remote(change), timeout=60)


def test_a_bucket_is_read_by_one_worker_of_a_host(sync):
    """Three versions, each in use bit for bit at both; and in its own commit a worker reads nothing more."""
    once_per_host(sync)

    def count(worker: object) -> None:
        import rollout.weight_receiver
        import rollout.worker

        worker.reads = 0
        for module in (rollout.worker, rollout.weight_receiver):

            def counted(pieces: object, original: Callable = module.bucket_digest) -> str:
                worker.reads += 1
                return original(pieces)

            module.bucket_digest = counted

    sync.ask(count)
    for _ in range(3):
        sync.publish()
        assert sync.in_use() == sync.wanted()
    n = len(sync.transport._manifest.buckets)
    assert n > 2 and sorted(sync.ask(lambda worker: worker.reads)) == sorted([3 * (n // 2), 3 * (n - n // 2)])
    assert not sync.rollouts.counters and not sync.notes


def test_what_a_worker_misread_for_its_host_each_reads_for_itself(sync):
    """It is named, nobody is told of such a digest, and nothing is sent again: the bytes are as they were sent."""
    once_per_host(sync)

    def misread(original: Callable, pieces: list) -> str:
        return original([piece[::-1].copy() for piece in pieces])

    reads_by(sync, misread)
    sync.publish()
    reads_by(sync, None)
    assert sync.in_use() == sync.wanted() and not sync.rollouts.counters
    name = sync.rollouts._group._slots[0].name
    assert sync.notes and all(f"{name} read bucket " in note for note in sync.notes), sync.notes
    assert all("each worker reads it itself" in note for note in sync.notes)


def test_a_worker_that_reads_for_its_host_is_killed_before_it_answers(sync):
    """It was dealt buckets and reads none of them. Nobody waits for it: the other reads those too, and commits."""
    once_per_host(sync)
    survivor, victim = sync.rollouts._group._slots
    pid, incarnation = sync.rollouts.pids[victim.name], victim.incarnation
    sync.before("send", lambda number: os.kill(pid, signal.SIGSTOP) if number == 0 else None)
    sync.before("offer", lambda _: os.kill(pid, signal.SIGKILL))
    took = sync.publish()
    for step in ("send", "offer"):
        delattr(sync.transport, step)
    assert took < TIMEOUT_S, sync.notes
    assert sync.rollouts.counters == {"worker_lost": 1} and victim.incarnation == incarnation + 1
    assert f"died while weights of version {sync.version} were sent" in sync.notes[0]
    digest = ray.get(survivor.actor.__ray_call__.remote(lambda w: digest_of(w._engine.live_tensors())), timeout=60)
    assert {digest} == sync.wanted()
    sync.rollouts.wait_ready()
    assert sync.in_use() == sync.wanted()
    sync.publish()
    assert sync.in_use() == sync.wanted() and sync.rollouts.counters == {"worker_lost": 1}


def test_a_worker_that_cannot_read_for_its_host_is_named_and_costs_the_other_nothing(sync):
    once_per_host(sync)

    def broken(original: Callable, pieces: list) -> str:
        raise OSError("no such page")

    reads_by(sync, broken)
    sync.publish()
    reads_by(sync, None)
    name = sync.rollouts._group._slots[0].name
    assert sync.notes == [f"{name} took no digest of bucket 0 for its host: OSError: no such page"]
    assert sync.in_use() == sync.wanted() and not sync.rollouts.counters


def test_a_bucket_that_is_gone_from_the_store_is_no_fault_of_a_worker(sync):
    """Nothing of the version arrives, twice: the run ends in words, and every worker is as it was."""
    once_per_host(sync)
    before, keeper = sync.in_use(), Keeper.remote()
    (lost,) = ray.get(keeper.put.remote(), timeout=60)
    ray.kill(keeper)
    sync.before("offer", lambda _: sync.transport._buckets.__setitem__(1, lost))
    with pytest.raises(
        ProcessFault, match=f"weights of version {sync.version + 1} are lost: the process that put them"
    ):
        sync.publish()
    assert sync.in_use() == before and "worker_lost" not in sync.rollouts.counters


@ray.remote(num_cpus=0)
class Keeper:
    """Owns an object that is lost with it."""

    def put(self) -> list:
        return [ray.put([np.zeros(1_000_000, np.uint8)])]


def other_buckets_once_for_each(group: RolloutGroup, change: Callable[[list], list]) -> None:
    """The first delivery to each worker is of `change` of the buckets."""
    send, lost = group._send, set()

    def forgetful(slot: object, of_host: list[str | None] | None = None) -> object:
        if slot.name in lost:
            return send(slot, of_host)
        lost.add(slot.name)
        whole = group._latest
        group._latest = replace(whole, buckets=change(whole.buckets))
        try:
            return send(slot)
        finally:
            group._latest = whole

    group._send = forgetful  # of the object: `del` brings back the method


class _Forgetful:
    """Loses what is handed over early: the order to take part in a broadcast."""

    def __init__(self, rollouts: Rollouts) -> None:
        self._rollouts = rollouts

    def __getattr__(self, name: str) -> object:
        return getattr(self._rollouts, name)

    def stage(self, method: str, *args: object, first: dict | None = None) -> None:
        if method != "receive_broadcast":
            self._rollouts.stage(method, *args, first=first)


# ---------------------------------------------------------------- whole runs

REWARDS = """
def vowels(completions, **_):
    return [sum(c in "aeiou" for c in text) / 10 for text in completions]
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    tiny_models.save_model(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"the {w} sat"} for w in ["cat", "dog", "mat", "park"] * 4]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        """
model: {path: model, dtype: float32}
data: {path: prompts.jsonl}
rollout: {batch_size: 16, chunk_size: 4, max_new_tokens: 12, workers: 2}
rewards: {vowels: {fn: rewards.py:vowels}}
ppo: {mini_batch_size: 8, micro_batch_size: 4}
optim: {lr: 0.001}
sync: {bucket_mb: 0.02}
log: {trackers: []}
resources: {collective_timeout_s: 120}
run: {steps: 3, save_every: 3, deterministic: true}
"""
    )
    return folder


@pytest.mark.long(seconds=180)
def test_a_run_is_the_same_by_broadcast_and_by_object_store(task, tmp_path):
    """Bit for bit, with two learner processes, each of which drives a worker."""
    runs = []
    for transport in TRANSPORTS:
        options = ("--accelerate", "ddp", "--sync.transport", transport)
        runs.append(Run(tmp_path / transport, *options, config=task / "config.yaml"))
        assert runs[-1].end(240) == 0, runs[-1].words()
        assert "broadcast" not in runs[-1].words() and not any(
            count for name, count in runs[-1].rows()[-1].items() if name.startswith("faults/")
        )
    same_numbers(runs[0].rows(), runs[1].rows())
    assert len(runs[0].rows()) == 3


def test_a_gpu_transport_is_refused_without_a_gpu(task, tmp_path):
    run = Run(tmp_path / "r", "--sync.transport", "cuda_ipc", config=task / "config.yaml")
    assert run.end(60) == 2
    (said,) = [line for line in run.words().splitlines() if line.startswith("tokenppo: ")]
    assert "sync.transport = cuda_ipc: there is no GPU" in said and not (tmp_path / "r").exists()
