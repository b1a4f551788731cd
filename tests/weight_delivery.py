"""A weight sync within one process: what a transport does, without one."""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from core.weights import WeightManifest, WeightStream, as_bytes, bucket_digest, in_buckets, make_manifest
from rollout.weight_receiver import WeightReceiver


def receiver_of(live: dict[str, Tensor]) -> WeightReceiver:
    return WeightReceiver(lambda: live)


def packed(
    tensors: dict[str, Tensor], version: int, bucket_bytes: int = 5000
) -> tuple[WeightManifest, list[list[np.ndarray]], tuple[str, ...]]:
    """Manifest, the bytes of each bucket (copies, as on the other side of a wire), and their digests."""
    stream = WeightStream.of(tensors)
    manifest = make_manifest(version, stream.specs, bucket_bytes)
    buckets = [[as_bytes(x).copy() for x in bucket] for bucket in in_buckets(manifest, stream.tensors)]
    return manifest, buckets, tuple(map(bucket_digest, buckets))


def send(
    receiver: WeightReceiver,
    tensors: dict[str, Tensor],
    version: int,
    bucket_bytes: int = 5000,
    spoil: Callable[[list[list[np.ndarray]]], None] = lambda buckets: None,
) -> str:
    manifest, buckets, digests = packed(tensors, version, bucket_bytes)
    spoil(buckets)
    receiver.begin(manifest)
    for index, pieces in enumerate(buckets):
        receiver.receive(index, pieces)
    return receiver.commit(digests)
