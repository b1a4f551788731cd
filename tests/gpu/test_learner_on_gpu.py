"""The learner on a GPU against itself on the CPU: the same code, other kernels. Skipped where there is no CUDA device.

python -m pytest tests/gpu        # needs torch, transformers, accelerate, pydantic; no Ray, no DeepSpeed
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import tiny_models
from core.config import load
from policy_reading import policy_of, read
from rollout.engines.transformers_engine import TransformersEngine
from trainer import packing
from trainer.batch import TrainBatch
from trainer.fused_head import loss_of_tokens
from trainer.learner import Learner
from trainer.loop import credit
from trainer.packing import Segments, attend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
SPANS = np.array([(0, 40, 0, 0), (40, 17, 0, 40), (57, 64, 0, 40), (121, 30, 0, 0), (151, 1, 121, 30), (152, 77, 0, 0)])


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_the_kernel_for_segments_computes_what_plain_attention_does(kv_heads):
    """bf16 varlen attention, forward and backward, against the grouped path in float64 on the same numbers."""
    assert packing._varlen_attn is not None
    torch.manual_seed(0)
    n = int(SPANS[-1, 0] + SPANS[-1, 1])
    whole = [torch.randn(1, h, n, 64, dtype=torch.bfloat16) for h in (8, kv_heads, kv_heads)]
    g = torch.randn(1, n, 8, 64, dtype=torch.bfloat16)
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        q, k, v = (x.to(device, dtype).requires_grad_() for x in whole)
        out, _ = attend(None, q, k, v, None, segments=Segments(SPANS, torch.device(device)), scaling=0.125)
        grads = torch.autograd.grad(out, (q, k, v), g.to(device, dtype))
        results.append([x.detach().cpu().double() for x in (out, *grads)])
    for name, ours, exact in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert (ours - exact).abs().max() < 0.03 * exact.abs().max(), name


def test_the_fused_head_on_both_devices():
    torch.manual_seed(0)
    layer = torch.nn.Linear(32, 500, bias=False)
    states, token, weights = torch.randn(70, 32), torch.randint(0, 500, (70,)), torch.randn(70)
    results = []
    for device in ("cuda", "cpu"):
        moved = torch.nn.Linear(32, 500, bias=False).to(device)
        moved.load_state_dict(layer.state_dict())
        x, w = states.to(device).requires_grad_(), weights.to(device)
        loss, _ = loss_of_tokens(
            moved,
            x,
            token.to(device),
            0.9,
            lambda lp, e, at, w=w: ((lp * w[at]).sum() - 0.3 * e.sum(), {}),
            with_entropy=True,
        )
        loss.backward()
        results.append([y.detach().cpu() for y in (loss, x.grad, moved.weight.grad)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", tiny_models.configs())
def test_every_shape_of_model_reads_alike_on_both_devices(name):
    engine = TransformersEngine(tiny_models.make_model(name), tuple(range(30)), temperature=1.0, max_new_tokens=16)
    batch = TrainBatch.collate(tiny_models.roll_out(engine, 12))
    here = read(policy_of(tiny_models.make_model(name)), batch, 0.8)
    there = read(policy_of(tiny_models.make_model(name).cuda()), batch, 0.8, device="cuda")
    torch.testing.assert_close(there.logprobs, here.logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(there.entropy, here.entropy, atol=1e-3, rtol=0)


def updated(device: str, dtype: str) -> tuple[Learner, dict[str, float]]:
    settings = {
        "rollout.batch_size": 12,
        "ppo.mini_batch_size": 6,
        "ppo.micro_batch_size": 4,
        "ppo.ppo_epochs": 2,
        "optim.lr": 1e-3,
        "model.dtype": dtype,
        "ppo.entropy_coef": 0.01,
    }
    cfg = load(None, tiny_models.LEARNER_SETTINGS | settings, folder=Path("/nowhere"))
    model = tiny_models.make_model("qwen2-tied").to(device, getattr(torch, dtype))
    engine = TransformersEngine(model, tuple(range(30)), temperature=1.0, max_new_tokens=16)
    batch = TrainBatch.collate(tiny_models.roll_out(engine, 12))
    AcceleratorState._reset_state(reset_partial_state=True)  # of the other device
    it = Learner(
        cfg,
        Accelerator(cpu=device == "cpu"),
        tiny_models.make_model("qwen2-tied").to(device),
        tiny_models.make_model("qwen2-tied").to(device),
    )
    batch, means = it.annotate(batch)
    batch = credit(cfg, batch.fill(token_rewards=batch.component_rewards["a"].float()), 0.02, it.ranks.sum)
    return it, means | it.update(batch)


def test_an_update_in_fp32_is_the_same_on_both_devices():
    of_gpu, of_cpu = (updated(device, "float32")[1] for device in ("cuda", "cpu"))
    for name in ("loss/policy", "loss/value", "objective/entropy", "optim/grad_norm"):
        assert of_gpu[name] == pytest.approx(of_cpu[name], rel=1e-2, abs=1e-4), name
    assert of_gpu["logprob_diff/max"] < 1e-4


def test_an_update_in_bf16_passes_every_check():
    """The checks that raise are on: rollout and learner agree, the first ratio is 1, the reference is the policy."""
    it, means = updated("cuda", "bfloat16")
    assert means["ppo/epochs"] == 2 and all(p.dtype == torch.float32 for p in it.policy.parameters())
    assert means["logprob_diff/mean"] < 0.02


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """Peak of one loss step above its inputs, at 4,096 tokens: [tokens, V] in float32 would be 0.8 GB at V = 50,000."""
    peaks = {}
    for vocabulary in (8_192, 50_176):
        layer = torch.nn.Linear(64, vocabulary, bias=False).cuda()
        states, token = (
            torch.randn(4096, 64, device="cuda", requires_grad=True),
            torch.zeros(4096, device="cuda").long(),
        )
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, _ = loss_of_tokens(layer, states, token, 1.0, lambda lp, e, at: (lp.sum(), {}), with_entropy=False)
        loss.backward()
        peaks[vocabulary] = (torch.cuda.max_memory_allocated() - before) / 2**20
        del layer, states, token, loss
    chunk = 3 * 512  # three buffers of a chunk, MiB
    assert peaks[50_176] < chunk + 64, peaks
