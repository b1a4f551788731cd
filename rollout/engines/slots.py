"""Keys and values of responses that are being written, and attention over them.

Legend: S slots, B of them in use (the first ones), U prompts, P their padded width, H query heads, G key-value heads, D
head width, L tokens of the longest response in use, its prompt included.

A model of transformers hands queries, keys and values of every layer to the attention function that it is set to. Ours
gets a step with them, which keeps what is to be kept and attends: `Prompts` for the prompts of new responses, `Tokens`
for one more token of each. So the model needs no cache, mask or padding of its own, and only what is alive is read.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

ATTENTION = "tokenppo_slots"  # name of our attention function in transformers


class Slots:
    """Room for S responses of at most `room` tokens, prompts included: keys and values of each layer, [S, G, room, D].

    Made when a layer first writes: who calls need not know the shapes of the model.
    """

    def __init__(self, n_slots: int, room: int) -> None:
        self.n_slots, self.room = n_slots, room
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer; `key` and `value` [*, G, *, D] say how large its heads are."""
        if layer not in self._layers:
            self._layers[layer] = tuple(
                x.new_zeros(self.n_slots, x.shape[1], self.room, x.shape[3]) for x in (key, value)
            )
        return self._layers[layer]

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer that has written."""
        return self._layers[number]

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """The first `length` tokens of slots `sources` to `targets`; no slot is both."""
        for pair in self._layers.values():
            for x in pair:
                x[targets, :, :length] = x[sources, :, :length]


class Prompts:
    """Prompts from column 0 on, padded on the right: none of their tokens sees what stands behind the end."""

    def __init__(self, slots: Slots, into: Tensor, of: Tensor) -> None:
        """Slot `into[i]` gets prompt `of[i]`: samples of one prompt share its forward, [B] each."""
        self._slots, self._into, self._of = slots, into, of

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys, values = self._slots.of(layer, key, value)
        width = key.shape[2]
        keys[self._into, :, :width], values[self._into, :, :width] = key[self._of], value[self._of]
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )


class Tokens:
    """One token of each of the first B slots, at its place `at` [B]."""

    def __init__(self, slots: Slots, at: Tensor, length: int | None = None) -> None:
        """`length`: how many tokens are looked back on, at least the furthest place and one. Without it exactly those,
        for which the device is asked."""
        self._slots, self._at = slots, at
        self._into: Tensor | None = None  # [B * G] of all rows [S * G * room, D]: where keys and values go
        self._length = int(at.max()) + 1 if length is None else length
        unseen = torch.arange(self._length, device=at.device) > at[:, None]
        self._unseen = unseen if length is not None or bool(unseen.any()) else None  # [B, L]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys, values = self._slots.of(layer, key, value)
        n, heads, kv_heads, width = len(self._at), query.shape[1], key.shape[1], query.shape[3]
        if self._into is None or len(self._into) != n * kv_heads:
            first = torch.arange(n * kv_heads, device=self._at.device).view(n, kv_heads) * self._slots.room
            self._into = (first + self._at[:, None]).view(-1)
        for kept, new in ((keys, key), (values, value)):
            kept.view(-1, kept.shape[3]).index_copy_(0, self._into, new.reshape(-1, new.shape[3]))
        keys, values = keys[:n, :, : self._length], values[:n, :, : self._length]
        if query.dtype != torch.float32 or query.is_cuda:  # narrow products would round the scores
            mask = None if self._unseen is None else ~self._unseen[:, None, None]
            return F.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, scale=scale, enable_gqa=heads != kv_heads
            )
        # Two products in the order of memory: twice as fast as the fused kernel, which is made for many queries.
        each = heads // kv_heads
        scores = (query * scale).view(n, kv_heads, each, width) @ keys.transpose(2, 3)  # [B, G, H / G, L]
        if self._unseen is not None:
            scores.masked_fill_(self._unseen[:, None, None], -torch.inf)
        return (torch.softmax(scores, dim=-1) @ values).view(n, heads, 1, width)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: Prompts | Tokens,
    scaling: float | None = None,
    **other: object,
) -> tuple[Tensor, None]:
    """In the form that transformers calls: query [B, H, N, D] -> [B, N, H, D].

    Raises NotImplementedError for what it does not compute: windows, soft caps, biases, sinks, masks.
    """
    for what in ("softcap", "s_aux", "position_bias", "sliding_window"):
        if other.get(what) is not None:
            raise NotImplementedError(f"attention over slots has no {what}")
    if attention_mask is not None:
        raise NotImplementedError("attention over slots takes no mask")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = step.attend(module.layer_idx, query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attend)
