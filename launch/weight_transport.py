"""Weights through Ray's object store: each bucket is put once, every worker reads it from there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import ray

from core.weights import Probe, WeightAck, WeightManifest
from rollout.group import RolloutGroup, WeightUpdate


class ObjectStoreTransport:
    """Implements trainer.weight_sender.WeightTransport over a RolloutGroup."""

    def __init__(self, group: RolloutGroup, timeout_s: float) -> None:
        self._group, self._timeout_s = group, timeout_s
        self._manifest: WeightManifest | None = None
        self._buckets: list[Any] = []

    def begin(self, manifest: WeightManifest) -> None:
        self._manifest, self._buckets = manifest, [None] * len(manifest.buckets)

    def send(self, index: int, bucket: np.ndarray) -> None:
        self._buckets[index] = ray.put(bucket)

    def commit(self, probe: Probe, verify: Callable[[WeightAck], None]) -> int:
        assert self._manifest is not None and None not in self._buckets, "commit before every bucket was sent"
        update = WeightUpdate(self._manifest, self._buckets, probe, verify)
        return self._group.update_weights(update, self._timeout_s)
