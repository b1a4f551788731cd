"""A process group of its own for weights: the sender is rank 0, each worker one more. Nobody's default group.

    sender     Rendezvous on a free port  --through Ray-->  workers
    all        join: connect to each other (waits for all, `timeout_s`)
    all        broadcast of one flat buffer after the other, `timeout_s` each

Who loses a peer drops its own connections, so that those who wait for it hear of it at once and not at their deadline.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    host: str
    port: int
    number: int  # of this group on that store: groups follow each other
    size: int
    timeout_s: float


def open_store(host: str, timeout_s: float) -> dist.TCPStore:
    """On the sender: where the members of all its groups find each other. The system picks the port."""
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


class BroadcastGroup:
    def __init__(self, place: Rendezvous, rank: int, device: torch.device, store: dist.Store | None = None) -> None:
        """Waits until all members are here; RuntimeError at the deadline, or when one is lost.

        Args:
            rank: 0 sends.
            store: the sender's own; others connect to it.
        """
        patience = timedelta(seconds=place.timeout_s)
        if store is None:
            store = dist.TCPStore(place.host, place.port, is_master=False, timeout=patience)
        self._store = dist.PrefixStore(f"weights/{place.number}", store)
        self._timeout = patience
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = patience
            self._group = dist.ProcessGroupNCCL(self._store, rank, place.size, options)
        else:
            self._group = dist.ProcessGroupGloo(self._store, rank, place.size, patience)

    def broadcast(self, flat: Tensor) -> None:
        """`flat` ([n] uint8) of rank 0 into that of every other rank. RuntimeError where a peer is lost or late."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, self._timeout
        self._group.broadcast([flat], options).wait(self._timeout)
        if flat.is_cuda:  # NCCL's wait is for the stream, not for the host
            torch.cuda.synchronize(flat.device)
