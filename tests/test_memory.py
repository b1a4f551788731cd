"""The memory estimate against numbers worked by hand, for a model of 1,000 parameters and round shapes."""

import pytest

from core.config import load
from launch import memory
from launch.memory import ModelShape, Sharding

# 2 layers, H = 10, F = 20, Q = 10, K = 5, V = 100; the trunk is all but the output layer.
SHAPE = ModelShape(
    parameters=1_000_000,
    trunk=900_000,
    layers=2,
    hidden=10,
    inner=20,
    query=10,
    key=5,
    vocabulary=100,
    linears=(("model.layers.0.self_attn.q_proj", 10, 10), ("model.layers.0.mlp.up_proj", 20, 10)),
    window=64,
)
HEAD = 11  # the value head: H weights and a bias
P = 1_000_000 + HEAD


def configured(**settings: object) -> object:
    given = {
        "model.path": "m",
        "model.dtype": "float32",
        "data.path": "d.jsonl",
        "data.max_prompt_tokens": 8,
        "rewards.a.fn": "r.py:f",
        "rollout.batch_size": 8,
        "rollout.max_new_tokens": 24,
        "ppo.mini_batch_size": 8,
        "ppo.micro_batch_size": 4,
    }
    return load(None, given | {name.replace("__", "."): value for name, value in settings.items()})


def learner(kind: str = "one", ranks: int = 1, device: str = "cpu", **settings: object) -> memory.Learner:
    sharding = Sharding(kind=kind, ranks=ranks)
    return memory.learner(configured(**settings), SHAPE, sharding, device)


@pytest.mark.parametrize(
    ("kind", "weights", "gradients", "moments", "buffers"),
    [  # in parameters of 4 bytes, over 4 ranks; moments are two
        ("one", 1, 1, 2, 0),
        ("ddp", 1, 1, 2, 1),  # its buckets
        ("zero0", 1, 1, 2, 1),  # flat, for the all-reduce
        ("zero1", 1, 1, 0.5, 1.5),  # a bucket; a quarter of the weights and of the gradients again
        ("zero2", 1, 0.25, 0.5, 1.5),
        ("zero3", 0.25, 0.25, 0.5, 3),  # a bucket, its copy by rank, and all of so small a model gathered
        ("fsdp2", 0.25, 0.25, 0.5, 0.25),
    ],
)
def test_states_by_stage(kind, weights, gradients, moments, buffers):
    it = learner(kind, 1 if kind == "one" else 4)
    assert it.weights == pytest.approx(4 * P * weights)
    assert it.gradients == pytest.approx(4 * P * gradients)
    assert it.moments == pytest.approx(4 * P * moments)
    assert it.buffers == pytest.approx(4 * P * buffers)
    assert it.reference == 4_000_000


def test_one_learner_has_the_16_bytes_of_the_zero_paper_and_the_reference():
    it = learner()
    assert it.weights + it.gradients + it.moments == 16 * P and it.states == 16 * P + 4_000_000


def test_deepspeeds_bucket_is_no_larger_than_all_gradients_nor_than_its_default():
    for device in ("cpu", "cuda"):
        assert learner("zero2", 2, device).buffers == 4 * (P + P)
    large = ModelShape(**(SHAPE.__dict__ | {"parameters": 7_000_000_000}))
    it = memory.learner(configured(), large, Sharding(kind="zero2", ranks=8), "cuda")
    assert it.buffers == 4 * (2 * (7_000_000_000 + HEAD) / 8 + 500_000_000)


def test_zero3_gathers_no_more_than_its_limit():
    large = ModelShape(**(SHAPE.__dict__ | {"parameters": 7_000_000_000}))
    it = memory.learner(configured(), large, Sharding(kind="zero3", ranks=8), "cuda")
    assert it.buffers == 4 * (2 * 500_000_000 + 1_000_000_000) and it.weights == 4 * (7_000_000_000 + HEAD) / 8


def test_value_functions():
    assert learner(model__value="separate").moments == 8 * (P + 900_000)
    assert learner(model__value="shared_detached").moments == 8 * P


def test_adapters_are_trained_alone_and_the_policy_without_them_is_the_reference():
    one = 4 * (20 + 30)  # rank times outputs and inputs of both layers
    it = learner(model__lora_rank=4)
    assert it.gradients == 4 * (one + HEAD) and it.weights == 4 * (1_000_000 + one + HEAD) and it.reference == 0
    assert learner(model__lora_rank=4, model__value="lora").gradients == 4 * (2 * one + HEAD)
    of_q = learner(model__lora_rank=4, model__lora_targets=["q_proj"])
    assert of_q.gradients == 4 * (4 * 20 + HEAD)


@pytest.mark.parametrize(
    ("reference", "device", "on_device", "on_host"),
    [("copy", "cuda", 4e6, 4e6), ("offload", "cuda", 4e6, 8e6), ("reward_server", "cuda", 0, 4e6)],
)
def test_the_reference_is_where_it_is_said_to_be(reference, device, on_device, on_host):
    """On the host the model is loaded; an offloaded reference is there too, and on the device while it computes."""
    it = learner(device=device, model__reference=reference)
    assert (it.reference, it.host) == (on_device, on_host)


def test_what_is_offloaded_is_on_the_host_and_not_on_the_gpu():
    cfg = configured()
    both = Sharding(kind="zero3", ranks=4, offload_optimizer=True, offload_parameters=True)
    it, kept = (memory.learner(cfg, SHAPE, s, "cuda") for s in (both, Sharding(kind="zero3", ranks=4)))
    assert (it.weights, it.moments) == (0, 0)
    assert it.host - kept.host == 2 * P + 2 * P + P  # moments; the copy of the weights and its gradients; weights


def test_activations_by_hand():
    # Two norms: 3 x 10 numbers each; 2 x 10 of queries and output, 2 x 5 of keys and values; 4 x 20 of the MLP.
    of_layer = 4 * (60 + 20 + 10 + 80)
    assert memory.activation_bytes(configured(), SHAPE) == 2 * of_layer
    narrow = 10 * (4 * 4 + 5 * 2) + 2 * (20 + 10 + 80)
    assert memory.activation_bytes(configured(model__dtype="bfloat16"), SHAPE) == 2 * narrow
    again = memory.activation_bytes(configured(model__gradient_checkpointing=True), SHAPE)
    assert again == 2 * 4 * 10 + of_layer
    assert memory.activation_bytes(configured(model__value="separate"), SHAPE) == 4 * of_layer


def test_tokens_of_a_forward_pass():
    assert memory.micro_batch_tokens(configured(), SHAPE) == 4 * (8 + 24)
    assert memory.micro_batch_tokens(configured(data__max_prompt_tokens=1000), SHAPE) == 4 * 64, "the model's window"
    assert memory.micro_batch_tokens(configured(ppo__micro_batch_tokens=50), SHAPE) == 50
    assert memory.micro_batch_tokens(configured(ppo__micro_batch_tokens=5), SHAPE) == 32, "one response goes alone"


def test_logits_are_held_in_chunks_or_whole():
    of_layer = 4 * 100 * 10  # the gradient of the output layer
    assert memory.logit_bytes(configured(), SHAPE, "cpu") == 12 * (4 * 24) * 100 + of_layer
    long = configured(ppo__micro_batch_size=10_000)
    assert memory.logit_bytes(long, SHAPE, "cpu") == 12 * ((16 << 20) // 400) * 100 + of_layer
    whole = ModelShape(**(SHAPE.__dict__ | {"fused": False}))
    assert memory.logit_bytes(long, whole, "cpu") == 12 * 10_000 * 24 * 100 + of_layer
    assert memory.logit_bytes(configured(model__lora_rank=2), SHAPE, "cpu") == 12 * 96 * 100


def test_a_worker_has_weights_and_room_for_keys_and_values():
    it = memory.worker(configured(rollout__slots=16, rollout__chunk_size=6), SHAPE, "cpu")
    assert it.cache == 2 * 2 * 5 * 4 * (6 * 32) and it.weights == 4_000_000 and it.scratch == 12 * 6 * 100
    narrow = memory.worker(configured(model__dtype="bfloat16"), SHAPE, "cuda")
    assert narrow.weights == narrow.host == 2_000_000


def test_a_vllm_worker_takes_its_share_of_each_gpu():
    it = memory.worker(
        configured(rollout__engine="vllm", rollout__tensor_parallel_size=2, rollout__gpu_memory=0.4), SHAPE, "cuda"
    )
    assert (it.weights, it.share, it.host) == (2_000_000, 0.4, 4_000_000)
    assert it.cache == 2 * 2 * 5 * 4 * 32 / 2, "one response at least"


@pytest.mark.parametrize(
    ("file", "ranks", "kind"),
    [
        ({}, 1, "one"),
        ({"distributed_type": "MULTI_GPU"}, 2, "ddp"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}}, 2, "zero3"),
        ({"distributed_type": "DEEPSPEED"}, 1, "zero2"),
        ({"distributed_type": "FSDP"}, 2, "fsdp2"),
    ],
)
def test_sharding_of_an_accelerate_file(file, ranks, kind):
    assert Sharding.of(file, ranks) == Sharding(kind=kind, ranks=ranks)


def test_the_shipped_accelerate_files_say_what_their_names_say():
    from launch.arguments import ACCELERATE_FILES, parse

    for file in ACCELERATE_FILES.glob("*.yaml"):
        sharding = parse(["--accelerate", file.stem]).sharding
        kind = {"cpu": "one", "gpu": "one"}.get(file.stem, file.stem.removesuffix("_offload"))
        offload = "offload" in file.stem
        assert (sharding.kind, sharding.offload_optimizer, sharding.offload_parameters) == (kind, offload, offload)


def test_the_shape_of_a_model_is_read_from_its_configuration():
    import tiny_models
    from launch import build

    for name in ("llama-untied", "llama-tied", "gpt2"):
        lm = tiny_models.make_model(name)
        shape = build.shape_of(lm)
        assert shape.parameters == sum(p.numel() for p in lm.parameters())
        assert shape.trunk == sum(p.numel() for p in lm.base_model.parameters())
        assert (shape.layers, shape.hidden, shape.query) == (2, 32, 32) and shape.fused
    assert build.shape_of(tiny_models.make_model("llama-tied")).key == 16


def test_an_adapter_has_as_many_parameters_as_peft_makes():
    pytest.importorskip("peft")
    import tiny_models
    from core.schema import ModelConfig
    from launch import build
    from trainer import adapters

    for targets in ([], ["q_proj", "down_proj"]):
        lm = tiny_models.make_model("llama-untied")
        shape = build.shape_of(lm)
        adapters.inject(lm, ["policy"], ModelConfig(path="m", lora_rank=3, lora_targets=targets))
        assert shape.adapter(3, targets) == sum(p.numel() for p in lm.parameters() if p.requires_grad)


def test_sizes_in_words():
    assert [memory.gib(n) for n in (2**30, 12 * 2**20, 150 * 2**20)] == ["1 GiB", "12 MiB", "0.15 GiB"]
