"""A rank that is lost while an engine reduces gradients is a fault of a process, as one lost in our own waits."""

import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from core.faults import ProcessFault
from trainer.ranks import Ranks

DIED = 9


def lose_a_peer(rank: int, port: int, said: "mp.Queue[str]") -> None:
    """Rank 1 dies after the first backward; rank 0 says what its second one raises."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    ranks = Ranks(rank, 2, timeout_s=60)
    model = DistributedDataParallel(torch.nn.Linear(100, 100))
    model(torch.ones(1, 100)).sum().backward()
    if rank == 1:
        os._exit(DIED)
    try:
        with ranks.may_lose_peers():
            for _ in range(2):  # what rank 1 sent before its end may suffice for the first
                model(torch.ones(1, 100)).sum().backward()
    except ProcessFault as fault:
        said.put(str(fault))


def test_a_peer_lost_in_a_collective_of_the_engine_is_a_process_fault():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    said = context.Queue()
    both = [context.Process(target=lose_a_peer, args=(rank, port, said)) for rank in range(2)]
    for process in both:
        process.start()
    try:
        assert said.get(timeout=90).startswith("learner rank 0 lost another rank")
        for process in both:
            process.join(30)
        assert [process.exitcode for process in both] == [0, DIED]
    finally:
        for process in both:
            process.kill()


def test_other_errors_of_such_a_block_stay_what_they_are():
    one, two = Ranks(), object.__new__(Ranks)
    two.index, two.size, two._timeout_s = 0, 2, 1
    for ranks, words in ((one, "[/gloo/pair.cc] reset"), (two, "the size of tensor a (3) must match")):
        with pytest.raises(RuntimeError, match="reset|must match"), ranks.may_lose_peers():
            raise RuntimeError(words)
