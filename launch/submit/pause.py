"""Before a pod ends: have its run save, and wait until it has.

    python -P -m launch.submit.pause RUN --wait-s 300                 in the pod of the learner
    python -P -m launch.submit.pause RUN --wait-s 300 --ask-nothing   in a pod whose rollouts that save still wants

Kubernetes calls this (preStop) and sends the signals that end the pod once it returns. The run is asked by a file
`pause` in its folder; it ends with exit code 8 after the step that it is in.
"""

import argparse
import sys
import time
from pathlib import Path

from core.faults import ProcessFault
from launch import run_folder

LOOK_S = 0.5


def main(argv: list[str]) -> int:
    """Returns 0 once no process holds the run folder; 3 after --wait-s seconds, and takes the wish to pause back, so
    that the next start of the run does not end after one step."""
    parser = argparse.ArgumentParser(prog="python -m launch.submit.pause", allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("--wait-s", type=float, required=True)
    parser.add_argument("--ask-nothing", action="store_true", help="wait only: where all pods go, the learner's asks")
    args = parser.parse_args(argv)
    if not (args.run / "config.yaml").is_file() or not run_folder.at_work(args.run):
        return 0
    wish = args.run / run_folder.PAUSE
    if not args.ask_nothing:
        wish.touch()
    deadline = time.monotonic() + args.wait_s
    while run_folder.at_work(args.run):
        if time.monotonic() > deadline:
            if not args.ask_nothing:
                wish.unlink(missing_ok=True)
            print(f"tokenppo: {args.run}: has not saved within {args.wait_s:g} s", file=sys.stderr)
            return ProcessFault.exit_code
        time.sleep(LOOK_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
