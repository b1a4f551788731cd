"""Receive weights described by core.weights into a live model: staged, digest-checked, all-or-nothing."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from core.faults import InvariantFault
from core.weights import LORA_A, LORA_B, WeightManifest, digest, unpack


class WeightReceiver:
    """begin -> receive (every bucket) -> commit. Until commit the live tensors are untouched.

    The live tensors may have another dtype than the learner's (bf16 workers); the copy casts.
    """

    def __init__(self, live: dict[str, Tensor]) -> None:
        self._live = live
        self._loaded: dict[str, Tensor] = {}  # what an adapter is added to, as it was before the first
        self.version = -1  # of the weights in use; -1: as loaded from disk, never yet synchronised
        self._manifest: WeightManifest | None = None
        self._staged: dict[str, Tensor] = {}
        self._refusal: Exception | None = None  # the sender reads the answer to `commit` alone: it must hear the cause

    def begin(self, manifest: WeightManifest) -> None:
        """Open a version. Raises InvariantFault if it is older than the one in use or does not fit the model."""
        self._manifest, self._staged, self._refusal = None, {}, None
        if manifest.version < self.version:
            raise self._refuse(f"weights of version {manifest.version} offered, {self.version} is in use")
        offered = {spec.name: spec.shape for spec in manifest.specs}
        expected = {name: tuple(tensor.shape) for name, tensor in self._live.items()}
        if any(name.endswith((LORA_A, LORA_B)) for name in offered):
            expected = self._of_adapter(offered)
        if offered != expected:
            wrong = sorted(name for name in offered.keys() | expected if offered.get(name) != expected.get(name))
            raise self._refuse(f"weights of version {manifest.version} do not fit this model at {wrong[:5]}")
        self._manifest = manifest

    def receive(self, index: int, bucket: np.ndarray) -> None:
        """Stage bucket `index` ([n] uint8). May come in any order, a second time too."""
        manifest = self._opened()
        try:
            self._staged.update(unpack(manifest.buckets[index], manifest, bucket))
        except ValueError as error:
            raise self._refuse(str(error)) from None

    @torch.no_grad()
    def commit(self) -> str:
        """Check the digest over all staged bytes, then write them into the live tensors. Returns the digest."""
        manifest = self._opened()
        missing = [s.name for s in manifest.specs if s.alias_of is None and s.name not in self._staged]
        if missing:
            raise InvariantFault(f"weights of version {manifest.version} lack {len(missing)} tensors: {missing[:5]}")
        received = digest(manifest.version, manifest.specs, self._staged)
        if received != manifest.digest:
            raise InvariantFault(
                f"weights of version {manifest.version} arrived damaged: digest {received[:12]},"
                f" sent {manifest.digest[:12]}"
            )
        arrived = {spec.name: self._staged[spec.alias_of or spec.name] for spec in manifest.specs}
        for name, tensor in self._to_write(arrived):
            self._live[name].copy_(tensor)
        # What lies in the live model now, not what arrived; a later name may share storage.
        for name, tensor in self._to_write(arrived):
            if not torch.equal(self._live[name], tensor.to(self._live[name])):
                raise InvariantFault(f"weights of version {manifest.version}: {name} holds other numbers than sent")
        self.version, self._manifest, self._staged = manifest.version, None, {}
        return received

    def _of_adapter(self, offered: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of an adapter of the offered rank, beside layers that are here. Where there was one
        there is one now: the layer would keep the old."""
        expected = {layer + end: () for layer in self._loaded for end in (LORA_B, LORA_A)}
        for name, shape in offered.items():
            layer = name.removesuffix(LORA_A).removesuffix(LORA_B)
            if layer in self._live and len(shape) == self._live[layer].ndim == 2:
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
                    self._loaded[layer] = self._live[layer].clone()
                loaded = self._loaded[layer]
                factors = (x.to(loaded.device) for x in (tensor, arrived[layer + LORA_A]))
                yield layer, loaded.float() + torch.mm(*factors)
            elif not name.endswith(LORA_A):
                yield name, tensor

    def _refuse(self, reason: str) -> InvariantFault:
        self._refusal = self._refusal or InvariantFault(reason)
        return self._refusal

    def _opened(self) -> WeightManifest:
        if self._refusal is not None:
            raise self._refusal
        if self._manifest is None:
            raise InvariantFault("a weight bucket or commit arrived before its manifest")
        return self._manifest
