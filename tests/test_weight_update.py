"""RolloutGroup.update_weights and what it makes of Ray's answers, with a Ray that answers as it is told."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, ObjectLostError, OwnerDiedError, RayTaskError

from core.faults import ProcessFault, TransitFault
from core.weights import Probe, TensorSpec, WeightAck, WeightManifest
from rollout import group as module
from rollout.group import RolloutGroup, WeightUpdate
from rollout.worker import WorkerReady

Answer = Callable[[str, str, tuple], Any]  # of (worker, method, arguments)


class FakeRay:
    """Calls are answered when they are asked for; an answer that is an exception is raised, None never comes."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.calls, self.killed = answer, [], []

    def call(self, name: str, method: str, args: tuple) -> Callable[[], Any]:
        self.calls.append((name, method, args))
        return lambda: self.answer(name, method, args)

    def get(self, ref: Any, timeout: float | None = None) -> Any:
        if isinstance(ref, list):
            return [self.get(x) for x in ref]
        value = ref()
        if value is None:
            raise GetTimeoutError("it has not come")
        if isinstance(value, Exception):
            raise value
        return value

    def wait(self, refs: list, num_returns: int, timeout: float) -> tuple[list, list]:
        return refs[:num_returns], refs[num_returns:]

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.name)

    def remote(self, kind: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda name, *a, **k: Actor(self, name)))

    def told(self) -> dict[str, list[str | None]]:
        """Worker -> the digests that it was told of with its last version."""
        return {name: args[3] for name, method, args in self.calls if method == "take_update"}


class Actor:
    def __init__(self, fake: FakeRay, name: str) -> None:
        self._fake, self.name = fake, name

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *args: self._fake.call(self.name, method, args))


def both_kinds(cause: Exception) -> Exception:
    """As Ray raises it where an argument of a call is lost: the error of a task, and that of the object."""
    error = RayTaskError.__new__(RayTaskError)
    error.__dict__.update(cause=cause, traceback_str="tb", proctitle="p", pid=1, ip="x", function_name="f", args=())
    error.__dict__.update(actor_repr=None, _actor_id=None)
    dual = error.as_instanceof_cause()
    assert isinstance(dual, RayTaskError) and isinstance(dual, module.LOST)
    return dual


OWNER_DIED = OwnerDiedError("00" * 28, "somewhere", "")
GONE = ObjectLostError("00" * 28, "somewhere", "")


def answering(**special: Callable[[str, tuple], Any]) -> Answer:
    def answer(name: str, method: str, args: tuple) -> Any:
        if method in special and (value := special[method](name, args)) is not NotImplemented:
            return value
        if method == "hello":
            return WorkerReady(pid=1, node="node")
        if method == "digest_bucket":
            return f"digest {args[1]}"
        return WeightAck(worker=name, version=1, digest="", probe_logprobs=np.zeros((1, 1)), pid=1, node="node")

    return answer


def update(version: int, buckets: list[str]) -> WeightUpdate:
    specs = tuple(TensorSpec(name=f"t{i}", dtype="torch.uint8", shape=(4,)) for i in range(len(buckets)))
    manifest = WeightManifest(version=version, specs=specs, buckets=tuple((s.name,) for s in specs))
    probe = Probe(prompt_ids=np.array([[1]]), response_ids=np.array([[1]]))
    return WeightUpdate(manifest, buckets, tuple(f"digest {i}" for i in range(len(buckets))), probe, lambda ack: None)


@pytest.fixture
def started(monkeypatch) -> Callable[..., tuple[RolloutGroup, FakeRay, list[str]]]:
    def start(answer: Answer, n: int = 2) -> tuple[RolloutGroup, FakeRay, list[str]]:
        fake, notes = FakeRay(answer), []
        monkeypatch.setattr(module, "ray", fake)
        options = {"timeout_s": 5, "max_losses": 3, "note": notes.append}
        group = RolloutGroup(list(range(n)), lambda name: ((name,), {}), actor_options=lambda i: {}, **options)
        group.wait_ready()
        return group, fake, notes

    return start


BUCKETS = ["b0", "b1", "b2", "b3"]


def test_each_worker_is_told_what_the_others_read(started):
    group, fake, notes = started(answering())
    assert group.update_weights(update(1, BUCKETS), 5) == 2
    assert fake.told() == {name: [f"digest {i}" for i in range(4)] for name in ("worker-0", "worker-1")}
    read = [(name, args[2]) for name, method, args in fake.calls if method == "digest_bucket"]
    assert read == [("worker-0", "b0"), ("worker-1", "b1"), ("worker-0", "b2"), ("worker-1", "b3")] and not notes


@pytest.mark.parametrize("dealt", [update(1, ["x", "b1", "b2", "b3"]), update(2, BUCKETS)])
def test_a_digest_of_other_bytes_is_told_to_nobody(dealt, started):
    """Of another object than the one that is handed over, or dealt for another version."""
    group, fake, _ = started(answering())
    group.open_deal(dealt.manifest)
    for index, bucket in enumerate(dealt.buckets):
        group.deal(index, bucket)
    group.update_weights(update(1, BUCKETS), 5)
    known = None if dealt.manifest.version == 2 else [None, "digest 1", "digest 2", "digest 3"]
    assert fake.told() == {name: known or [None] * 4 for name in ("worker-0", "worker-1")}


def test_what_one_read_that_was_lost_since_the_others_read_again(started):
    """It keeps nothing mapped any more. Its successor comes by the whole, once, and reads all."""

    def dies(name: str, args: tuple) -> Any:
        return ActorDiedError() if name == "worker-0" and args[1] == 2 else NotImplemented

    group, fake, notes = started(answering(digest_bucket=dies))
    assert group.update_weights(update(1, BUCKETS), 5) == 1
    assert fake.told() == {"worker-0.1": [None] * 4, "worker-1": [None, "digest 1", None, "digest 3"]}
    assert len(notes) == 1 and "worker-0 died while weights of version 1 were sent" in notes[0]
    group.wait_ready()
    assert [name for name, method, _ in fake.calls if method == "take_update"].count("worker-0.1") == 1


def test_who_reads_something_else_is_named_and_believed_by_nobody(started):
    def misreads(name: str, args: tuple) -> Any:
        return "digest of noise" if name == "worker-1" and args[1] == 1 else NotImplemented

    group, fake, notes = started(answering(digest_bucket=misreads))
    assert group.update_weights(update(1, BUCKETS), 5) == 2 and not group.counters
    assert set(map(tuple, fake.told().values())) == {("digest 0", None, "digest 2", "digest 3")}
    assert len(notes) == 1 and notes[0].startswith("worker-1 read bucket 1 for its host as digest digest of no, sent")


def test_who_is_late_with_a_digest_is_replaced_and_the_others_are_not(started):
    group, fake, notes = started(
        answering(digest_bucket=lambda name, args: None if name == "worker-0" else NotImplemented)
    )
    assert group.update_weights(update(1, BUCKETS), 5) == 1 and group.counters["worker_lost"] == 1
    assert "worker-0 missed its deadline" in notes[0] and fake.killed == ["worker-0"]


@pytest.mark.parametrize(
    ("cause", "fault", "words"),
    [
        (
            OWNER_DIED,
            ProcessFault,
            "weights of version 1 are lost: the process that put them",
        ),
        (GONE, TransitFault, "weights of version 1 are lost: "),
    ],
)
@pytest.mark.parametrize("whose", ["a worker's", "its successor's"])
def test_a_lost_bucket_is_blamed_on_no_worker(whose, cause, fault, words, started):
    def takes(name: str, args: tuple) -> Any:
        if name == "worker-0" and whose != "a worker's":
            return ActorDiedError()
        return both_kinds(cause) if name.startswith("worker-0") else NotImplemented

    group, fake, _ = started(answering(take_update=takes))
    with pytest.raises(fault, match=words):
        group.update_weights(update(1, BUCKETS), 5)
        group.wait_ready()
    assert group.counters["worker_lost"] == (0 if whose == "a worker's" else 1)


def test_a_group_that_is_closed_meanwhile_says_so(started):
    """By another thread: while digests are taken, or before buckets are dealt."""
    group, fake, _ = started(answering())
    version = update(1, BUCKETS)
    group.open_deal(version.manifest)
    for index, bucket in enumerate(BUCKETS):
        group.deal(index, bucket)
        if index == 0:
            group.close()
    with pytest.raises(ProcessFault, match="were ended while weights were sent"):
        group.update_weights(version, 5)
