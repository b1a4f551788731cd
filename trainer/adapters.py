"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) in a causal LM, through peft.

    y = W x + (alpha / rank) B A x          W frozen; A [rank, in] random, B [out, rank] zero: at first nothing changes

Adapters are switched by name inside a forward. peft's own `set_adapter` also writes `requires_grad`, which engines read
once at the start and trip over later; here only the names that a layer adds up are changed.
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from core.faults import UserError
from core.schema import ModelConfig


def inject(lm: nn.Module, names: list[str], config: ModelConfig) -> None:
    """Put an adapter of each name beside the linear layers of `lm`, in place; all else in it is frozen.

    Raises UserError without peft, or for targets that are not there.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError(
            f"model.lora_rank = {config.lora_rank}: adapters need peft; pip install 'tokenppo[lora]'"
        ) from None
    dtype, targets = lm.dtype, config.lora_targets or "all-linear"
    for name in names:
        spec = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha or config.lora_rank,
            target_modules=targets,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        try:
            inject_adapter_in_model(spec, lm, adapter_name=name)
        except ValueError as error:
            reason = (str(error).splitlines() or ["no such layers"])[0]
            raise UserError(f"model.lora_targets = {config.lora_targets}: {reason}") from None
    for key, parameter in lm.named_parameters():
        parameter.requires_grad_(is_part(key))
        if is_part(key):
            parameter.data = parameter.data.to(dtype)
    lm._tokenppo_adapted = list(layers(lm).values())


def layers(lm: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer with adapters; none where nothing was injected."""
    return {name: m for name, m in lm.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}


def is_part(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def plain(name: str) -> str:
    """The name of a parameter as it was before adapters were put beside its layer."""
    return name.replace(".base_layer.", ".")


@contextmanager
def active(lm: nn.Module, name: str | None) -> Iterator[None]:
    """A block in which the layers of `lm` add the adapter `name`, or none."""
    adapted = getattr(lm, "_tokenppo_adapted", ())
    before = [(layer._active_adapter, layer._disable_adapters) for layer in adapted]
    before_name, lm._tokenppo_active = getattr(lm, "_tokenppo_active", None), name
    for layer in adapted:
        layer._active_adapter, layer._disable_adapters = ([name] if name else []), name is None
    try:
        yield
    finally:
        lm._tokenppo_active = before_name
        for layer, (names, disabled) in zip(adapted, before, strict=True):
            layer._active_adapter, layer._disable_adapters = names, disabled


def as_now(lm: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Blocks for a computation and for its repetition in the backward pass, where the adapter of now is no longer
    active: as `context_fn` of torch.utils.checkpoint."""
    return nullcontext(), active(lm, getattr(lm, "_tokenppo_active", None))


def parameters(lm: nn.Module, name: str) -> list[nn.Parameter]:
    """Those of one adapter."""
    return [p for key, p in lm.named_parameters() if is_part(key) and f".{name}." in key]


def save_adapter(tensors: dict[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """The policy's adapter as `peft.PeftModel.from_pretrained(base, folder)` loads it.

    `tensors`: parameter name in the LM -> whole tensor, of one adapter named `policy`.
    """
    from peft import LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    named = {f"base_model.model.{name.replace('.policy.', '.')}": x.cpu().contiguous() for name, x in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensors})
    spec = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or config.lora_rank,
        target_modules=modules,
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.path,
        inference_mode=True,
    ).to_dict()
    plain_values = {key: sorted(value) if isinstance(value, set) else value for key, value in spec.items()}
    (folder / "adapter_config.json").write_text(json.dumps(plain_values, indent=2, default=str) + "\n", "utf-8")
