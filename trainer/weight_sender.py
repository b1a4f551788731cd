"""WeightPublisher: one new version of the policy to every rollout worker, and proof that it is in use there.

    every rank      open(v)                                             workers may already be told what will come
    every rank      gathers bucket after bucket; rank 0 sends each      no rank holds the whole of a sharded model
    rank 0          offer(digests)
    every rank      receive -> commit -> each of its workers' log-probs of a fixed prompt = this rank's own

How the bytes travel is the transport's business; `launch` injects it.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from torch import Tensor

from core.faults import InvariantFault
from core.weights import (
    Probe,
    WeightAck,
    WeightManifest,
    WeightStream,
    as_bytes,
    bucket_digest,
    in_buckets,
    make_manifest,
    version_digest,
)
from trainer.ranks import Ranks


class WeightTransport(Protocol):
    def open(self, manifest: WeightManifest) -> None:
        """All ranks call it: this version comes next. May wait for the other ranks."""
        ...

    def send(self, index: int, tensors: list[Tensor], raw: list[np.ndarray]) -> None:
        """On rank 0: hand over bucket `index`, as tensors on their device and as bytes ([n] uint8) on the host. Neither
        is kept: the next optimizer step writes into them."""
        ...

    def offer(self, digests: tuple[str, ...]) -> None:
        """On rank 0, once every bucket was sent: the other ranks may receive. One digest per bucket."""
        ...

    def receive(self, rank: int) -> tuple[str, ...]:
        """On any other rank that drives workers: wait for what rank 0 offers; its digests."""
        ...

    def commit(self, probe: Probe, verify: Callable[[WeightAck], None]) -> int:
        """Wait until every worker of this rank put the version to use; `verify` each answer. Returns their number."""
        ...


class PublishingLearner(Protocol):
    ranks: Ranks

    def stream_weights(self) -> WeightStream: ...

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
        self.digest: str | None = None  # of that version, on rank 0: of core/weights.py: version_digest

    def publish(self, version: int) -> None:
        """Send the learner's weights as `version`. All ranks call it.

        Raises:
            InvariantFault: a worker of any rank does not compute with them, or refuses them.
            TransitFault: they arrived damaged twice.
            ProcessFault: more workers were lost than the run may bear.
        """
        ranks = self._learner.ranks
        expected = self._learner.probe_logprobs(self._probe)
        weights = self._learner.stream_weights()
        manifest = make_manifest(version, weights.specs, self._bucket_bytes)
        self._transport.open(manifest)
        digests: list[str] = []
        failure: Exception | None = None
        with ThreadPoolExecutor(1, "bucket-digest") as beside:  # xxh3 and Ray's copy run without the interpreter's lock
            for index, tensors in enumerate(in_buckets(manifest, weights.tensors)):
                if ranks.is_main and failure is None:
                    # Whatever fails: the other ranks still wait for this one in the gathers that follow.
                    try:
                        raw = [as_bytes(tensor) for tensor in tensors]
                        digest = beside.submit(bucket_digest, raw)
                        try:
                            self._transport.send(index, tensors, raw)
                        except Exception as error:
                            failure = error
                        digests.append(digest.result())  # what was gathered may be freed when the next is asked for
                    except Exception as error:
                        failure = failure or error
        with ranks.together():
            if failure is not None:
                raise failure
            if ranks.is_main:
                self._transport.offer(tuple(digests))
        with ranks.together():
            if self._drives_workers:
                offered = tuple(digests) if ranks.is_main else self._transport.receive(ranks.index)
                self._transport.commit(self._probe, self._verifier(manifest, offered, expected))
        self.version, self.digest = version, version_digest(manifest, digests) if ranks.is_main else None

    def _verifier(
        self, manifest: WeightManifest, digests: tuple[str, ...], expected: np.ndarray
    ) -> Callable[[WeightAck], None]:
        digest = version_digest(manifest, digests)

        def verify(ack: WeightAck) -> None:
            difference = float(np.abs(ack.probe_logprobs - expected).max())
            if ack.version != manifest.version or ack.digest != digest:
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
