"""The decoder of Llama's shape: transformers' own logits, in every variant that it takes, and none that it does not."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaForCausalLM

import tiny_models
from rollout.engines.compiled import CompiledSteps
from rollout.engines.decoder import Decoder
from rollout.engines.transformers_engine import TransformersEngine

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
# Wide enough that most products are packed; the head and the products of queries, keys and values are not.
SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS = {
    "llama": LlamaConfig(**SIZES),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama, other heads": LlamaConfig(**SIZES, head_dim=48, hidden_act="gelu"),
    "llama, scaled rotations": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "mistral without a window": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}


def make(config: object, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases that are ones and zeros would hide where they are left out
                parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in name else 0.5))
    return model


def engine(model: nn.Module, **more: object) -> TransformersEngine:
    return TransformersEngine(model, (0,), **{"temperature": 1.0, "max_new_tokens": 24} | more)


def worst_error(served: TransformersEngine) -> tuple[float, int]:
    """Of the log-probs of what the engine writes, against one plain forward of each response; and their number."""
    asked, worst, seen = tiny_models.make_requests(12), 0.0, 0
    for request, got in zip(asked, served.generate(asked), strict=True):
        ids = torch.from_numpy(np.concatenate([request.prompt_ids, got.response_ids]))[None]
        with torch.no_grad():
            logits = served.model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1].double()
        want = logits.log_softmax(-1).gather(-1, torch.from_numpy(got.response_ids)[:, None])[:, 0]
        worst = max(worst, float((want - torch.from_numpy(got.logprobs)).abs().max()))
        seen += len(got.response_ids)
    return worst, seen


@pytest.mark.parametrize(
    ("dtype", "compiled"),
    [pytest.param(torch.float32, True, marks=needs_compiler), (torch.float32, False), (torch.bfloat16, False)],
    ids=["float32, compiled", "float32", "bfloat16"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_model_does(kind, dtype, compiled):
    served = engine(make(KINDS[kind], dtype), compiled=compiled)
    assert served.in_slots and served._decoder is not None
    assert (served._compiled is not None) == (compiled and kind != "llama, other heads"), served.not_compiled
    worst, seen = worst_error(served)
    assert seen > 60
    assert worst < (1e-5 if dtype == torch.float32 else 0.3), worst  # bfloat16 has 3 digits, logits here are up to 20


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_any_number_of_rows_gives_the_same_ids(slots, compiled):
    """One row is multiplied in another way than several, and the number of rows falls as responses end."""
    model = make(KINDS["qwen3"])
    asked = tiny_models.make_requests(12)
    want = [g.response_ids.tolist() for g in engine(model, compiled=False).generate(asked)]
    served = engine(model, slots=slots, compiled=compiled)
    assert (served._compiled is not None) == compiled
    assert [g.response_ids.tolist() for g in served.generate(asked)] == want


def derived(name: str, module: str) -> nn.Module:
    """Whoever derives a class may compute something else."""
    return type(name, (LlamaForCausalLM,), {"__module__": module})(KINDS["llama"])


def test_what_is_not_exactly_known_is_left_to_its_own_forward():
    assert Decoder.fits(make(KINDS["llama"]))
    assert not Decoder.fits(derived("OtherForCausalLM", LlamaForCausalLM.__module__))
    assert not Decoder.fits(derived("LlamaForCausalLM", "transformers_modules.remote"))
    assert not Decoder.fits(tiny_models.make_model("gpt2"))
    wrapped = make(KINDS["llama"])
    wrapped.model.layers[1].mlp.up_proj = nn.Sequential(wrapped.model.layers[1].mlp.up_proj)  # as an adapter does
    assert not Decoder.fits(wrapped)


def test_a_window_is_no_business_of_slots():
    served = engine(make(MistralConfig(**SIZES, sliding_window=8)))
    assert not served.in_slots and served._decoder is None
    assert worst_error(served)[0] < 1e-5


def test_a_class_that_is_made_otherwise_writes_by_its_own_forward():
    """A norm of another transformers, whose epsilon has another name."""

    class Norm(nn.Module):
        def __init__(self, of: nn.Module) -> None:
            super().__init__()
            self.weight, self.eps = of.weight, of.variance_epsilon

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)

    model = make(KINDS["llama"])
    model.model.norm = Norm(model.model.norm)
    served = engine(model)
    assert served.in_slots and served._decoder is None and served.own_forward
    assert worst_error(served)[0] < 1e-5


def test_a_forward_that_differs_is_found_when_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    """Another transformers may compute a known class otherwise."""
    folder = str(tiny_models.save_model(tmp_path / "m"))
    for steps in (Decoder, CompiledSteps):
        monkeypatch.setattr(steps, "step", lambda self, *args, plain=steps.step: (plain(self, *args)[0] * 1.01, None))
    options = {"dtype": "float32", "device": "cpu", "temperature": 1.0, "max_new_tokens": 24}
    served = TransformersEngine.load(folder, (0,), **options)
    assert served.in_slots and served._decoder is None
    assert "LlamaForCausalLM of this transformers is not what decoder.py computes" in capsys.readouterr().out
    assert worst_error(served)[0] < 1e-5
