"""Weights on the way: all-or-nothing, tied tensors and buffers included, every damage refused."""

import dataclasses

import numpy as np
import pytest
import torch

import tiny_models
from core.faults import InvariantFault, TransitFault
from core.weights import (
    LORA_A,
    LORA_B,
    Flat,
    Probe,
    WeightAck,
    WeightStream,
    as_bytes,
    bucket_digest,
    digest_of,
    in_buckets,
    make_manifest,
    named_tensors,
    stream_digest,
    version_digest,
)
from policy_reading import policy_of, read
from rollout.engines.transformers_engine import TransformersEngine
from rollout.weight_receiver import WeightReceiver
from trainer import adapters, engine_weights, weight_sender
from trainer.batch import TrainBatch
from trainer.ranks import Ranks
from trainer.weight_sender import WeightPublisher
from weight_delivery import packed, receiver_of, send


@pytest.mark.parametrize("name", tiny_models.configs())
def test_a_model_that_received_computes_as_the_sender(name):
    sender, worker = tiny_models.make_model(name, seed=1), tiny_models.make_model(name, seed=2)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        assert not torch.allclose(sender(ids).logits, worker(ids).logits, atol=1e-2)
        send(receiver_of(named_tensors(worker)), named_tensors(sender), 3)
        assert torch.equal(sender(ids).logits, worker(ids).logits)


def test_tied_tensors_travel_once_and_arrive_under_both_names():
    tied, untied = tiny_models.make_model("llama-tied", seed=1), tiny_models.make_model("llama-untied", seed=2)
    specs = WeightStream.of(named_tensors(tied)).specs
    (alias,) = [s for s in specs if s.alias_of]
    assert {alias.name, alias.alias_of} == {"lm_head.weight", "model.embed_tokens.weight"}
    # A receiver whose head has storage of its own must get it too: otherwise the head silently keeps old weights.
    send(receiver_of(named_tensors(untied)), named_tensors(tied), 0)
    assert torch.equal(untied.lm_head.weight, tied.model.embed_tokens.weight)


def test_buffers_travel_too():
    sender, worker = tiny_models.make_model("llama-tied"), tiny_models.make_model("llama-tied")
    (name,) = [n for n, _ in sender.named_buffers() if n.endswith("rotary_emb.inv_freq")]
    sender.get_buffer(name).mul_(0.5)
    send(receiver_of(named_tensors(worker)), named_tensors(sender), 1)
    assert torch.equal(worker.get_buffer(name), sender.get_buffer(name))


def test_buckets_are_of_the_asked_size_and_together_hold_everything():
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(10)}  # 400 bytes each
    specs = WeightStream.of(tensors).specs
    manifest = make_manifest(0, specs, 1000)
    assert [len(b) for b in manifest.buckets] == [2, 2, 2, 2, 2]
    assert [n for b in manifest.buckets for n in b] == list(tensors)
    assert make_manifest(0, specs, 1).buckets == tuple((n,) for n in tensors)  # a tensor is never cut


def test_a_bucket_as_one_buffer_is_cut_into_what_was_packed():
    """Pieces of 1, 12 and 130 bytes: at 0, 64 and 128, and 320 bytes in all."""
    tensors = {"a": torch.tensor(True), "b": torch.arange(3.0), "c": torch.arange(65, dtype=torch.bfloat16)}
    layout = Flat(make_manifest(0, WeightStream.of(tensors).specs, 10**6), 0)
    assert layout.places == [(0, 1), (64, 76), (128, 258)] and layout.n_bytes == 320
    pieces = layout.cut(layout.pack(list(tensors.values())))
    assert [as_bytes(p).tobytes() for p in pieces] == [as_bytes(x).tobytes() for x in tensors.values()]


def test_one_tensor_after_the_other_is_asked_for():
    """What a bucket does not need yet is not gathered yet."""
    asked = []

    def tensors():
        for name in "abcd":
            asked.append(name)
            yield name, torch.zeros(100)

    specs = WeightStream.of({name: torch.zeros(100) for name in "abcd"}).specs
    buckets = in_buckets(make_manifest(0, specs, 800), tensors())
    assert len(next(buckets)) == 2 and asked == ["a", "b"]
    assert len(next(buckets)) == 2 and asked == ["a", "b", "c", "d"]


@pytest.mark.parametrize("name", tiny_models.configs())
def test_what_a_stream_says_beforehand_is_what_comes(name):
    lm = tiny_models.make_model(name)
    stream = engine_weights.stream(lm, torch.bfloat16)
    came = dict(stream.tensors)
    assert list(came) == [s.name for s in stream.specs if s.alias_of is None]
    for spec in stream.specs:
        tensor = came[spec.alias_of or spec.name]
        assert (str(tensor.dtype), tuple(tensor.shape)) == (spec.dtype, spec.shape)
    exported = engine_weights.export(lm, torch.bfloat16)
    assert {n: x.shape for n, x in exported.items()} == {n: x.shape for n, x in named_tensors(lm).items()}
    assert digest_of(exported) == digest_of({n: came[s.alias_of or n] for s in stream.specs for n in [s.name]})


@pytest.fixture
def pair() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], WeightReceiver]:
    sender = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False]), "c": torch.tensor(5)}
    live = {name: torch.zeros_like(x) for name, x in sender.items()}
    return sender, live, receiver_of(live)


def untouched(live: dict[str, torch.Tensor]) -> bool:
    return all(not x.any() for x in live.values())


def test_nothing_is_touched_before_commit(pair):
    sender, live, receiver = pair
    manifest, (bucket,), digests = packed(sender, 4, 10**6)
    receiver.begin(manifest)
    receiver.receive(0, bucket)
    assert untouched(live) and receiver.version == -1
    receiver.commit(digests)
    assert all(torch.equal(live[n], sender[n]) for n in sender) and receiver.version == 4


def test_on_a_cpu_what_arrived_is_used_where_it_lies(pair):
    """No copy, and read-only memory, as Ray's is, is never written into: not by the next version either."""
    sender, buffers, _ = pair
    live = {n: torch.nn.Parameter(x, requires_grad=False) for n, x in buffers.items()}
    live["b"], receiver = buffers["b"], receiver_of(live)
    manifest, (bucket,), digests = packed(sender, 4, 10**6)
    for piece in bucket:
        piece.flags.writeable = False
    receiver.begin(manifest)
    receiver.receive(0, bucket)
    receiver.commit(digests)
    for name, piece in zip(sender, bucket, strict=True):
        assert (live[name].data_ptr() == piece.ctypes.data) == (name != "b"), name
    live["b"].zero_()  # a buffer is copied: models write into theirs, and into read-only memory that is a crash
    send(receiver, {n: x.logical_not() if x.dtype == torch.bool else x + 1 for n, x in sender.items()}, 5)
    assert bucket[0].tobytes() == as_bytes(sender["a"]).tobytes() and live["a"][0, 0] == 1


def test_an_engine_that_keeps_other_tensors_is_noticed(pair):
    """It gives its receiver copies of what it computes with."""
    sender, live, _ = pair
    with pytest.raises(InvariantFault, match="a holds other numbers than sent"):
        send(WeightReceiver(lambda: {n: x.clone() for n, x in live.items()}), sender, 1)


def test_a_missing_bucket_a_flipped_bit_and_a_short_bucket_are_refused(pair):
    sender, live, receiver = pair
    manifest, buckets, digests = packed(sender, 4, 1)
    receiver.begin(manifest)
    receiver.receive(0, buckets[0])
    with pytest.raises(TransitFault, match="lack 2 tensors"):
        receiver.commit(digests)
    for index, bucket in enumerate(buckets):
        bucket[0][0] ^= index == 0
        receiver.receive(index, bucket)
    with pytest.raises(TransitFault, match=r"damaged: bucket 0 \(a"):
        receiver.commit(digests)
    buckets[0][0][0] ^= 1
    for bucket, words in (
        ([buckets[0][0][:-1]], "has 23 of 24 bytes"),
        ([np.zeros(25, "u1")], "has 25 of 24 bytes"),
        ([], "has 0 of 1 tensors"),
    ):
        receiver.begin(manifest)
        with pytest.raises(TransitFault, match=words):
            receiver.receive(0, bucket)
        with pytest.raises(TransitFault, match=words):  # the sender reads this answer alone
            receiver.commit(digests)
    assert untouched(live) and receiver.version == -1
    send(receiver, sender, 4)  # delivered again
    assert torch.equal(live["a"], sender["a"])


def test_a_digest_that_a_neighbour_took_is_compared_as_its_own(pair):
    """It may be of other bytes, or that of a worker that read rubbish."""
    sender, live, receiver = pair
    manifest, buckets, digests = packed(sender, 4, 1)
    said = list(digests[1:]) + list(digests[:1])
    receiver.begin(manifest)
    for index, bucket in enumerate(buckets):
        receiver.receive(index, bucket, said[index])
    with pytest.raises(TransitFault, match=rf"damaged: bucket 0 .*digest {said[0][:12]}, sent {digests[0][:12]}"):
        receiver.commit(digests)
    assert untouched(live) and receiver.version == -1
    for index, bucket in enumerate(buckets):
        receiver.receive(index, bucket, digests[index])
    assert receiver.commit(digests) == version_digest(manifest, digests)
    assert torch.equal(live["a"], sender["a"]) and receiver.version == 4


def test_an_older_version_another_shape_and_a_bucket_without_manifest_are_refused(pair):
    sender, live, receiver = pair
    with pytest.raises(InvariantFault, match="before its manifest"):
        receiver.receive(0, [np.zeros(1, dtype=np.uint8)])
    send(receiver, sender, 5)
    with pytest.raises(InvariantFault, match="version 4 offered, 5 is in use"):
        send(receiver, sender, 4)
    send(receiver, sender, 5)  # the same once more, as after a lost acknowledgement
    with pytest.raises(InvariantFault, match=r"do not fit this model at \['a'\]"):
        send(receiver, sender | {"a": torch.zeros(3, 2)}, 6)
    with pytest.raises(InvariantFault, match=r"\['extra'\]"):
        send(receiver, sender | {"extra": torch.zeros(1)}, 6)


def test_the_digest_depends_on_version_names_shapes_and_bytes():
    x = {"a": torch.arange(4.0), "b": torch.arange(4.0)}
    changed = [{"a": x["a"], "c": x["b"]}, {"a": x["a"].reshape(2, 2), "b": x["b"]}, {"a": x["a"] + 1e-7, "b": x["b"]}]
    tied = {"a": x["a"], "b": x["a"]}
    assert len({digest_of(t) for t in [x, *changed, tied]} | {digest_of(x, 2)}) == 6


def test_what_is_one_tensor_here_and_two_at_the_sender_is_refused_before_anything_changes():
    """The later would overwrite the earlier."""
    live = torch.zeros(3)
    receiver = receiver_of({"a": live, "b": live})
    with pytest.raises(InvariantFault, match="b and a are one tensor in this model and were sent as two"):
        send(receiver, {"a": torch.ones(3), "b": torch.full((3,), 2.0)}, 1)
    assert not live.any()


class Transport:
    """Delivers to one engine in this process; `alter` may spoil the acknowledgement."""

    def __init__(self, engine: TransformersEngine, alter=lambda ack: ack, deliver: bool = True) -> None:
        self.engine, self.receiver = engine, WeightReceiver(engine.live_tensors)
        self.alter, self.deliver = alter, deliver

    def open(self, manifest):
        self.manifest = manifest
        self.receiver.begin(manifest)

    def send(self, index, tensors, raw):
        self.receiver.receive(index, [piece.copy() for piece in raw])

    def offer(self, digests):
        self.digests = digests

    def commit(self, probe, verify):
        digest = self.receiver.commit(self.digests) if self.deliver else version_digest(self.manifest, self.digests)
        self.engine.use_weights()
        logprobs = self.engine.logprobs(probe.prompt_ids, probe.response_ids)
        verify(
            self.alter(
                WeightAck(
                    worker="w", version=self.manifest.version, digest=digest, probe_logprobs=logprobs, pid=1, node="n"
                )
            )
        )
        return 1


class Sender:
    ranks = Ranks()

    def __init__(self, model: torch.nn.Module) -> None:
        self.engine = TransformersEngine(model, (0,), temperature=1.0, max_new_tokens=1)

    def stream_weights(self):
        return WeightStream.of(self.engine.live_tensors())

    def probe_logprobs(self, probe):
        return self.engine.logprobs(probe.prompt_ids, probe.response_ids)


def publisher(transport: Transport) -> WeightPublisher:
    probe = Probe(prompt_ids=np.array([[1, 2, 3]]), response_ids=np.array([[4, 5, 6]]))
    learner = Sender(tiny_models.make_model("gpt2", seed=1))
    return WeightPublisher(learner, transport, probe, bucket_bytes=10_000, tolerance=1e-4)


def test_publish_delivers_and_counts_versions():
    transport = Transport(
        TransformersEngine(tiny_models.make_model("gpt2", seed=2), (0,), temperature=1.0, max_new_tokens=1)
    )
    p = publisher(transport)
    p.publish(1)
    assert p.version == 1 and transport.receiver.version == 1
    sent = Sender(tiny_models.make_model("gpt2", seed=1)).stream_weights()
    assert p.digest == stream_digest(sent, 1, 10_000)  # what a replay of the step computes


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (dict(deliver=False), "not in use there"),
        (dict(alter=lambda ack: dataclasses.replace(ack, version=0)), "committed version 0, not 1"),
        (dict(alter=lambda ack: dataclasses.replace(ack, digest="00")), "other bytes"),
        (dict(alter=lambda ack: dataclasses.replace(ack, probe_logprobs=ack.probe_logprobs * np.nan)), "nan"),
    ],
)
def test_publish_stops_when_a_worker_does_not_use_what_was_sent(spoil, words):
    engine = TransformersEngine(tiny_models.make_model("gpt2", seed=2), (0,), temperature=1.0, max_new_tokens=1)
    p = publisher(Transport(engine, **spoil))
    with pytest.raises(InvariantFault, match=words):
        p.publish(1)
    assert p.version == -1


# ---------------------------------------------------------------- adapters


def test_an_adapter_is_added_to_what_was_loaded_not_to_what_the_last_one_left():
    """W = [[1, 2], [3, 4]]; B A = [[3, 6], [0, 0]], then [[0, 0], [0, 5]]."""
    live = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "other": torch.tensor([7.0])}
    receiver = receiver_of(live)
    for version, (b, a, want) in enumerate(
        [
            ([[3.0], [0.0]], [[1.0, 2.0]], [[4.0, 8.0], [3.0, 4.0]]),
            ([[0.0], [5.0]], [[0.0, 1.0]], [[1.0, 2.0], [3.0, 9.0]]),
        ]
    ):
        send(receiver, {"w" + LORA_B: torch.tensor(b), "w" + LORA_A: torch.tensor(a)}, version)
        assert live["w"].tolist() == want and live["other"].tolist() == [7.0]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])  # GPT-2 keeps its weights transposed
def test_a_worker_that_got_an_adapter_and_one_that_got_whole_weights_compute_as_the_policy(name):
    """alpha is 4 times the rank, and counts in both."""
    lm, base = tiny_models.make_model(name), tiny_models.make_model(name)
    policy = policy_of(lm, lora_rank=2, lora_alpha=8)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.parameters(lm, "policy"):
            parameter.normal_(std=0.3)
    engine = TransformersEngine(base, (0,), temperature=1.0, max_new_tokens=9)
    batch = TrainBatch.collate(tiny_models.roll_out(engine, 4))
    want = read(policy, batch, 1.0).logprobs
    by_adapter, whole = tiny_models.make_model(name), tiny_models.make_model(name, seed=2)
    receiver = receiver_of(named_tensors(by_adapter))
    for version in (1, 2):
        send(receiver, engine_weights.export_adapter(lm), version)
    exported = engine_weights.export(lm, torch.float32)
    assert exported.keys() == named_tensors(whole).keys()
    send(receiver_of(named_tensors(whole)), exported, 1)
    assert float((want - read(policy_of(base), batch, 1.0).logprobs).abs().max()) > 0.1
    for worker in (by_adapter, whole):
        torch.testing.assert_close(read(policy_of(worker), batch, 1.0).logprobs, want, atol=1e-4, rtol=0)


class Failing:
    """A transport whose `send` of one bucket fails, and which is never offered a version."""

    def __init__(self, at: int) -> None:
        self.at, self.sent = at, []

    def open(self, manifest: object) -> None:
        pass

    def send(self, index: int, tensors: object, raw: object) -> None:
        self.sent.append(index)
        if index == self.at:
            raise OSError(f"bucket {index} cannot be sent")

    def offer(self, digests: object) -> None:
        pytest.fail("a version that is not whole was offered")


@pytest.mark.parametrize(("send_fails", "digest_fails"), [(True, False), (False, True), (True, True)])
def test_a_bucket_that_cannot_be_sent_ends_no_gather(send_fails, digest_fails, monkeypatch):
    """The other ranks take part in each: all tensors are taken, nothing is offered, and what failed first is said."""
    taken = []

    class Learner:
        ranks = Ranks()

        def stream_weights(self) -> WeightStream:
            stream = WeightStream.of({f"t{i}": torch.full((4,), float(i)) for i in range(4)})
            return WeightStream(stream.specs, ((taken.append(name) or name, x) for name, x in stream.tensors))

        def probe_logprobs(self, probe: Probe) -> np.ndarray:
            return np.zeros((1, 1), dtype=np.float32)

    def digest(pieces: list[np.ndarray]) -> str:
        if digest_fails and pieces[0].view(np.float32)[0] == 1:
            raise ValueError("no digest")
        return bucket_digest(pieces)

    monkeypatch.setattr(weight_sender, "bucket_digest", digest)
    transport, probe = Failing(1 if send_fails else -1), Probe(prompt_ids=np.ones((1, 1)), response_ids=np.ones((1, 1)))
    publisher = WeightPublisher(Learner(), transport, probe, bucket_bytes=16, tolerance=1.0)
    with pytest.raises(OSError if send_fails else ValueError):
        publisher.publish(0)
    assert taken == ["t0", "t1", "t2", "t3"] and transport.sent == [0, 1] and publisher.version == -1
