"""One of two ranks that add up a tensor: `python rank.py RANK BACKEND FOLDER`, prints what came of it as JSON.

Started as a file and importing nothing of ours, so that it says what torch can do and no more.
"""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

ELEMENTS, ROUNDS, WAIT_S = 2**21, 4, 30.0  # 8 MiB


def main(rank: int, backend: str, folder: Path) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=WAIT_S))
    seconds = []
    for _ in range(1 + ROUNDS):  # the first connects
        x = torch.full((ELEMENTS,), rank + 1.0, device=device)
        begun = time.perf_counter()
        distributed.all_reduce(x)
        right = bool((x == 3).all())
        seconds.append(time.perf_counter() - begun)
    distributed.destroy_process_group()
    print(json.dumps({"right": right, "mib_s": 4 * ELEMENTS / 2**20 / min(seconds[1:])}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
