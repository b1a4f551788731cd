"""Linear layers in oneDNN's own layout: for a few rows on a CPU, what reading the weights in their own order costs.

A matrix product copies its weights into blocks that suit the vector units before it multiplies. With thousands of rows
that is nothing, with the 64 of a decode step a third to a half of the time. The blocks of a layer are the same until
the next weights come, so they are made once and kept: 1.1 to 1.9 times faster from 384 x 384 on (docs/rollout.md), for
a second copy of those weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST = 2**16  # elements of a layer; below, the call costs more than the copy


class PackedLinears:
    """Those of a model that are worth it. Nothing is packed before it is used."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [m for m in model.modules() if type(m) is nn.Linear and _is_worth_it(m.weight)]
        self._forwards: list[Callable[[Tensor], Tensor]] = []

    def drop(self) -> None:
        """The weights are others now."""
        self._forwards = []

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Only within the block: what reads the model otherwise reads its parameters."""
        self._forwards = self._forwards or [_packed(layer) for layer in self._layers]
        for layer, forward in zip(self._layers, self._forwards, strict=True):
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward  # that of the class is back


def _is_worth_it(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.numel() < LEAST or not torch.backends.mkldnn.is_available():
        return False
    narrow = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or narrow


def _packed(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight, layer.bias
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    def forward(x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:  # a single row reads each weight once: there is nothing to save
            return F.linear(x, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, blocks, bias, "none", [], "")

    return forward
