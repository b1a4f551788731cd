"""Decode steps in one call of compiled code (compiled_step.cpp): on a CPU, in float32, for what decoder.py knows.

A step of many small operations loses its time between them, and products of 64 rows lose theirs by reading weights in
an order that suits thousands. Here weights are laid out once for what a step reads, and a step is one call. Which
numbers come out is compared with the model's own when it is loaded, as those of decoder.py are.

Legend: B slots in use, H hidden size, V vocabulary, D head width.
"""

import ctypes
import threading
import weakref
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rollout.engines import compiler
from rollout.engines.decoder import Decoder, rotations_are_fixed, values_of
from rollout.engines.slots import Slots


def _fields(kind: object, names: str) -> list[tuple[str, object]]:
    return [(name, kind) for name in names.split()]


class _Layer(Structure):
    _fields_ = _fields(
        c_void_p,
        "norm qkv qkv_bias q_norm k_norm out out_bias mlp_norm gate_up gate_up_bias down down_bias keys values",
    )


class _Model(Structure):
    _fields_ = (
        _fields(c_int64, "layers hidden heads kv_heads width inner vocabulary room")
        + _fields(c_float, "epsilon scale")
        + _fields(c_void_p, "embedding cos sin norm head head_bias")
        + [("layer", POINTER(_Layer))]
    )


class CompiledSteps:
    """Steps over the slots of an engine. Weights are read, and laid out anew, at the first step after `drop`."""

    def __init__(self, model: nn.Module, value_head: nn.Linear | None = None) -> None:
        """Asserts nothing about `model`: ask `fits` first. Raises compiler.NotCompiled where there is no compiler."""
        self._code = compiler.load(compiler.STEP)
        for function in (self._code.room_for, self._code.lanes, self._code.work_floats, self._code.step):
            function.restype = c_int64  # room_for: an address
        self._lm, self._value_head = model, value_head
        self._panels: _Panels | None = None  # kept from weights to weights: new memory is slow at its first touch
        self._slots: Slots | None = None
        self._turned: Sequence[Tensor] = ()  # cos and sin [room, D] of each place
        self._model: _Model | None = None
        self._weights: _Weights | None = None  # those that `_model` has addresses of
        self._work = _floats(0)
        self._lock = threading.RLock()  # the interpreter's own is let go while the code runs

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Of the models that decoder.py takes: in float32 on a CPU, with the usual activation and fixed rotations."""
        try:
            acts = {type(layer.mlp.act_fn).__name__ for layer in model.model.layers}
            plain = acts <= {"SiLU", "SiLUActivation"} and len(_epsilons(model)) == 1 and _is_even(model)
        except AttributeError:  # of another transformers
            return False
        kinds = {(p.device.type, p.dtype) for p in model.parameters()}
        return plain and kinds == {("cpu", torch.float32)} and Decoder.fits(model) and rotations_are_fixed(model)

    def drop(self) -> None:
        """The weights are others now, and may lie elsewhere."""
        with self._lock:
            self._model = self._weights = None
            self.forget()

    def forget(self) -> None:
        """The memory of slots."""
        with self._lock:
            self._slots, self._turned = None, ()

    def step(self, token: Tensor, place: Tensor, slots: Slots) -> tuple[Tensor, Tensor | None]:
        """As Decoder.step. Raises IndexError for a token or a place that is none."""
        with self._lock:
            if self._model is None:
                self._read_weights()
            if slots is not self._slots:
                self._look_at(slots)
            states, logits = self._stepped(token.contiguous(), place.contiguous(), self._model)
        return logits, None if self._value_head is None else values_of(self._value_head, states)

    def _stepped(self, token: Tensor, place: Tensor, model: _Model) -> tuple[Tensor, Tensor]:
        n, threads = len(token), torch.get_num_threads()
        assert token.dtype == place.dtype == torch.long and len(place) == n <= self._slots.n_slots, (token, place)
        if (wanted := self._code.work_floats(byref(model), c_int64(n), c_int64(threads))) > len(self._work):
            self._work = _floats(wanted)
        states, logits = _floats(n, model.hidden), _floats(n, model.vocabulary)
        addresses = [c_void_p(x.data_ptr()) for x in (token, place, self._work, states, logits)]
        if self._code.step(byref(model), c_int64(n), *addresses, c_int64(threads)):
            raise IndexError(
                f"tokens {token.tolist()} at {place.tolist()}: not in a vocabulary of {model.vocabulary} or beyond the"
                f" {model.room} tokens that a slot has room for"
            )
        return states, logits

    # ----------------------------------------------------------------------------------------------------- the weights

    def _read_weights(self) -> None:
        counted = _Weights(self._code)
        self._described(counted)
        if self._panels is None or self._panels.floats < counted.floats:
            self._panels = None  # before the new ones are made
            self._panels = _Panels(self._code, counted.floats)
        self._weights = _Weights(self._code, self._panels)
        self._model = self._described(self._weights)

    def _look_at(self, slots: Slots) -> None:
        self._slots, model = None, self._model  # until all is known: what fails in between leaves old addresses
        places = torch.arange(slots.room, device="cpu")[None]
        turned = self._lm.model.rotary_emb(self._lm.model.embed_tokens.weight, position_ids=places)
        self._turned = [x[0].contiguous() for x in turned]
        model.room, (model.cos, model.sin) = slots.room, (x.data_ptr() for x in self._turned)
        for number in range(model.layers):
            layer = model.layer[number]
            layer.keys, layer.values = (x.data_ptr() for x in slots.layer(number))
        self._slots = slots

    def _described(self, weights: "_Weights") -> _Model:
        """All but what is known of slots."""
        lm, head = self._lm.model, self._lm.lm_head
        layers = (_Layer * len(lm.layers))()
        for number, block in enumerate(lm.layers):
            attention, mlp = block.self_attn, block.mlp
            qkv = attention.q_proj, attention.k_proj, attention.v_proj
            normed = hasattr(attention, "q_norm")
            layers[number] = _Layer(
                norm=weights.plain(block.input_layernorm.weight),
                qkv=weights.panels(*qkv),
                qkv_bias=weights.bias(*qkv),
                q_norm=weights.plain(attention.q_norm.weight) if normed else None,
                k_norm=weights.plain(attention.k_norm.weight) if normed else None,
                out=weights.panels(attention.o_proj),
                out_bias=weights.bias(attention.o_proj),
                mlp_norm=weights.plain(block.post_attention_layernorm.weight),
                gate_up=weights.pairs(mlp.gate_proj, mlp.up_proj),
                gate_up_bias=weights.pair_bias(mlp.gate_proj, mlp.up_proj),
                down=weights.panels(mlp.down_proj),
                down_bias=weights.bias(mlp.down_proj),
            )
        return _Model(
            layers=len(lm.layers),
            hidden=head.in_features,
            heads=attention.q_proj.out_features // attention.head_dim,
            kv_heads=attention.k_proj.out_features // attention.head_dim,
            width=attention.head_dim,
            inner=mlp.down_proj.in_features,
            vocabulary=head.out_features,
            epsilon=lm.norm.variance_epsilon,
            scale=attention.scaling,
            embedding=weights.plain(lm.embed_tokens.weight),
            norm=weights.plain(lm.norm.weight),
            head=weights.panels(head),
            head_bias=weights.bias(head),
            layer=layers,
        )


class _Panels:
    """Memory of `floats` float32 in large pages."""

    def __init__(self, code: ctypes.CDLL, floats: int) -> None:
        self.address, self.floats = code.room_for(c_int64(floats)), floats
        if not self.address:
            raise MemoryError(f"{4 * floats} bytes for the weights of decode steps")
        weakref.finalize(self, code.give_back, c_void_p(self.address))


class _Weights:
    """Addresses of weights for the code, and what has to stay where it is for them."""

    def __init__(self, code: ctypes.CDLL, into: _Panels | None = None) -> None:
        """`into`: where panels go; None: nothing is written, only counted."""
        self._code, self._into, self.floats = code, into, 0
        self._lanes = code.lanes()
        self._kept: list[Tensor] = []

    def plain(self, x: Tensor) -> int:
        self._kept.append(x.detach().contiguous())
        return self._kept[-1].data_ptr()

    def panels(self, *layers: nn.Linear) -> int | None:
        """Of layers that read the same, one behind the other."""
        rows = sum(layer.out_features for layer in layers)
        return self._packed(-(-rows // (2 * self._lanes)), layers[0].in_features, {-1: layers})

    def pairs(self, first: nn.Linear, second: nn.Linear) -> int | None:
        """Half of each panel is of the one, half of the other."""
        parts = {0: (first,), self._lanes: (second,)}
        return self._packed(-(-first.out_features // self._lanes), first.in_features, parts)

    def _packed(self, panels: int, inputs: int, parts: dict[int, tuple[nn.Linear, ...]]) -> int | None:
        """`parts`: layers by the column of each panel that they begin at; -1: they take whole panels."""
        at, self.floats = 4 * self.floats, self.floats + panels * 2 * self._lanes * inputs
        if self._into is None:
            return None
        for column, layers in parts.items():
            w = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
            w = w.detach().contiguous()
            sizes = (c_int64(n) for n in (*w.shape, column))
            threads = c_int64(torch.get_num_threads())
            self._code.pack(c_void_p(w.data_ptr()), *sizes, c_void_p(self._into.address + at), threads)
        return self._into.address + at

    def bias(self, *layers: nn.Linear) -> int | None:
        if layers[0].bias is None:
            return None
        return self.plain(_padded(torch.cat([layer.bias for layer in layers]), 2 * self._lanes))

    def pair_bias(self, first: nn.Linear, second: nn.Linear) -> int | None:
        if first.bias is None:
            return None
        halves = [_padded(layer.bias, self._lanes).view(-1, self._lanes) for layer in (first, second)]
        return self.plain(torch.stack(halves, dim=1).view(-1))


def _floats(*sizes: int) -> Tensor:
    """Whatever the process takes for its default."""
    return torch.empty(sizes, dtype=torch.float32, device="cpu")


def _is_even(model: nn.Module) -> bool:
    """Whether all layers are of one shape, and tokens and logits of one vocabulary."""
    shapes = {
        (
            block.self_attn.scaling,
            block.self_attn.head_dim,
            *(tuple(p.shape) for p in block.parameters()),
            *(name for name, _ in block.named_parameters()),
        )
        for block in model.model.layers
    }
    return len(shapes) == 1 and model.model.embed_tokens.weight.shape == model.lm_head.weight.shape


def _padded(x: Tensor, of: int) -> Tensor:
    return F.pad(x.detach(), (0, -len(x) % of))


def _epsilons(model: nn.Module) -> set[float]:
    return {m.variance_epsilon for name, m in model.named_modules() if name.endswith("norm")}
