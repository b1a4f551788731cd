"""The fused head against autograd through whole logits, and by hand; memory that does not grow with the vocabulary."""

import math

import pytest
import torch

from trainer import fused_head
from trainer.fused_head import loss_of_tokens, score
from trainer.objective import RATIO_ERROR

M, H, V = 37, 8, 23


def layer_and_states(dtype=torch.float64, bias=True) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(H, V, bias=bias, dtype=dtype)
    return layer, torch.randn(M, H, dtype=dtype, requires_grad=True), torch.randint(0, V, (M,))


def token_loss(old, weights, entropy_coef):
    """A loss with a clip, so that its derivative differs from token to token and is 0 for some."""

    def loss(logprobs, entropy, at):
        ratio = (logprobs - old[at]).exp()
        total = torch.maximum(-weights[at] * ratio, -weights[at] * ratio.clamp(0.8, 1.2)).sum()
        if entropy is not None:
            total = total - entropy_coef * (entropy * (1 + weights[at] ** 2)).sum()
        return total, {"n": torch.tensor(float(len(logprobs))), RATIO_ERROR: ratio.max() if len(ratio) else ratio.sum()}

    return loss


def whole(layer, states, token, temperature, loss, with_entropy):
    """The same through [M, V] logits and autograd."""
    logp = (layer(states) / temperature).log_softmax(-1)
    picked = logp[torch.arange(len(token)), token]
    return loss(picked, -(logp.exp() * logp).sum(-1) if with_entropy else None, slice(None))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("chunk", [1, 5, 37, 100])
def test_loss_and_gradients_are_those_of_autograd(monkeypatch, chunk, temperature, with_entropy, bias):
    monkeypatch.setattr(fused_head, "chunk_size", lambda n_vocab, device: chunk)
    layer, states, token = layer_and_states(bias=bias)
    old = -3 + 0.2 * torch.randn(M, dtype=torch.float64)
    loss = token_loss(old, torch.randn(M, dtype=torch.float64), 0.3)
    leaves = [states, *layer.parameters()]
    want, sums_wanted = whole(layer, states, token, temperature, loss, with_entropy)
    wanted = torch.autograd.grad(2.5 * want, leaves)
    got, sums = loss_of_tokens(layer, states, token, temperature, loss, with_entropy=with_entropy)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert sums["n"] == M and sums[RATIO_ERROR] == pytest.approx(float(sums_wanted[RATIO_ERROR].detach()), abs=1e-12)
    for a, b in zip(torch.autograd.grad(2.5 * got, leaves), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_one_token_of_two_by_hand():
    """Logits 0 and ln 3: p = 1/4, 3/4. For the loss -log p(1): d z = p - onehot = (1/4, -1/4)."""
    layer = torch.nn.Linear(1, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64))
    states = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    loss, _ = loss_of_tokens(
        layer, states, torch.tensor([1]), 1.0, lambda lp, e, at: (-lp.sum(), {}), with_entropy=False
    )
    assert float(loss.detach()) == pytest.approx(math.log(4 / 3), abs=1e-12)
    loss.backward()
    assert layer.weight.grad[:, 0].tolist() == pytest.approx([0.25, -0.25], abs=1e-12)
    assert float(states.grad) == pytest.approx(-0.25 * math.log(3), abs=1e-12)
    logprobs, entropy = score(layer, states, torch.tensor([0]), 1.0)
    assert float(logprobs) == pytest.approx(math.log(1 / 4), abs=1e-12)
    assert float(entropy) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), abs=1e-12)


def test_no_token_at_all_gives_gradients_of_zero():
    """What an idle rank passes: every parameter must still get a gradient, or DDP waits for it."""
    layer, states, _ = layer_and_states()
    none = states[:0]
    loss, sums = loss_of_tokens(
        layer, none, torch.zeros(0, dtype=torch.long), 1.0, token_loss(none[:, 0], none[:, 0], 0.0), with_entropy=True
    )
    loss.backward()
    assert float(loss.detach()) == 0 and sums["n"] == 0 and not layer.weight.grad.any() and not states.grad.any()


def test_a_frozen_layer_gets_no_gradient_and_costs_none():
    layer, states, token = layer_and_states()
    layer.requires_grad_(False)
    loss, _ = loss_of_tokens(layer, states, token, 1.0, lambda lp, e, at: (lp.sum(), {}), with_entropy=False)
    loss.backward()
    assert layer.weight.grad is None and states.grad.any()


@pytest.mark.parametrize("vocabulary", [100, 50_000])
def test_a_chunk_of_logits_has_one_size_whatever_the_vocabulary(vocabulary):
    tokens = fused_head.chunk_size(vocabulary, torch.device("cpu"))
    assert tokens * vocabulary * 4 <= 17 << 20 and tokens >= 16


@pytest.mark.parametrize("chunk", [5, 36, 37])
def test_scores_are_those_of_whole_logits_whatever_the_chunk(monkeypatch, chunk):
    monkeypatch.setattr(fused_head, "chunk_size", lambda n_vocab, device: chunk)
    layer, states, token = layer_and_states()
    logp = (layer(states) / 0.7).log_softmax(-1).detach()
    logprobs, entropy = score(layer, states, token, 0.7)
    torch.testing.assert_close(logprobs, logp[torch.arange(M), token], atol=1e-12, rtol=0)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1), atol=1e-12, rtol=0)


def test_states_in_bfloat16_and_weights_in_float32_as_under_autocast(monkeypatch):
    """Gradients are those of float32 to the eight bits of the states, over all chunks."""
    monkeypatch.setattr(fused_head, "chunk_size", lambda n_vocab, device: 5)
    layer, states, token = layer_and_states(torch.float32)
    rough = states.detach().bfloat16().requires_grad_()
    loss = token_loss(torch.full((M,), -3.0), torch.linspace(-1, 1, M), 0.3)
    wanted = torch.autograd.grad(whole(layer, states, token, 0.7, loss, True)[0], [states, *layer.parameters()])
    got, _ = loss_of_tokens(layer, rough, token, 0.7, loss, with_entropy=True)
    assert got.dtype == torch.float32
    for a, b in zip(torch.autograd.grad(got, [rough, *layer.parameters()]), wanted, strict=True):
        assert float((a.float() - b).abs().max()) < 0.05 * float(b.abs().max())


def test_many_ids_cost_no_digit():
    torch.manual_seed(0)
    layer, states, token = torch.nn.Linear(4, 152_000), 8 * torch.randn(20, 4), torch.arange(20) * 7000
    logprobs, _ = score(layer, states, token, 0.9)
    exact = (layer.double()(states.double()) / 0.9).log_softmax(-1)[torch.arange(20), token]
    torch.testing.assert_close(logprobs.double(), exact, atol=5e-6, rtol=0)
