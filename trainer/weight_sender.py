"""WeightPublisher: one new version of the policy to every rollout worker, and proof that it is in use there.

    begin(v) -> buckets -> digest -> commit -> each worker's log-probs of a fixed prompt = the learner's

How the bytes travel is the transport's business; `launch` injects it.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from torch import Tensor

from core.faults import InvariantFault
from core.weights import Probe, WeightAck, WeightManifest, make_manifest, pack


class WeightTransport(Protocol):
    def begin(self, manifest: WeightManifest) -> None: ...

    def send(self, index: int, bucket: np.ndarray) -> None:
        """Hand over bucket `index`, [n] uint8."""
        ...

    def commit(self, probe: Probe, verify: Callable[[WeightAck], None]) -> int:
        """Wait until every worker put the version to use; `verify` every acknowledgement. Returns their number."""
        ...


class PublishingLearner(Protocol):
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
    ) -> None:
        """`tolerance`: largest difference of a probe log-prob between a worker and the learner; inf turns it off."""
        self._learner, self._transport, self._probe = learner, transport, probe
        self._bucket_bytes, self._tolerance = bucket_bytes, tolerance
        self.version = -1

    def publish(self, version: int) -> None:
        """Send the learner's weights as `version`. Raises InvariantFault if a worker does not compute with them."""
        tensors = self._learner.export_weights()
        manifest = make_manifest(version, tensors, self._bucket_bytes)
        expected = self._learner.probe_logprobs(self._probe)

        def verify(ack: WeightAck) -> None:
            difference = float(np.abs(ack.probe_logprobs - expected).max())
            if ack.version != version or ack.digest != manifest.digest:
                raise InvariantFault(f"{ack.worker} committed version {ack.version}, not {version}, or other bytes")
            if not difference <= self._tolerance:
                raise InvariantFault(
                    f"{ack.worker} computes log-probs that differ by {difference:.2g} from the learner's after it"
                    f" committed version {version} (limit {self._tolerance:.2g}): new weights arrived but are not in"
                    " use there, so it would train on samples of an old policy"
                )

        self._transport.begin(manifest)
        for index, names in enumerate(manifest.buckets):
            self._transport.send(index, pack(names, tensors))
        self._transport.commit(self._probe, verify)
        self.version = version
