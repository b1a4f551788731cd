"""Policies of tests, and what they say of a batch in the shape of the batch."""

from contextlib import ExitStack
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from core.schema import ModelConfig
from trainer.batch import TrainBatch
from trainer.model import CausalForward, PolicyWithValueHead, inputs_of


@dataclass(frozen=True)
class Reading:
    logprobs: Tensor  # [B, T]
    values: Tensor  # [B, T + 1] where scored; the last of a row is the state behind its response, at its length
    entropy: Tensor  # [B, T]


WAYS = ("packed", "padded", "own logits")


def policy_of(lm: torch.nn.Module, way: str = "packed", **settings: object) -> PolicyWithValueHead:
    """A policy that reads its LM in one of the three ways, whatever the LM would allow."""
    denied = {"packed": [], "padded": ["reads_segments"], "own logits": ["_head_is_one_product"]}[way]
    with ExitStack() as stack:
        for name in denied:
            stack.enter_context(mock.patch.object(CausalForward, name, lambda *_: False))
        policy = PolicyWithValueHead(lm, ModelConfig(path="m", dtype="float32", **settings)).eval()
    assert (policy.reader.packed, policy.reader.fused) == (way == "packed", way != "own logits")
    return policy


@torch.no_grad()
def read(
    policy: PolicyWithValueHead,
    batch: TrainBatch,
    temperature: float,
    device: str = "cpu",
) -> Reading:
    """Log-probs, values and entropies."""
    inputs = inputs_of(batch, torch.device(device), packed=policy.reader.packed)
    logprobs, values, entropy, _ = (x.cpu() if isinstance(x, Tensor) else x for x in policy(inputs, temperature))
    mask, n = batch.response_mask, int(batch.response_mask.sum())

    def wide(flat: Tensor) -> Tensor:
        out = torch.zeros(mask.shape, dtype=flat.dtype)
        out[mask] = flat
        return out

    all_values = torch.cat([wide(values[:n]), torch.zeros(len(mask), 1)], dim=1)
    all_values[torch.arange(len(mask)), batch.response_lengths] = values[n:]
    return Reading(wide(logprobs), all_values, wide(entropy))


def rows(batch: TrainBatch, *index: int) -> TrainBatch:
    return batch.rows(np.array(index))
