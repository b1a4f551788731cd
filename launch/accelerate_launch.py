"""`accelerate launch`, without the pages of traceback with which it tells that a process of ours ended with a fault.

    python -m launch.accelerate_launch --config_file launch/accelerate/ddp.yaml -m launch.train --config ...

Our process has said in one line what was wrong, and `tokenppo train` reads its exit code.
"""

import logging
import sys

import tokenppo
from launch import cluster

tokenppo.collect_less_often()
cluster.prepare_environment()

from accelerate.commands.launch import launch_command, launch_command_parser  # noqa: E402


def main(argv: list[str]) -> int:
    """Exit code 0, or 1 if any process failed."""
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(argv))
    except (ChildFailedError, SignalException):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
