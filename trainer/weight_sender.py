"""WeightPublisher: one new version of the policy to every rollout worker, and proof that it is in use there.

    rank 0          begin(v) -> buckets -> offer                        one copy of the weights leaves the learner
    every rank      receive -> commit -> each of its workers' log-probs of a fixed prompt = this rank's own

How the bytes travel is the transport's business; `launch` injects it.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from torch import Tensor

from core.faults import InvariantFault
from core.weights import Probe, WeightAck, WeightManifest, make_manifest, pack
from trainer.ranks import Ranks


class WeightTransport(Protocol):
    def begin(self, manifest: WeightManifest) -> None: ...

    def send(self, index: int, bucket: np.ndarray) -> None:
        """Hand over bucket `index`, [n] uint8."""
        ...

    def offer(self) -> None:
        """On rank 0, once every bucket was sent: the other ranks may receive."""
        ...

    def receive(self, rank: int) -> WeightManifest:
        """On any other rank that drives workers: wait for what rank 0 offers."""
        ...

    def commit(self, probe: Probe, verify: Callable[[WeightAck], None]) -> int:
        """Wait until every worker of this rank put the version to use; `verify` each answer. Returns their number."""
        ...


class PublishingLearner(Protocol):
    ranks: Ranks

    def export_weights(self) -> dict[str, Tensor]: ...

    def probe_logprobs(self, probe: Probe) -> np.ndarray: ...


class WeightPublisher:
    def __init__(
        self,
        learner: PublishingLearner,
        transport: WeightTransport,
        probe: Probe,
        *,
        bucket_bytes: int,
        tolerance: float,
        drives_workers: bool = True,
    ) -> None:
        """
        Args:
            tolerance: largest difference of a probe log-prob between a worker and the learner; inf turns it off.
            drives_workers: this rank has workers of its own to give weights to.
        """
        self._learner, self._transport, self._probe = learner, transport, probe
        self._bucket_bytes, self._tolerance, self._drives_workers = bucket_bytes, tolerance, drives_workers
        self.version = -1

    def publish(self, version: int) -> None:
        """Send the learner's weights as `version`. All ranks call it.

        Raises InvariantFault if a worker of any rank does not compute with them.
        """
        ranks = self._learner.ranks
        tensors = self._learner.export_weights()
        expected = self._learner.probe_logprobs(self._probe)
        manifest: WeightManifest | None = None
        with ranks.together():
            if ranks.is_main:
                manifest = self._send(version, tensors)
        with ranks.together():
            if self._drives_workers:
                manifest = manifest or self._transport.receive(ranks.index)
                self._transport.commit(self._probe, self._verifier(manifest, expected))
        self.version = version

    def _send(self, version: int, tensors: dict[str, Tensor]) -> WeightManifest:
        manifest = make_manifest(version, tensors, self._bucket_bytes)
        self._transport.begin(manifest)
        for index, names in enumerate(manifest.buckets):
            self._transport.send(index, pack(names, tensors))
        self._transport.offer()
        return manifest

    def _verifier(self, manifest: WeightManifest, expected: np.ndarray) -> Callable[[WeightAck], None]:
        def verify(ack: WeightAck) -> None:
            difference = float(np.abs(ack.probe_logprobs - expected).max())
            if ack.version != manifest.version or ack.digest != manifest.digest:
                raise InvariantFault(
                    f"{ack.worker} committed version {ack.version}, not {manifest.version}, or other bytes"
                )
            if not difference <= self._tolerance:
                raise InvariantFault(
                    f"{ack.worker} computes log-probs that differ by {difference:.2g} from the learner's after it"
                    f" committed version {ack.version} (limit {self._tolerance:.2g}): new weights arrived but are not"
                    " in use there, so it would train on samples of an old policy"
                )

        return verify
