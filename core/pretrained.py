"""Loading a causal language model, in one way for the learner, its reference and the rollout engine."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from core.faults import UserError


def load_causal_lm(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder or hub id, on the CPU.

    Raises UserError where the weights leave a layer out: transformers would fill it with random numbers, other ones in
    policy and reference, and only warn.
    """
    model, found = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"model.path = {path}: the weights have no {missing[0]}{more}, which would be random; give the whole causal"
            " language model"
        )
    return model
