"""Linear layers in oneDNN's own layout: for a few rows on a CPU, what reading the weights in their own order costs.

A matrix product copies its weights into blocks that suit the vector units before it multiplies. With thousands of rows
that is nothing, with the 64 of a decode step a third to a half of the time. The blocks of a layer are the same until
the next weights come, so they are made once and kept: 1.1 to 1.9 times faster from 384 x 384 on (docs/rollout.md), for
a second copy of those weights.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST = 2**16  # elements of a layer; below, the call costs more than the copy


class Product:
    """x W^T + b of one layer, or of several that read the same x, one behind the other: [..., K] -> [..., sum of N].

    On a CPU several become one, in a copy. Nothing is made before it is used.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        self._layers = layers
        self._forward: Callable[[Tensor], Tensor] | None = None

    def drop(self) -> None:
        """The weights are others now."""
        self._forward = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._forward is None:
            self._forward = _packed(self._layers) or partial(_plain, self._layers)
        return self._forward(x)


class PackedLinears:
    """Those of a model that are worth it, each by itself. Nothing is packed before it is used."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [m for m in model.modules() if type(m) is nn.Linear and _is_worth_it(m.weight)]
        self._products = [Product(layer) for layer in self._layers]

    def drop(self) -> None:
        """The weights are others now."""
        for product in self._products:
            product.drop()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Only within the block: what reads the model otherwise reads its parameters."""
        for layer, product in zip(self._layers, self._products, strict=True):
            layer.forward = product.__call__
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward  # that of the class is back


def _plain(layers: Sequence[nn.Linear], x: Tensor) -> Tensor:
    ys = [F.linear(x, layer.weight, layer.bias) for layer in layers]
    return ys[0] if len(ys) == 1 else torch.cat(ys, dim=-1)


def _is_worth_it(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.numel() < LEAST or not torch.backends.mkldnn.is_available():
        return False
    narrow = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or narrow


def _packed(layers: Sequence[nn.Linear]) -> Callable[[Tensor], Tensor] | None:
    """None: nothing is to be won."""
    if layers[0].weight.device.type != "cpu":
        return None
    if len(layers) == 1:
        weight, bias = layers[0].weight.detach(), layers[0].bias
    else:
        weight = torch.cat([layer.weight.detach() for layer in layers])
        bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
    if not _is_worth_it(weight):
        return None if len(layers) == 1 else lambda x: F.linear(x, weight, bias)
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight)

    def forward(x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:  # a single row reads each weight once: there is nothing to save
            return _plain(layers, x)
        return torch.ops.mkldnn._linear_pointwise(x, blocks, bias, "none", [], "")

    return forward
