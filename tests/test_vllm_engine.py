"""What is handed to vLLM, and what of it is refused before anything starts; tests/e2e/test_vllm.py has the real one."""

import functools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from core.config import load
from core.faults import UserError
from core.schema import Config
from core.weights import Probe, named_tensors
from launch import build, cluster, interpreter
from launch.reservation import NO_SEATS
from rollout.engines.transformers_engine import TransformersEngine
from rollout.engines.vllm_engine import VLLMEngine, engine_arguments, request_seed, sampling_arguments
from rollout.worker import RolloutWorker
from weight_delivery import packed

PLAIN = {"dtype": "bfloat16", "device": "cpu", "max_tokens": 96, "requests": 64}


def test_what_vllm_is_started_with():
    on_cpu = engine_arguments("m", **PLAIN)
    assert on_cpu["model"] == "m" and on_cpu["dtype"] == "bfloat16"
    assert (on_cpu["max_model_len"], on_cpu["max_num_seqs"]) == (96, 64)
    assert on_cpu["logprobs_mode"] == "processed_logprobs" and on_cpu["generation_config"] == "vllm"
    assert on_cpu["enforce_eager"] and on_cpu["kv_cache_memory_bytes"] == 2**30
    assert on_cpu["distributed_executor_backend"] == "uni" and on_cpu["enable_prefix_caching"]
    assert not on_cpu["enable_sleep_mode"] and "gpu_memory_utilization" not in on_cpu
    on_gpus = engine_arguments(
        "m",
        **PLAIN | {"device": "cuda:0"},
        tensor_parallel_size=4,
        gpu_memory=0.4,
        sleep=True,
        prefix_cache=False,
    )
    assert on_gpus["tensor_parallel_size"] == 4 and on_gpus["distributed_executor_backend"] == "mp"
    assert on_gpus["gpu_memory_utilization"] == 0.4 and on_gpus["enable_sleep_mode"]
    assert not on_gpus["enable_prefix_caching"] and not {"enforce_eager", "kv_cache_memory_bytes"} & on_gpus.keys()
    assert "gpu_memory_utilization" not in engine_arguments("m", **PLAIN | {"device": "cuda"})


def test_what_a_request_asks_for():
    (request,) = tiny_models.make_requests(1)
    asked = sampling_arguments(request, (0, 7), temperature=0.7, max_new_tokens=24)
    assert asked["temperature"] == 0.7 and asked["max_tokens"] == 24 and asked["logprobs"] == 0
    assert asked["stop_token_ids"] == [0, 7] and asked["ignore_eos"] and not asked["detokenize"]
    assert not {"top_p", "top_k", "min_p", "repetition_penalty", "min_tokens"} & asked.keys()  # their defaults are off
    assert sampling_arguments(request, (0,), temperature=1, max_new_tokens=24, begun=9)["max_tokens"] == 15
    for most, tokens in ((4, 4), (15, 15), (16, 15)):
        left = sampling_arguments(request, (0,), temperature=1, max_new_tokens=24, begun=9, most=most)
        assert left["max_tokens"] == tokens and left["seed"] == request_seed(request, 9)


def test_a_seed_is_of_seed_ordinal_and_k_and_of_what_is_there_alone():
    (request,) = tiny_models.make_requests(1)
    other = [replace(request, **{name: 3}) for name in ("seed", "ordinal", "k")]
    seeds = [request_seed(r) for r in (request, *other)] + [request_seed(request, begun=5)]
    assert len({*seeds}) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(request) == request_seed(replace(request, attempt=2, prompt_ids=np.arange(3))) == seeds[0]


class Recorder:
    """Stands for vllm.LLM where only the order of calls counts."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def collective_rpc(self, method: str, args: tuple) -> None:
        self.calls.append(method)
        self.names = [name for name, _ in args[0]]

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return True

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self) -> None:
        self.calls.append("wake")


@pytest.mark.parametrize("sleeps", [False, True])
def test_it_sleeps_once_and_wakes_for_new_weights_which_have_both_tied_names(sleeps):
    llm = Recorder()
    engine = VLLMEngine(
        llm, tiny_models.make_model("llama-tied"), (0,), temperature=1.0, max_new_tokens=8, sleeps=sleeps
    )
    engine.rest()
    engine.rest()
    engine.use_weights()
    loaded = ["load_new_weights", "reset"]
    assert llm.calls == (["sleep 1", "wake", *loaded] if sleeps else loaded)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= {*llm.names}
    assert not [name for name in llm.names if "inv_freq" in name]  # vLLM computes its own
    assert engine.live_tensors().keys() == named_tensors(tiny_models.make_model("llama-tied")).keys()


class Mirrored(TransformersEngine):
    """Its live tensors are a copy, as vLLM's are."""

    def live_tensors(self) -> dict[str, torch.Tensor]:
        if not hasattr(self, "mirror"):
            self.mirror = {name: tensor.clone() for name, tensor in named_tensors(self.model).items()}
        return self.mirror

    @torch.no_grad()
    def use_weights(self) -> None:
        for name, tensor in named_tensors(self.model).items():
            tensor.copy_(self.mirror[name])


def test_a_worker_puts_weights_to_use_between_the_commit_and_the_probe():
    models = [tiny_models.make_model("llama-untied", seed=seed) for seed in (1, 2)]
    old, new = (Mirrored(model, (0,), temperature=1.0, max_new_tokens=4) for model in models)
    probe = Probe(prompt_ids=np.array([[1, 2, 3]]), response_ids=np.array([[4, 5, 6]]))
    want = new.logprobs(probe.prompt_ids, probe.response_ids)
    assert np.abs(old.logprobs(probe.prompt_ids, probe.response_ids) - want).max() > 0.1
    worker = RolloutWorker("w", lambda: old, tiny_models.make_tokenizer, threads=1, deterministic=False)
    manifest, buckets, digests = packed(named_tensors(models[1]), 1)
    ack = worker.take_update(manifest, probe, digests, [None] * len(buckets), *buckets)
    np.testing.assert_array_equal(ack.probe_logprobs, want)


def test_a_response_that_is_whole_is_not_gone_on_with():
    (request,) = tiny_models.make_requests(1)
    with pytest.raises(AssertionError, match="begun with 4"):
        sampling_arguments(request, (0,), temperature=1.0, max_new_tokens=4, begun=4)


# ---------------------------------------------------------------------------------------------- configuration


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.save_model(tmp_path_factory.mktemp("vllm") / "m")


def configured(folder: Path, **overrides: object) -> Config:
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    needed = {"model.path": str(folder), "data.path": "d.jsonl", "rewards.a.fn": "r.py:f", "rollout.engine": "vllm"}
    return load(None, needed | {"data.max_prompt_tokens": 40, "rollout.max_new_tokens": 24} | keys)


def test_the_engine_of_a_worker_is_the_configured_one(folder):
    cfg = configured(folder, rollout__sleep=True, rollout__gpu_memory=0.3, rollout__prefix_cache=False)
    loader = build.engine_loader(cfg, (0, 7), "cuda:0")
    assert isinstance(loader, functools.partial) and loader.func == VLLMEngine.load
    assert loader.args == (str(folder), (0, 7))
    assert loader.keywords == {
        "dtype": "bfloat16",
        "device": "cuda:0",
        "temperature": 1.0,
        "max_new_tokens": 24,
        "max_prompt_tokens": 40,
        "requests": 64,
        "tensor_parallel_size": 1,
        "gpu_memory": 0.3,
        "sleep": True,
        "prefix_cache": False,
    }
    longer = build.engine_loader(configured(folder, data__max_prompt_tokens=4000), (0,), "cpu")
    assert longer.keywords["max_prompt_tokens"] == 256 - 24  # the window of the model has the last word
    assert build.engine_loader(configured(folder, rollout__engine="transformers"), (0,), "cpu").func == (
        TransformersEngine.load
    )


def test_a_worker_gets_the_interpreter_that_it_needs(folder):
    assert build.worker_options(configured(folder), NO_SEATS, 0) == {"num_cpus": 0}
    options = build.worker_options(configured(folder, rollout__python="/opt/v/bin/python"), NO_SEATS, 1)
    house = str(Path(build.__file__).parents[1])
    environment = {"py_executable": "/opt/v/bin/python", "env_vars": {"PYTHONPATH": house}}
    assert options == {"num_cpus": 0, "runtime_env": environment}


def test_an_installed_tokenppo_does_not_bring_the_packages_beside_it(monkeypatch):
    house = Path(build.__file__).parents[1]
    monkeypatch.setattr(interpreter.sysconfig, "get_path", lambda name: str(house))
    assert interpreter.environment("p")["env_vars"] == {"PYTHONPATH": ""}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"rollout__engine": "transformers", "rollout__sleep": True}, ["rollout.sleep = true", "rollout.engine"]),
        ({"rollout__engine": "transformers", "rollout__gpu_memory": 0.5}, ["rollout.gpu_memory = 0.5"]),
        ({"rollout__engine": "transformers", "rollout__prefix_cache": False}, ["rollout.prefix_cache = false"]),
        ({"rollout__engine": "transformers", "rollout__tensor_parallel_size": 2}, ["tensor_parallel_size = 2"]),
        ({"rollout__temperature": 0.001}, ["rollout.temperature = 0.001", "0.01"]),
        ({"rollout__sleep": True, "rollout__max_staleness": 1}, ["rollout.sleep = true", "rollout.max_staleness"]),
        ({"run__deterministic": True}, ["run.deterministic = true", "vLLM"]),
    ],
)
def test_what_cannot_be_is_refused_when_the_configuration_is_read(folder, overrides, words):
    with pytest.raises(UserError) as refused:
        configured(folder, **overrides)
    assert "\n" not in str(refused.value) and all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    ("leaf", "value"), [("sleep", True), ("gpu_memory", 1), ("placement", "apart"), ("gpus_per_worker", 0.5)]
)
def test_what_does_nothing_on_a_cpu_is_refused_there(folder, leaf, value):
    cfg = configured(folder, **{f"rollout__{leaf}": value}, resources__device="cpu")
    with pytest.raises(UserError, match=f"rollout.{leaf} = .*does nothing on a CPU"):
        cluster.device(cfg)


def test_an_interpreter_is_asked_what_it_has(folder, tmp_path):
    def refusal(python: str | None, **more: object) -> str:
        with pytest.raises(UserError) as refused:
            interpreter.refuse(configured(folder, rollout__python=python, **more), None)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    absent = refusal(str(tmp_path / "absent"))
    assert "there is no such interpreter" in absent and "launch/vllm_venv.sh" in absent
    assert "there is no such interpreter" in refusal(str(tmp_path))
    odd = tmp_path / "odd"
    odd.write_text("#!/bin/sh\necho hello\n")
    odd.chmod(0o755)
    assert "does not answer as a Python does" in refusal(str(odd))
    other = tmp_path / "other"
    found = '{"numpy": true, "vllm": true, "rollout": false}'
    other.write_text(f'#!/bin/sh\necho \'{{"found": {found}, "ray": "1.0", "python": "3.9.1"}}\'\n')
    other.chmod(0o755)
    assert "has no tokenppo" in refusal(str(other))
    other.write_text(other.read_text().replace("false", "true"))
    assert "has Ray 1.0 and the learner" in refusal(str(other))
    interpreter.refuse(configured(folder, rollout__engine="transformers"), None)
    interpreter.refuse(configured(folder, rollout__engine="transformers", rollout__python=sys.executable), None)
    # Elsewhere may be what is not here.
    elsewhere = configured(folder, rollout__python=str(tmp_path / "absent"), resources__ray_address="far:1")
    interpreter.refuse(elsewhere, None)


def test_vllm_that_is_not_there_is_named(folder, monkeypatch):
    monkeypatch.setattr(interpreter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="rollout.engine = vllm: .*bash launch/vllm_venv.sh"):
        interpreter.refuse(configured(folder), None)


@pytest.mark.parametrize(
    ("model", "width"),
    [({"head_dim": 24}, 24), ({"hidden_size": 40, "num_attention_heads": 5}, 8), ({"n_embd": 90, "n_head": 3}, 30)],
)
def test_heads_that_vllm_has_no_attention_for_on_a_cpu_are_refused(folder, model, width):
    cfg = configured(folder, resources__device="cpu", resources__ray_address="far:1")
    with pytest.raises(UserError, match=f"are {width} wide; take rollout.engine transformers"):
        interpreter.refuse(cfg, model)
    interpreter.refuse(cfg, {"hidden_size": 4096, "num_attention_heads": 32})
    interpreter.refuse(cfg, {"model_type": "odd"})  # not known: vLLM has the last word
