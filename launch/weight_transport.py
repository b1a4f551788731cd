"""Weights through Ray's object store: rank 0 puts each bucket once, the workers of all ranks read it from there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import ray

from core.weights import Probe, WeightAck, WeightManifest
from rollout.group import WeightUpdate
from rollout.shares import Exchange, Rollouts


class ObjectStoreTransport:
    """Implements trainer.weight_sender.WeightTransport over the rollouts of one rank."""

    def __init__(
        self, rollouts: Rollouts, timeout_s: float, exchange: Exchange | None = None, followers: tuple[int, ...] = ()
    ) -> None:
        """`followers`: on rank 0, the other ranks that drive workers; they get references of the same buckets."""
        self._rollouts, self._timeout_s, self._exchange, self._followers = rollouts, timeout_s, exchange, followers
        self._manifest: WeightManifest | None = None
        self._buckets: list[Any] = []

    def begin(self, manifest: WeightManifest) -> None:
        self._manifest, self._buckets = manifest, [None] * len(manifest.buckets)

    def send(self, index: int, bucket: np.ndarray) -> None:
        self._buckets[index] = ray.put(bucket)

    def offer(self) -> None:
        assert self._manifest is not None and None not in self._buckets, "an offer before every bucket was sent"
        for rank in self._followers:
            self._exchange.post(("weights", rank), [self._manifest, *self._buckets])

    def receive(self, rank: int) -> WeightManifest:
        self._manifest, *self._buckets = self._exchange.take(("weights", rank))
        return self._manifest

    def commit(self, probe: Probe, verify: Callable[[WeightAck], None]) -> int:
        assert self._manifest is not None and None not in self._buckets, "commit before every bucket was sent"
        update = WeightUpdate(self._manifest, self._buckets, probe, verify)
        return self._rollouts.update_weights(update, self._timeout_s)
