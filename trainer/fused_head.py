"""Log-probs, entropies and the gradient of a loss over tokens, without ever holding [tokens, vocabulary].

Legend: M tokens, H hidden width, V vocabulary, c tokens of one chunk. z = (states @ weight^T + bias) / temperature,
p = softmax(z), logp its log, a the sampled token, E = -sum p logp the entropy. Where tokens were drawn from kept ids
alone, z of the others is LEFT_OUT: then p and with it d z below are exactly 0 there.

The loss of a token depends on the logits through its log-prob l and its entropy E alone. With g = d loss / d l and
h = d loss / d E, both [c] and found by autograd on those two small vectors,

    d loss / d z_j = g (1[j = a] - p_j) - h p_j (logp_j + E)                d logits = d z / temperature

so each chunk is done in the forward pass: three products (z, d states, d weight), and the buffer of z becomes that of
d z. Computing logits again in the backward pass, as chunked losses elsewhere do, takes a fourth.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from core.logprobs import LEFT_OUT, log_softmax
from trainer.kept import KeptSets
from trainer.objective import add_up

# Log-probs [c], entropies [c] or None, which of the M tokens they are -> the loss (a sum over them), sums for the log.
TokenLoss = Callable[[Tensor, Tensor | None, slice], tuple[Tensor, dict[str, Tensor]]]

_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}  # of one buffer of logits: the last cache of a CPU, a wave of a GPU


def chunk_size(n_vocab: int, device: torch.device) -> int:
    """Tokens per chunk: a buffer of float32 logits of the size that suits the device, at least 16 tokens."""
    return max(16, _CHUNK_BYTES.get(device.type, 64 << 20) // (4 * n_vocab))


def score(
    layer: nn.Module, states: Tensor, token: Tensor, temperature: float, kept: KeptSets | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of tokens under the output layer of a causal LM. No gradient.

    Args:
        layer: has `weight` [V, H] and `bias` [V] or None.
        states: [M, H], what the layer would read before each token.
        token: [M] int64.
        kept: of the M tokens; None: all ids.
    Returns:
        [M] and [M] in nats, float32 or wider.
    """
    with torch.no_grad():
        weight = layer.weight.to(states.dtype)
        bias = None if layer.bias is None else layer.bias.to(states.dtype)
        wide = _wide(states.dtype)
        logprobs, entropies = (torch.empty(len(states), dtype=wide, device=states.device) for _ in range(2))
        size = chunk_size(len(weight), states.device)
        for start in range(0, len(states), size):
            at = slice(start, start + size)
            logp = _log_softmax(states[at], weight, bias, temperature, _left_out(kept, at, len(weight)))
            logprobs[at], entropies[at] = logp.gather(1, token[at, None]).squeeze(1), _entropy(logp)
    return logprobs, entropies


def loss_of_tokens(
    layer: nn.Module,
    states: Tensor,
    token: Tensor,
    temperature: float,
    token_loss: TokenLoss,
    *,
    with_entropy: bool,
    kept: KeptSets | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of `token_loss` over all chunks, differentiable in `states` and the layer; and the sums of its log.

    `token_loss` must be additive: what it says of two chunks together is what it says of each, added
    (`objective.add_up`). It is asked of an empty chunk where there is no token. The other arguments as in `score`.
    """
    parts: list[dict[str, Tensor]] = []
    how = (token, temperature, token_loss, with_entropy, kept, parts)
    loss = _ChunkedLoss.apply(states, layer.weight, layer.bias, *how)
    return loss, add_up(parts)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, token, temperature, token_loss, with_entropy, kept, parts):  # noqa: ANN001, ANN205
        weight_c, bias_c = weight.to(states.dtype), None if bias is None else bias.to(states.dtype)
        for_states, for_weight, for_bias = ctx.needs_input_grad[:3]
        d_states = torch.empty_like(states) if for_states else None
        d_weight = torch.zeros_like(weight) if for_weight else None
        d_bias = torch.zeros_like(bias) if for_bias else None
        total = torch.zeros((), dtype=_wide(states.dtype), device=states.device)
        size = chunk_size(len(weight), states.device)
        for start in range(0, max(1, len(states)), size):
            at = slice(start, min(start + size, len(states)))
            logp = _log_softmax(states[at], weight_c, bias_c, temperature, _left_out(kept, at, len(weight)))
            ids = token[at, None]
            l = logp.gather(1, ids).squeeze(1).requires_grad_()  # noqa: E741
            e = _entropy(logp).requires_grad_() if with_entropy else None
            with torch.enable_grad():
                loss, of_chunk = token_loss(l, e, at)
                wanted = [l] if e is None else [l, e]
                g, *h = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
            total += loss.detach()
            parts.append({name: value.detach() for name, value in of_chunk.items()})
            if not (for_states or for_weight or for_bias):
                continue
            d_logits = _d_logits(logp, e, ids, g, h[0] if h else None, temperature).to(states.dtype)
            if d_states is not None:
                torch.mm(d_logits, weight_c, out=d_states[at])
            if d_weight is not None and d_weight.dtype == d_logits.dtype:
                d_weight.addmm_(d_logits.T, states[at])
            elif d_weight is not None:
                d_weight.add_(d_logits.T @ states[at])
            if d_bias is not None:
                d_bias.add_(d_logits.sum(0))
        ctx.grads = (d_states, d_weight, d_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):  # noqa: ANN001, ANN205
        grads, ctx.grads = ctx.grads, None  # autograd may then keep these very buffers as .grad
        return (*(None if x is None else x.mul_(upstream.to(x.dtype)) for x in grads), *(None,) * 6)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _left_out(kept: KeptSets | None, at: slice, n_vocab: int) -> Tensor | None:
    """[c, V] bool."""
    return None if kept is None else kept.keep(at, n_vocab).logical_not_()


def _log_softmax(
    states: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, left_out: Tensor | None
) -> Tensor:
    """[c, V], float32 or wider. The product is rounded to the dtype of the states, as the LM rounds its logits."""
    logits = torch.nn.functional.linear(states, weight, bias).to(_wide(states.dtype))
    heated = logits / temperature if temperature != 1.0 else logits
    return log_softmax(heated if left_out is None else heated.masked_fill_(left_out, LEFT_OUT))


def _entropy(logp: Tensor) -> Tensor:
    """[c, V] -> [c] nats."""
    return -(logp.exp() * logp).sum(-1)


def _d_logits(logp: Tensor, e: Tensor | None, ids: Tensor, g: Tensor, h: Tensor | None, temperature: float) -> Tensor:
    """d loss / d logits, [c, V]; `logp` is used up."""
    p = logp.exp()
    d = p.mul_(-g[:, None]) if h is None else p.mul_(logp.add_(e[:, None]).mul_(-h[:, None]).sub_(g[:, None]))
    d.scatter_add_(1, ids, g[:, None].to(d.dtype))
    return d.div_(temperature) if temperature != 1.0 else d
