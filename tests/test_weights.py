"""Weights on the way: all-or-nothing, tied tensors and buffers included, every damage refused."""

import dataclasses

import numpy as np
import pytest
import torch

import tiny_models
from core.faults import InvariantFault
from core.weights import LORA_A, LORA_B, Probe, WeightAck, make_manifest, named_tensors, pack
from policy_reading import policy_of, read
from rollout.engines.transformers_engine import TransformersEngine
from rollout.weight_receiver import WeightReceiver
from trainer import adapters, engine_weights
from trainer.batch import TrainBatch
from trainer.ranks import Ranks
from trainer.weight_sender import WeightPublisher


def send(receiver: WeightReceiver, tensors: dict[str, torch.Tensor], version: int, bucket_bytes: int = 5000) -> str:
    manifest = make_manifest(version, tensors, bucket_bytes)
    receiver.begin(manifest)
    for index, names in enumerate(manifest.buckets):
        receiver.receive(index, pack(names, tensors))
    return receiver.commit()


@pytest.mark.parametrize("name", tiny_models.configs())
def test_a_model_that_received_computes_as_the_sender(name):
    sender, worker = tiny_models.make_model(name, seed=1), tiny_models.make_model(name, seed=2)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        assert not torch.allclose(sender(ids).logits, worker(ids).logits, atol=1e-2)
        send(WeightReceiver(named_tensors(worker)), named_tensors(sender), 3)
        assert torch.equal(sender(ids).logits, worker(ids).logits)


def test_tied_tensors_travel_once_and_arrive_under_both_names():
    tied, untied = tiny_models.make_model("llama-tied", seed=1), tiny_models.make_model("llama-untied", seed=2)
    manifest = make_manifest(0, named_tensors(tied), 10**9)
    (alias,) = [s for s in manifest.specs if s.alias_of]
    assert {alias.name, alias.alias_of} == {"lm_head.weight", "model.embed_tokens.weight"}
    # A receiver whose head has storage of its own must get it too: otherwise the head silently keeps old weights.
    send(WeightReceiver(named_tensors(untied)), named_tensors(tied), 0)
    assert torch.equal(untied.lm_head.weight, tied.model.embed_tokens.weight)


def test_buffers_travel_too():
    sender, worker = tiny_models.make_model("llama-tied"), tiny_models.make_model("llama-tied")
    (name,) = [n for n, _ in sender.named_buffers() if n.endswith("rotary_emb.inv_freq")]
    sender.get_buffer(name).mul_(0.5)
    send(WeightReceiver(named_tensors(worker)), named_tensors(sender), 1)
    assert torch.equal(worker.get_buffer(name), sender.get_buffer(name))


def test_buckets_are_of_the_asked_size_and_together_hold_everything():
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(10)}  # 400 bytes each
    manifest = make_manifest(0, tensors, 1000)
    assert [len(b) for b in manifest.buckets] == [2, 2, 2, 2, 2]
    assert [n for b in manifest.buckets for n in b] == list(tensors)
    assert make_manifest(0, tensors, 1).buckets == tuple((n,) for n in tensors)  # a tensor is never cut


@pytest.fixture
def pair() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], WeightReceiver]:
    sender = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False]), "c": torch.tensor(5)}
    live = {name: torch.zeros_like(x) for name, x in sender.items()}
    return sender, live, WeightReceiver(live)


def untouched(live: dict[str, torch.Tensor]) -> bool:
    return all(not x.any() for x in live.values())


def test_nothing_is_touched_before_commit(pair):
    sender, live, receiver = pair
    manifest = make_manifest(4, sender, 10**6)
    receiver.begin(manifest)
    receiver.receive(0, pack(manifest.buckets[0], sender))
    assert untouched(live) and receiver.version == -1
    receiver.commit()
    assert all(torch.equal(live[n], sender[n]) for n in sender) and receiver.version == 4


def test_a_missing_bucket_a_flipped_bit_and_a_short_bucket_are_refused(pair):
    sender, live, receiver = pair
    manifest = make_manifest(4, sender, 1)
    receiver.begin(manifest)
    receiver.receive(0, pack(manifest.buckets[0], sender))
    with pytest.raises(InvariantFault, match="lack 2 tensors"):
        receiver.commit()
    for index, names in enumerate(manifest.buckets):
        bucket = pack(names, sender)
        bucket[0] ^= index == 0
        receiver.receive(index, bucket)
    with pytest.raises(InvariantFault, match="damaged"):
        receiver.commit()
    for bucket, words in ((pack(manifest.buckets[0], sender)[:-1], "ends inside a"), (np.zeros(25, "u1"), "too many")):
        receiver.begin(manifest)
        with pytest.raises(InvariantFault, match=words):
            receiver.receive(0, bucket)
        with pytest.raises(InvariantFault, match=words):  # the sender reads this answer alone
            receiver.commit()
    assert untouched(live) and receiver.version == -1


def test_an_older_version_another_shape_and_a_bucket_without_manifest_are_refused(pair):
    sender, live, receiver = pair
    with pytest.raises(InvariantFault, match="before its manifest"):
        receiver.receive(0, np.zeros(1, dtype=np.uint8))
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
    digests = {make_manifest(1, t, 100).digest for t in [x, *changed]} | {make_manifest(2, x, 100).digest}
    assert len(digests) == 5


def test_weights_that_do_not_stay_in_the_live_model_are_noticed():
    """Two names of one storage that are sent as two tensors: the later overwrites the earlier."""
    live = torch.zeros(3)
    receiver = WeightReceiver({"a": live, "b": live})
    with pytest.raises(InvariantFault, match="a holds other numbers than sent"):
        send(receiver, {"a": torch.ones(3), "b": torch.full((3,), 2.0)}, 1)


class Transport:
    """Delivers to one engine in this process; `alter` may spoil the acknowledgement."""

    def __init__(self, engine: TransformersEngine, alter=lambda ack: ack, deliver: bool = True) -> None:
        self.engine, self.receiver = engine, WeightReceiver(engine.live_tensors())
        self.alter, self.deliver = alter, deliver

    def begin(self, manifest):
        self.manifest = manifest
        self.receiver.begin(manifest)

    def send(self, index, bucket):
        self.receiver.receive(index, bucket)

    def offer(self):
        pass

    def commit(self, probe, verify):
        digest = self.receiver.commit() if self.deliver else self.manifest.digest
        logprobs = self.engine.logprobs(probe.prompt_ids, probe.response_ids)
        verify(
            self.alter(
                WeightAck(worker="w", version=self.manifest.version, digest=digest, probe_logprobs=logprobs, pid=1)
            )
        )
        return 1


class Sender:
    ranks = Ranks()

    def __init__(self, model: torch.nn.Module) -> None:
        self.engine = TransformersEngine(model, (0,), temperature=1.0, max_new_tokens=1)

    def export_weights(self):
        return self.engine.live_tensors()

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
    receiver = WeightReceiver(live)
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
    receiver = WeightReceiver(named_tensors(by_adapter))
    for version in (1, 2):
        send(receiver, engine_weights.export_adapter(lm), version)
    exported = engine_weights.export(lm, torch.float32)
    assert exported.keys() == named_tensors(whole).keys()
    send(WeightReceiver(named_tensors(whole)), exported, 1)
    assert float((want - read(policy_of(base), batch, 1.0).logprobs).abs().max()) > 0.1
    for worker in (by_adapter, whole):
        torch.testing.assert_close(read(policy_of(worker), batch, 1.0).logprobs, want, atol=1e-4, rtol=0)
