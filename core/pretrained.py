"""Loading what save_pretrained wrote, in one way for the learner, its reference and the rollout engines."""

from typing import TYPE_CHECKING, Any

from core.faults import UserError

if TYPE_CHECKING:  # a second of imports, half of which a process that reads no weights has no need of
    import torch
    from transformers import PreTrainedModel


def from_pretrained(kind: Any, path: str, what: str, key: str = "model.path", **settings: Any) -> Any:
    """`kind.from_pretrained` of a folder or hub id. Raises UserError, one line that calls it `what`."""
    try:
        return kind.from_pretrained(path, **settings)
    except Exception as error:  # a damaged file raises whatever its parser has, and `tokenizers` a bare Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{key} = {path}: no {what} loads from it ({reason}); give a folder that save_pretrained wrote, or a"
            " hub id (owner/name) that this machine can reach"
        ) from None


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model. Raises UserError if there is none."""
    from transformers import AutoTokenizer

    return from_pretrained(AutoTokenizer, path, "tokenizer")


def load_causal_lm(path: str, dtype: "torch.dtype") -> "PreTrainedModel":
    """The model of a folder or hub id, on the CPU.

    Raises UserError where the weights leave a layer out: transformers would fill it with random numbers, other ones in
    policy and reference, and only warn.
    """
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"model.path = {path}: the weights have no {missing[0]}{more}, which would be random; give the whole causal"
            " language model"
        )
    return model
