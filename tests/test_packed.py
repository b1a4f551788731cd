"""Packed layers: the same numbers as the layers', of the weights that are in use, and only while the engine decodes."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

import tiny_models
from rollout.engines.packed import PackedLinears
from rollout.engines.transformers_engine import TransformersEngine

SIZES = {
    "vocab_size": 640,
    "hidden_size": 128,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def wide_model(seed: int, kind: type = LlamaConfig) -> nn.Module:
    """Its MLP and head are worth packing, its attention is not. Llama's forward is ours, others are transformers'."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(kind(**SIZES), dtype=torch.float32).eval()


def worst_error(served: TransformersEngine, model: nn.Module) -> float:
    """Of the log-probs that the engine tells, against a plain forward of `model`."""
    asked = tiny_models.make_requests(6)
    worst = 0.0
    for request, got in zip(asked, served.generate(asked), strict=True):
        assert len(got.response_ids) > 1  # the first token comes of the pass over the prompts
        ids = torch.from_numpy(np.concatenate([request.prompt_ids, got.response_ids]))[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1].double()
        want = logits.log_softmax(-1).gather(-1, torch.from_numpy(got.response_ids)[:, None])[:, 0]
        worst = max(worst, float((want - torch.from_numpy(got.logprobs)).abs().max()))
    return worst


@pytest.mark.parametrize(("kind", "compiled"), [(LlamaConfig, True), (LlamaConfig, False), (GPTNeoXConfig, False)])
def test_new_weights_are_packed_anew(kind, compiled):
    first, second = wide_model(0, kind), wide_model(1, kind)
    served = TransformersEngine(wide_model(0, kind), (0,), temperature=1.0, max_new_tokens=12, compiled=compiled)
    assert served.in_slots and (served._decoder is not None) == (kind is LlamaConfig)
    assert worst_error(served, first) < 1e-5
    live = served.live_tensors()
    for name, tensor in second.state_dict().items():
        live[name].data = tensor.clone()
    assert worst_error(served, second) > 0.1  # or what follows shows nothing
    served.use_weights()
    assert worst_error(served, second) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_computes_what_the_layer_does(dtype, bias):
    torch.manual_seed(0)
    layer = nn.Linear(384, 512, bias=bias, dtype=dtype)
    packed, xs = PackedLinears(nn.Sequential(layer)), [torch.randn(n, 1, 384, dtype=dtype) for n in (1, 2, 63)]
    with torch.inference_mode():
        want = [layer(x) for x in xs]
        plain = layer.forward
        with packed.in_use():
            assert layer.forward != plain
            got = [layer(x) for x in xs]
        assert layer.forward == plain
    for x, y in zip(want, got, strict=True):
        assert y.shape == x.shape and y.dtype == dtype
        np.testing.assert_allclose(y.float(), x.float(), atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_what_is_not_worth_it_or_not_plain_stays():
    class Own(nn.Linear):
        pass

    small, own, big = nn.Linear(128, 128), Own(512, 512), nn.Linear(512, 512)
    with PackedLinears(nn.Sequential(small, own, big)).in_use():
        assert "forward" in vars(big)
        assert "forward" not in vars(small) and "forward" not in vars(own)


def test_the_layer_is_itself_again_when_a_forward_fails():
    layer = nn.Linear(512, 512)
    with pytest.raises(KeyError), PackedLinears(nn.Sequential(layer)).in_use():
        raise KeyError
    assert "forward" not in vars(layer)
