"""Weights on the way from the learner to a worker: what both ends agree on.

One version is a manifest (names, dtypes, shapes, aliases, buckets, digest) and buckets of raw bytes. A tensor whose
storage another name shares (tied embeddings) travels once and is written under both names. All-or-nothing: a receiver
stages every bucket, compares the digest, and only then touches the live model.

An adapter travels without the weights that it is added to: for a layer W two factors, under W's name with LORA_B and
LORA_A behind it, and the receiver puts W + B A in the place of W, where W is what it loaded from disk.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LORA_A, LORA_B = ".lora_A", ".lora_B"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    name: str
    dtype: str  # e.g. "torch.float32"
    shape: tuple[int, ...]
    alias_of: str | None = None  # the name under which the same storage travels


@dataclass(frozen=True, kw_only=True)
class WeightManifest:
    """Example: version 7, two tensors in one bucket, the head tied to the embedding.

    specs   (embed.weight float32 [320, 96]), (norm.weight float32 [96]), (lm_head.weight alias_of embed.weight)
    buckets (("embed.weight", "norm.weight"),)
    """

    version: int
    specs: tuple[TensorSpec, ...]
    buckets: tuple[tuple[str, ...], ...]  # names per bucket, in order; aliases are in none
    digest: str

    @property
    def by_name(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.specs}


def _bytes(tensor: Tensor) -> np.ndarray:
    """The tensor's bytes, [n] uint8, without a copy where it is contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def digest(version: int, specs: tuple[TensorSpec, ...], tensors: Mapping[str, Tensor]) -> str:
    """Hex digest over the version and name, dtype, shape, alias and bytes of each tensor, in the order of the specs."""
    h = hashlib.blake2b(str(version).encode(), digest_size=32)
    for spec in specs:
        h.update(repr((spec.name, spec.dtype, spec.shape, spec.alias_of)).encode())
        if spec.alias_of is None:
            h.update(_bytes(tensors[spec.name]).data)
    return h.hexdigest()


def make_manifest(version: int, tensors: Mapping[str, Tensor], bucket_bytes: int) -> WeightManifest:
    """Plan the transfer of named tensors; the same storage under a second name becomes an alias."""
    specs, buckets, bucket, filled = [], [], [], 0
    seen: dict[tuple[int, tuple[int, ...], str], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), str(tensor.dtype))
        alias = seen.get(key) if tensor.numel() else None
        seen.setdefault(key, name)
        specs.append(TensorSpec(name=name, dtype=str(tensor.dtype), shape=tuple(tensor.shape), alias_of=alias))
        if alias is None:
            if bucket and filled + tensor.nbytes > bucket_bytes:
                buckets.append(tuple(bucket))
                bucket, filled = [], 0
            bucket.append(name)
            filled += tensor.nbytes
    if bucket:
        buckets.append(tuple(bucket))
    return WeightManifest(
        version=version, specs=tuple(specs), buckets=tuple(buckets), digest=digest(version, tuple(specs), tensors)
    )


def pack(names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> np.ndarray:
    """One bucket: the bytes of the named tensors one after the other, [n] uint8."""
    return np.concatenate([_bytes(tensors[name]) for name in names])


def unpack(names: tuple[str, ...], manifest: WeightManifest, bucket: np.ndarray) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one bucket; each is a copy, so the bucket may be freed. ValueError if bytes miss or rest."""
    by_name, start = manifest.by_name, 0
    for name in names:
        spec = by_name[name]
        dtype = getattr(torch, spec.dtype.removeprefix("torch."))
        n_bytes = int(np.prod(spec.shape, dtype=np.int64)) * dtype.itemsize
        piece = bucket[start : start + n_bytes]
        if len(piece) != n_bytes:
            raise ValueError(
                f"bucket of version {manifest.version} ends inside {name}: {len(piece)} of {n_bytes} bytes"
            )
        yield name, torch.from_numpy(piece.copy()).view(dtype).reshape(spec.shape)
        start += n_bytes
    if start != len(bucket):
        raise ValueError(f"bucket of version {manifest.version} has {len(bucket) - start} bytes too many")


def named_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, tied ones under each of their names, non-persistent buffers included."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A fixed prompt and response: bytes that arrived need not be bytes in use, so log-probs are compared too."""

    prompt_ids: np.ndarray  # [1, P] int64
    response_ids: np.ndarray  # [1, T] int64


@dataclass(frozen=True, kw_only=True)
class WeightAck:
    """What a worker answers after a commit."""

    worker: str
    version: int
    digest: str
    probe_logprobs: np.ndarray  # [1, T] float32
    pid: int
