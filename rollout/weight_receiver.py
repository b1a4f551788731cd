"""Receive weights described by core.weights into a live model: staged, digest-checked, all-or-nothing.

On a CPU nothing is copied: the staged bytes themselves (shared memory of the host, or what a broadcast filled) become
the memory of the live tensors, so a second worker costs no second copy. On a GPU they are written into the live
tensors, whose addresses captured graphs may know.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from core.faults import InvariantFault, TransitFault
from core.weights import LORA_A, LORA_B, VALUE_HEAD, WeightManifest, as_bytes, bucket_digest, unpack, version_digest


class WeightReceiver:
    """begin -> receive (every bucket) -> commit. Until commit the live tensors are untouched.

    The live tensors may have another dtype than the learner's (bf16 workers); the copy casts.
    """

    def __init__(self, live: Callable[[], dict[str, Tensor]]) -> None:
        """`live`: gives the tensors that the model computes with now; asked again after each commit."""
        self._ask = live
        self._live = live()
        self._loaded: dict[str, Tensor] = {}  # what an adapter is added to, as it was before the first
        self.version = -1  # of the weights in use; -1: as loaded from disk, never yet synchronised
        self._manifest: WeightManifest | None = None
        self._staged: dict[str, Tensor] = {}
        self._digests: dict[int, str] = {}  # of the buckets as they arrived
        self._refusal: Exception | None = None  # the sender reads the answer to `commit` alone: it must hear the cause

    def begin(self, manifest: WeightManifest) -> None:
        """Open a version. Raises InvariantFault if it is older than the one in use or does not fit the model."""
        self._manifest, self._staged, self._digests, self._refusal = None, {}, {}, None
        if manifest.version < self.version:
            raise self.refuse(
                InvariantFault(f"weights of version {manifest.version} offered, {self.version} is in use")
            )
        offered = {spec.name: spec.shape for spec in manifest.specs}
        expected = {name: tuple(tensor.shape) for name, tensor in self._live.items()}
        of_adapter = any(name.endswith((LORA_A, LORA_B)) for name in offered)
        if of_adapter:
            expected = self._of_adapter(offered)
        if offered != expected:
            wrong = sorted(name for name in offered.keys() | expected if offered.get(name) != expected.get(name))
            raise self.refuse(
                InvariantFault(f"weights of version {manifest.version} do not fit this model at {wrong[:5]}")
            )
        if not of_adapter:
            self._refuse_parted(manifest)
        self._manifest = manifest

    @property
    def opened(self) -> WeightManifest:
        """The version that is on its way. Raises what it was refused for, or InvariantFault if none is."""
        if self._refusal is not None:
            raise self._refusal
        if self._manifest is None:
            raise InvariantFault("a weight bucket or commit arrived before its manifest")
        return self._manifest

    def receive(self, index: int, pieces: Sequence[np.ndarray | Tensor], digest: str | None = None) -> None:
        """Stage bucket `index`, each piece [n] uint8, on the host or on a GPU. May come in any order, a second time
        too; not copied, but for the digest where it is on a GPU. `digest`: of these bytes where they lie, as somebody
        took it who maps the same memory; it is compared as our own would be."""
        manifest = self.opened
        try:
            self._staged.update(unpack(manifest, index, pieces))
        except ValueError as error:
            raise self.refuse(TransitFault(f"weights arrived damaged: {error}")) from None
        if digest is None:
            digest = bucket_digest(x if isinstance(x, np.ndarray) else as_bytes(x) for x in pieces)
        self._digests[index] = digest

    def commit(self, digests: Sequence[str]) -> str:
        """Compare the digest of every staged bucket with the sender's, then put the tensors to use. Returns the digest
        of the version.

        Raises:
            TransitFault: something is missing or damaged; another delivery may begin.
            InvariantFault: the engine does not compute with what was put there.
        """
        manifest = self.opened
        missing = [s.name for s in manifest.specs if s.alias_of is None and s.name not in self._staged]
        if missing or len(digests) != len(manifest.buckets):
            raise TransitFault(f"weights of version {manifest.version} lack {len(missing)} tensors: {missing[:5]}")
        for index, (sent, names) in enumerate(zip(digests, manifest.buckets, strict=True)):
            if self._digests[index] != sent:
                raise TransitFault(
                    f"weights of version {manifest.version} arrived damaged: bucket {index} ({names[0]} ...) has digest"
                    f" {self._digests[index][:12]}, sent {sent[:12]}"
                )
        arrived = {spec.name: self._staged[spec.alias_of or spec.name] for spec in manifest.specs}
        self._live = self._ask()  # a model may have made new buffers since
        for name, tensor in self._to_write(arrived):
            self._put(self._live[name], tensor)
        self._refuse_unused(manifest, arrived)
        received = version_digest(manifest, [self._digests[i] for i in range(len(manifest.buckets))])
        self.version, self._manifest, self._staged = manifest.version, None, {}
        return received

    def refuse(self, reason: InvariantFault) -> InvariantFault:
        """Remember why this version will not be committed; the first reason counts."""
        self._refusal = self._refusal or reason
        return self._refusal

    @staticmethod
    @torch.no_grad()
    def _put(live: Tensor, tensor: Tensor) -> None:
        if live.device.type == "cpu":  # never written in place: it may be shared memory, which cannot be
            # Buffers are copied: some models write into them (rotary frequencies that follow the length).
            live.data = tensor.to(live.dtype, copy=not isinstance(live, torch.nn.Parameter))
        else:
            live.copy_(tensor)

    def _refuse_unused(self, manifest: WeightManifest, arrived: dict[str, Tensor]) -> None:
        """What the engine computes with now, not what arrived: the same memory, or, where it was copied, equal."""
        self._live = self._ask()
        for name, tensor in self._to_write(arrived):
            live = self._live[name]
            if live.data_ptr() == tensor.data_ptr() and live.dtype == tensor.dtype and live.shape == tensor.shape:
                continue
            if not torch.equal(live, tensor.to(live)):
                raise InvariantFault(f"weights of version {manifest.version}: {name} holds other numbers than sent")

    def _refuse_parted(self, manifest: WeightManifest) -> None:
        """One tensor here cannot hold two of the sender's: the later would silently replace the earlier."""
        sources: dict[int, str] = {}
        for spec in manifest.specs:
            source, live = spec.alias_of or spec.name, self._live[spec.name]
            if live.numel() and sources.setdefault(live.data_ptr(), source) != source:
                raise self.refuse(
                    InvariantFault(
                        f"weights of version {manifest.version}: {spec.name} and {sources[live.data_ptr()]} are one"
                        " tensor in this model and were sent as two"
                    )
                )

    def _of_adapter(self, offered: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of an adapter of the offered rank, beside layers that are here. Where there was one
        there is one now: the layer would keep the old."""
        expected = {layer + end: () for layer in self._loaded for end in (LORA_B, LORA_A)}
        # What stands beside the causal LM is in no checkpoint of it, and comes whole.
        expected |= {n: tuple(x.shape) for n, x in self._live.items() if n.startswith(f"{VALUE_HEAD}.")}
        for name, shape in offered.items():
            layer = name.removesuffix(LORA_A).removesuffix(LORA_B)
            if layer != name and layer in self._live and len(shape) == self._live[layer].ndim == 2:
                rows, columns = self._live[layer].shape
                rank = shape[1] if name.endswith(LORA_B) else shape[0]
                expected |= {layer + LORA_B: (rows, rank), layer + LORA_A: (rank, columns)}
        return expected

    def _to_write(self, arrived: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Name in the live model -> what shall stand there, one at a time: sums with an adapter are not kept."""
        for name, tensor in arrived.items():
            if name.endswith(LORA_B):
                layer = name.removesuffix(LORA_B)
                if layer not in self._loaded:
                    self._loaded[layer] = self._live[layer].detach().clone()
                loaded = self._loaded[layer]
                factors = (x.to(loaded.device) for x in (tensor, arrived[layer + LORA_A]))
                yield layer, loaded.float() + torch.mm(*factors)
            elif not name.endswith(LORA_A):
                yield name, tensor
