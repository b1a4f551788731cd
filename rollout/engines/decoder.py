"""One more token of every slot through a decoder of Llama's shape: the model's own numbers in half of its calls.

A decode step of a small model is mostly calls of small operations. Here queries, keys and values are one product, gate
and up another, a norm is one call and a rotation three. Only for classes whose forward is known to be this one; the
engine compares it with the model's own when it is loaded, and leaves it where they differ.

Legend: B slots in use, H query heads, G key-value heads, D head width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rollout.engines.packed import Product

KNOWN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class Step(Protocol):
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [B, H, 1, D], key and value [B, G, 1, D] -> [B, H, 1, D]."""


@dataclass(frozen=True)
class _Layer:
    block: nn.Module  # of transformers
    qkv: Product
    o: Product
    gate_up: Product
    down: Product


class Decoder:
    def __init__(self, model: nn.Module, value_head: nn.Linear | None = None) -> None:
        """Asserts nothing about `model`: ask `fits` first. `value_head`: reads the states that `model`'s head reads."""
        self._model, self._head, self._value_head = model.model, Product(model.lm_head), value_head
        self._layers = [
            _Layer(
                block,
                Product(block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
                Product(block.self_attn.o_proj),
                Product(block.mlp.gate_proj, block.mlp.up_proj),
                Product(block.mlp.down_proj),
            )
            for block in self._model.layers
        ]

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Whether it is exactly one of the known classes, with plain layers."""
        kind = type(model)
        if kind.__name__ not in KNOWN or not kind.__module__.startswith("transformers.models."):
            return False
        linear = [m for name, m in model.named_modules() if name.endswith(("_proj", "lm_head"))]
        return all(type(m) is nn.Linear for m in linear)

    def drop(self) -> None:
        """The weights are others now."""
        for product in (self._head, *(p for x in self._layers for p in (x.qkv, x.o, x.gate_up, x.down))):
            product.drop()

    def step(self, token: Tensor, place: Tensor, step: Step) -> tuple[Tensor, Tensor | None]:
        """Logits [B, V] behind `token` [B], which stands at `place` [B], and the values [B] of these states."""
        x = F.embedding(token, self._model.embed_tokens.weight)
        cos, sin = self._model.rotary_emb(x, position_ids=place[:, None])  # [B, 1, D]
        half = sin.shape[-1] // 2
        turned = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        for number, layer in enumerate(self._layers):
            x = x + self._attention(number, layer, _normed(layer.block.input_layernorm, x), cos, turned, step)
            up = layer.gate_up(_normed(layer.block.post_attention_layernorm, x))
            gate, up = up.chunk(2, dim=-1)
            x = x + layer.down(layer.block.mlp.act_fn(gate).mul_(up))
        x = _normed(self._model.norm, x)
        return self._head(x), None if self._value_head is None else values_of(self._value_head, x)

    @staticmethod
    def _attention(number: int, layer: _Layer, x: Tensor, cos: Tensor, turned: Tensor, step: Step) -> Tensor:
        attention = layer.block.self_attn
        width = attention.head_dim
        heads = layer.qkv(x).view(len(x), -1, width)  # [B, H + 2 G, D]
        kv_heads = attention.k_proj.out_features // width
        n_turned = heads.shape[1] - kv_heads
        query_key, value = heads[:, :n_turned], heads[:, n_turned:]
        if hasattr(attention, "q_norm"):
            query, key = query_key.split([n_turned - kv_heads, kv_heads], dim=1)
            query_key = torch.cat([_normed(attention.q_norm, query), _normed(attention.k_norm, key)], dim=1)
        # x cos + (-x2, x1) sin, with the sign at the sine.
        query_key = torch.addcmul(query_key * cos, query_key.roll(width // 2, -1), turned)
        query, key = query_key[:, : n_turned - kv_heads], query_key[:, n_turned - kv_heads :]
        out = step.attend(number, query[:, :, None], key[:, :, None], value[:, :, None], attention.scaling)
        return layer.o(out.reshape(len(x), -1))


def rotations_are_fixed(model: nn.Module) -> bool:
    """Whether a place is turned in one way only. Some rotations ask how far the furthest token is."""
    kind = str(getattr(model.model.rotary_emb, "rope_type", ""))
    return "dynamic" not in kind and kind != "longrope"


def values_of(head: nn.Linear, states: Tensor) -> Tensor:
    """[...] of states [..., H], in the dtype of the head."""
    return F.linear(states.to(head.weight.dtype), head.weight, head.bias).squeeze(-1)


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """Of narrow numbers the module's own way, which rounds in between."""
    if x.dtype != torch.float32:
        return norm(x)
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
