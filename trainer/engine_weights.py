"""The parameters of a policy as they are whole, whatever engine has wrapped, replaced or sharded them.

ZeRO-3 and FSDP2 keep a shard of each parameter on each rank. What is read here is gathered one parameter at a time, so
no more than one is whole beside the copy that is asked for. All ranks must call, in the same order.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from core.weights import LORA_A, LORA_B, VALUE_HEAD, TensorSpec, WeightStream
from trainer import adapters

TRAINED_FILE = "trained.safetensors"  # of a policy that is mostly frozen


def is_sharded(module: nn.Module) -> bool:
    """Whether ranks hold shards of its parameters (ZeRO-3, FSDP2)."""
    return any(_is_shard(p) for p in module.parameters())


def is_tied(lm: nn.Module) -> bool:
    """Whether the output layer of a causal LM is its embedding."""
    return lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


def whole_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter by name, tied ones once; valid until the next."""
    for name, parameter in module.named_parameters():
        with _whole(parameter) as tensor:
            yield name, tensor


def stream(lm: nn.Module, dtype: torch.dtype, value_head: nn.Module | None = None) -> WeightStream:
    """Every parameter (in `dtype`) and buffer (in its own) of a causal LM under the names that transformers gives them.

    Each is gathered when it is asked for; what is sharded comes as a copy, what is whole as it is. Tied tensors come
    once; adapters are merged into their layers. `value_head` comes behind, as it is, under names of its own.
    """
    adapted = adapters.layers(lm)
    first: dict[int, str] = {}  # of the names of one tensor
    specs: list[TensorSpec] = []

    def is_new(name: str, tensor: Tensor, dtype: torch.dtype) -> bool:
        name = adapters.plain(name)
        alias = first.setdefault(id(tensor), name)
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
        specs.append(TensorSpec(name=name, dtype=str(dtype), shape=shape, alias_of=None if alias == name else alias))
        return alias == name

    named = [(n, p) for n, p in lm.named_parameters(remove_duplicate=False) if not adapters.is_part(n)]
    parameters = [(n, p) for n, p in named if is_new(n, p, dtype)]
    # Buffers keep their dtype: from_pretrained casts parameters only, and rotary frequencies want float32.
    buffers = [(n, b) for n, b in lm.named_buffers(remove_duplicate=False) if is_new(n, b, b.dtype)]
    of_head = [] if value_head is None else [*value_head.named_parameters(prefix=VALUE_HEAD)]
    assert all(is_new(n, p, p.dtype) for n, p in of_head), "a value head that is part of the causal LM"

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in parameters:
            layer = adapted.get(name.removesuffix(".base_layer.weight"))
            factors = () if layer is None else _factors(layer)
            with _whole(parameter) as whole:
                merged = whole + torch.mm(*factors).to(whole.dtype) if factors else whole
                tensor = merged.detach().to(dtype, copy=_is_shard(parameter))
            yield adapters.plain(name), tensor
        for name, buffer in buffers:
            yield adapters.plain(name), buffer.detach()
        yield from _copies(of_head)

    return WeightStream(tuple(specs), tensors())


def _copies(parameters: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Gathered one by one."""
    for name, parameter in parameters:
        with _whole(parameter) as whole:
            copy = whole.detach().clone()
        yield name, copy


def export(lm: nn.Module, dtype: torch.dtype, value_head: nn.Module | None = None) -> dict[str, Tensor]:
    """All of `stream` at once, tied tensors as one under each of their names."""
    weights = stream(lm, dtype, value_head)
    whole = dict(weights.tensors)
    return {spec.name: whole[spec.alias_of or spec.name] for spec in weights.specs}


def export_adapter(lm: nn.Module, value_head: nn.Module | None = None) -> dict[str, Tensor]:
    """The policy's adapter alone, in float32: for each layer W that has one, the factors B, already times alpha / rank,
    and A of what is added to it, under W's name (`core/weights.py: LORA_A`). A layer that keeps its weight transposed
    gets them in that order too, so that W + B A holds for all. And `value_head`, whole, under names of its own."""
    out: dict[str, Tensor] = {}
    for name, layer in adapters.layers(lm).items():
        out[f"{name}.weight{LORA_B}"], out[f"{name}.weight{LORA_A}"] = _factors(layer)
    return out | dict(_copies([] if value_head is None else [*value_head.named_parameters(prefix=VALUE_HEAD)]))


@dataclass(frozen=True, kw_only=True)
class PolicyWeights:
    """A policy as it goes to disk."""

    lm: dict[str, Tensor]  # of the causal LM, adapters merged
    value: dict[str, Tensor]  # `weight` and `bias` of the value head, and `critic.*` of a trunk or adapter of its own
    adapter: dict[str, Tensor]  # of the policy, by name in the LM; empty without one


def whole_policy(policy: nn.Module) -> PolicyWeights:
    """All ranks call it."""
    value, adapter = {}, {}
    for name, tensor in whole_parameters(policy):
        if name.startswith("value_head."):
            value[name.removeprefix("value_head.")] = tensor.detach().clone()
        elif name.startswith("critic.") or adapters.is_part(name) and ".critic." in name:
            value[name if name.startswith("critic.") else f"critic.{name}"] = tensor.detach().clone()
        elif adapters.is_part(name):
            adapter[name.removeprefix("lm.")] = tensor.detach().clone()
    return PolicyWeights(lm=export(policy.lm, torch.float32), value=value, adapter=adapter)


def _factors(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The two matrices whose product the policy's adapter adds to the weight of `layer`, as that weight lies. Gathered:
    a shard of ZeRO-3 has no elements, and a product of nothing would add 0 without a word."""
    with _whole(layer.lora_A["policy"].weight) as a:
        a = a.detach().float().clone()
    with _whole(layer.lora_B["policy"].weight) as b:
        b = b.detach().float() * layer.scaling["policy"]
    assert a.ndim == b.ndim == 2 and len(a) == b.shape[1], f"an adapter of shapes {tuple(a.shape)} and {tuple(b.shape)}"
    first, second = (a.T, b.T) if layer.fan_in_fan_out else (b, a)
    return first.contiguous(), second.contiguous()


def _is_shard(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor")


@contextmanager
def _whole(parameter: Tensor) -> Iterator[Tensor]:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter
    elif hasattr(parameter, "full_tensor"):
        yield parameter.full_tensor()
    else:
        yield parameter


def save_state(accelerator: Accelerator, policy: nn.Module, folder: Path) -> None:
    """What Accelerate saves of engine, optimizer and RNG; of a policy that is mostly frozen, only what is trained."""
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # a line for each tied tensor that is saved once
    if _all_trained(policy):
        accelerator.save_state(str(folder))
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.save_state(str(folder), exclude_frozen_parameters=True)
    else:
        hook = accelerator.register_save_state_pre_hook(lambda models, weights, place: weights.clear())
        try:
            accelerator.save_state(str(folder))
        finally:
            hook.remove()
        trained = {name: x for name, x in whole_parameters(policy) if _trains(policy, name)}
        if accelerator.is_main_process:
            save_file({name: x.detach().cpu().contiguous() for name, x in trained.items()}, folder / TRAINED_FILE)


def load_state(accelerator: Accelerator, policy: nn.Module, folder: Path) -> None:
    """Put back what `save_state` wrote; what is frozen is as it was loaded."""
    if _all_trained(policy):
        accelerator.load_state(str(folder))
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.load_state(str(folder), load_module_strict=False)
    else:
        hook = accelerator.register_load_state_pre_hook(lambda models, place: models.clear())
        try:
            accelerator.load_state(str(folder))
        finally:
            hook.remove()
        parameters = dict(policy.named_parameters())
        with torch.no_grad():
            for name, x in load_file(folder / TRAINED_FILE).items():
                parameters[name].copy_(_sharded_like(parameters[name], x))


def _sharded_like(parameter: Tensor, whole: Tensor) -> Tensor:
    if not hasattr(parameter, "full_tensor"):
        return whole
    whole = whole.to(parameter.device)  # every rank has read it: nothing is sent
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _all_trained(policy: nn.Module) -> bool:
    return all(p.requires_grad for p in policy.parameters())


def _trains(policy: nn.Module, name: str) -> bool:
    return policy.get_parameter(name).requires_grad
