"""The embedded engine on a GPU: recorded steps, and the log-probs of a plain forward. Skipped where there is no CUDA.

python -m pytest tests/gpu        # needs torch, transformers, numpy; no Ray
"""

import numpy as np
import pytest
import torch

import tiny_models
from rollout.engines.transformers_engine import TransformersEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def engine(name: str, dtype: torch.dtype, seed: int = 0, **more: object) -> TransformersEngine:
    model = tiny_models.make_model(name, seed=seed).to("cuda", dtype)
    return TransformersEngine(model, (0, 7), temperature=1.0, max_new_tokens=64, slots=8, **more)


def worst_error(served: TransformersEngine, n: int = 24) -> float:
    """Of the log-probs that the engine tells, against one plain forward of each response."""
    asked, worst = tiny_models.make_requests(n), 0.0
    for request, got in zip(asked, served.generate(asked), strict=True):
        ids = torch.from_numpy(np.concatenate([request.prompt_ids, got.response_ids]))[None].cuda()
        with torch.no_grad():
            logits = served.model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1].double()
        want = logits.log_softmax(-1).cpu().gather(-1, torch.from_numpy(got.response_ids)[:, None])[:, 0]
        worst = max(worst, float((want - torch.from_numpy(got.logprobs)).abs().max()))
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "qwen2-tied", "qwen3-untied"])
def test_steps_are_recorded_and_right(name, dtype):
    served = engine(name, dtype)
    assert served.in_slots and served._graphs is not None
    for room in (0, 1):  # the first one was made when the model was loaded, for other memory
        served._room = None if room else served._room
        assert worst_error(served) < (1e-4 if dtype == torch.float32 else 0.5)
        assert len(served._graphs._steps) > 2 and served._graphs.given_up is None


def test_recorded_steps_give_the_ids_of_launched_ones():
    recorded, launched = engine("llama-tied", torch.float32), engine("llama-tied", torch.float32)
    launched._graphs = None
    asked = tiny_models.make_requests(24)
    for a, b in zip(recorded.generate(asked), launched.generate(asked), strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_values_of_recorded_steps_are_those_of_a_plain_forward(name):
    """With a head that was written after the steps of the loading were recorded, in place as a sync does it."""
    served = engine(name, torch.float32, values=True)
    weight = torch.linspace(-1, 1, 32, device="cuda")
    with torch.no_grad():
        served.live_tensors()["value_head.weight"].copy_(weight[None])
    asked, n_cut = tiny_models.make_requests(24), 0
    for request, got in zip(asked, served.generate(asked), strict=True):
        ids = torch.from_numpy(np.concatenate([request.prompt_ids, got.response_ids]))[None].cuda()
        with torch.no_grad():
            states = served.model.base_model(input_ids=ids).last_hidden_state[0, len(request.prompt_ids) - 1 :]
        want = (states @ weight).cpu().numpy()
        np.testing.assert_allclose(got.values, want[:-1], atol=1e-3)
        n_cut += got.bootstrap is not None
        assert got.bootstrap is None or got.bootstrap == pytest.approx(float(want[-1]), abs=1e-3)
    assert n_cut


def test_weights_that_are_written_in_place_are_used():
    served = engine("llama-tied", torch.float32)
    worst_error(served)
    with torch.no_grad():
        for name, tensor in tiny_models.make_model("llama-tied", seed=1).named_parameters():
            served.live_tensors()[name].copy_(tensor)
    served.use_weights()
    assert worst_error(served) < 1e-4


def test_other_models_are_launched():
    served = engine("gpt2", torch.float32)
    assert served.in_slots and served._graphs is None
    assert worst_error(served) < 1e-4
