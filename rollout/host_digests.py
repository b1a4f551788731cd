"""HostDigests: each bucket in the object store is digested once per node, not once per worker.

    driver      deal(0, bucket)   deal(1, bucket)   deal(2, bucket)       waits for nothing
    worker a         digest 0                            digest 2         while the driver makes the next bucket
    worker b                           digest 1
    driver      asked: who was asked for what, and where the answer will be

All workers of a node map the same sealed object, so the bytes are the same memory, whoever reads it; whoever did keeps
it mapped, and so in its place, until the others have it too. A worker compares what it is told of it with the sender's
digests as it does its own, and takes its own where nobody answered.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One worker was asked for the digest of one bucket on its node."""

    slot: Any  # of the group, in which that worker sat
    actor: Any
    node: str
    index: int
    bucket: Any  # ObjectRef of what it was to read
    digest: Any  # ObjectRef of str

    @property
    def there(self) -> bool:
        """Whether that worker still sits there, and so keeps mapped what it read."""
        return self.slot.actor is self.actor


class HostDigests:
    def __init__(self, version: int, n_buckets: int, workers: Iterable[Any]) -> None:
        """`workers`: slots of the group whose workers serve; each has an `actor` and the `node` whose object store that
        one maps."""
        self.version, self._n_buckets = version, n_buckets
        self._of_node: dict[str, list[tuple[Any, Any]]] = {}
        for slot in workers:
            self._of_node.setdefault(slot.node, []).append((slot, slot.actor))
        self.asked: list[Asked] = []

    def deal(self, index: int, bucket: Any) -> None:
        """Have one worker of each node take the digest of a bucket, each in its turn. `bucket`: its ObjectRef."""
        for node, slots in self._of_node.items():
            if len(slots) == 1 and index == self._n_buckets - 1:
                continue  # nobody to share it with and nothing more to wait for: the commit itself takes it
            slot, actor = slots[index % len(slots)]
            digest = actor.digest_bucket.remote(self.version, index, bucket)
            self.asked.append(Asked(slot=slot, actor=actor, node=node, index=index, bucket=bucket, digest=digest))
