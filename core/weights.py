"""Weights on the way from the learner to a worker: what both ends agree on.

One version is a manifest (names, dtypes, shapes, aliases, buckets), which is known before any byte is, then buckets of
raw bytes, then a digest of each bucket. A tensor whose storage another name shares (tied embeddings) travels once and
is put under both names. All-or-nothing: a receiver stages every bucket, compares the digests, and only then touches
the live model.

An adapter travels without the weights that it is added to: for a layer W two factors, under W's name with LORA_B and
LORA_A behind it, and the receiver puts W + B A in the place of W, where W is what it loaded from disk.
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LORA_A, LORA_B = ".lora_A", ".lora_B"
VALUE_HEAD = "value_head"  # module of the value head, where it travels beside the causal LM
ALIGNMENT = 64  # of each tensor within one flat buffer: what torch's own allocator gives, so kernels run as ever


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    name: str
    dtype: str  # e.g. "torch.float32"
    shape: tuple[int, ...]
    alias_of: str | None = None  # the name under which the same storage travels

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype.removeprefix("torch."))

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.torch_dtype.itemsize


@dataclass(frozen=True)
class WeightStream:
    """Weights that are gathered while they are sent: no rank holds the whole of a sharded model.

    specs    what there is; known before anything is gathered
    tensors  name and whole tensor of each spec that is no alias, in that order, once. All ranks must take all of them,
             for each may be a collective.
    """

    specs: tuple[TensorSpec, ...]
    tensors: Iterator[tuple[str, Tensor]]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "WeightStream":
        """Of tensors that are whole already; the same storage under a second name becomes an alias."""
        seen: dict[tuple[int, tuple[int, ...], str], str] = {}
        specs = []
        for name, tensor in tensors.items():
            key = (tensor.data_ptr(), tuple(tensor.shape), str(tensor.dtype))
            alias = seen.get(key) if tensor.numel() else None
            seen.setdefault(key, name)
            specs.append(TensorSpec(name=name, dtype=str(tensor.dtype), shape=tuple(tensor.shape), alias_of=alias))
        return cls(tuple(specs), ((s.name, tensors[s.name]) for s in specs if s.alias_of is None))


@dataclass(frozen=True, kw_only=True)
class WeightManifest:
    """Example: version 7, two tensors in one bucket, the head tied to the embedding.

    specs   (embed.weight float32 [320, 96]), (norm.weight float32 [96]), (lm_head.weight alias_of embed.weight)
    buckets (("embed.weight", "norm.weight"),)
    """

    version: int
    specs: tuple[TensorSpec, ...]
    buckets: tuple[tuple[str, ...], ...]  # names per bucket, in order; aliases are in none

    @property
    def by_name(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.specs}


def make_manifest(version: int, specs: Sequence[TensorSpec], bucket_bytes: int) -> WeightManifest:
    """Plan a transfer: tensors in their order, a bucket is full before it would exceed `bucket_bytes`."""
    buckets, bucket, filled = [], [], 0
    for spec in specs:
        if spec.alias_of is None:
            if bucket and filled + spec.n_bytes > bucket_bytes:
                buckets.append(tuple(bucket))
                bucket, filled = [], 0
            bucket.append(spec.name)
            filled += spec.n_bytes
    if bucket:
        buckets.append(tuple(bucket))
    return WeightManifest(version=version, specs=tuple(specs), buckets=tuple(buckets))


def in_buckets(manifest: WeightManifest, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[Tensor]]:
    """The tensors of a stream, bucket by bucket; what was given before is not kept."""
    tensors = iter(tensors)
    for names in manifest.buckets:
        bucket = []
        for name in names:
            got, tensor = next(tensors)
            assert got == name, f"{got} came where the manifest has {name}"
            bucket.append(tensor)
        yield bucket
    assert next(tensors, None) is None, "a stream longer than its manifest"


def as_bytes(tensor: Tensor) -> np.ndarray:
    """The tensor's bytes, [n] uint8, without a copy where it is contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def bucket_digest(pieces: Iterable[np.ndarray]) -> str:
    """Hex digest over the bytes of one bucket, each piece [n] uint8. xxh3: for accidents, not for forgers."""
    import xxhash  # needed where weights travel, not where a learner only computes

    h = xxhash.xxh3_128()
    for piece in pieces:
        h.update(piece.data)
    return h.hexdigest()


def version_digest(manifest: WeightManifest, buckets: Sequence[str]) -> str:
    """Hex digest over the version, name, dtype, shape and alias of each tensor, and the digests of its buckets."""
    h = hashlib.blake2b(str(manifest.version).encode(), digest_size=32)
    for spec in manifest.specs:
        h.update(repr((spec.name, spec.dtype, spec.shape, spec.alias_of)).encode())
    h.update(repr((manifest.buckets, tuple(buckets))).encode())
    return h.hexdigest()


def digest_of(tensors: Mapping[str, Tensor], version: int = 0) -> str:
    """The digest that a sync of these tensors as one bucket would have."""
    return stream_digest(WeightStream.of(tensors), version, 2**63)


def stream_digest(stream: WeightStream, version: int, bucket_bytes: int) -> str:
    """The digest that a sync of `stream` as `version`, in such buckets, has. Takes all of it."""
    manifest = make_manifest(version, stream.specs, bucket_bytes)
    buckets = in_buckets(manifest, stream.tensors)
    return version_digest(manifest, [bucket_digest(map(as_bytes, bucket)) for bucket in buckets])


def unpack(manifest: WeightManifest, index: int, pieces: Sequence[np.ndarray | Tensor]) -> dict[str, Tensor]:
    """Name and tensor of each piece ([n] uint8) of bucket `index`: views, which keep the bytes alive.

    ValueError if bytes or pieces miss or are too many.
    """
    names, by_name, tensors = manifest.buckets[index], manifest.by_name, {}
    if len(pieces) != len(names):
        raise ValueError(f"bucket {index} of version {manifest.version} has {len(pieces)} of {len(names)} tensors")
    with warnings.catch_warnings():  # nobody writes into it; the receiver puts it in the place of the old
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, piece in zip(names, pieces, strict=True):
            spec = by_name[name]
            if len(piece) != spec.n_bytes:
                raise ValueError(f"{name} of version {manifest.version} has {len(piece)} of {spec.n_bytes} bytes")
            raw = torch.from_numpy(piece) if isinstance(piece, np.ndarray) else piece
            tensors[name] = raw.view(spec.torch_dtype).reshape(spec.shape)
    return tensors


class Flat:
    """One bucket as one buffer, and where each tensor lies in it: for transports that move one buffer at a time."""

    def __init__(self, manifest: WeightManifest, index: int) -> None:
        by_name = manifest.by_name
        self.places, self.n_bytes = [], 0  # (start, end) of each tensor
        for name in manifest.buckets[index]:
            self.places.append((self.n_bytes, self.n_bytes + by_name[name].n_bytes))
            self.n_bytes += -(-by_name[name].n_bytes // ALIGNMENT) * ALIGNMENT

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """[n_bytes] uint8 on the device of the tensors."""
        flat = torch.empty(self.n_bytes, dtype=torch.uint8, device=tensors[0].device)
        for (start, end), tensor in zip(self.places, tensors, strict=True):
            flat[start:end].copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
        return flat

    def cut(self, flat: Tensor) -> list[Tensor]:
        """The bytes of each tensor, [n] uint8: views."""
        return [flat[start:end] for start, end in self.places]


def named_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, tied ones under each of their names, non-persistent buffers included.

    The very objects that the model computes with: on a CPU a sync gives them other memory (`tensor.data = ...`).
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


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
    node: str  # whose object store the worker maps
