"""The command `tokenppo`: starts `train`; the other verbs are in launch/verbs.py. Imports nothing heavy."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from core.faults import INTERRUPTED, TERMINATED, Fault, ProcessFault, UserError
from core.plain_text import one_line
from core.schema import Config
from launch import arguments, early, run_folder, users_code, verbs
from launch.cluster import EXIT_CODE_FOLDER, adopt_orphans, cores, die_with_parent, prepare_environment, prepare_hub
from launch.last_words import raise_terminated

GRACE_S = 8.0  # between the first signal and the killing of what is left


def main(argv: list[str]) -> int:
    """Returns the exit code; one line for each fault."""
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(verbs.help_text())
            return 0 if argv else UserError.exit_code
        if argv[0] == "train":
            return train(argv[1:])
        verb, args = verbs.parse(argv)
        return verb.start(args)
    except Fault as error:
        for line in str(error).splitlines():
            print(f"tokenppo: {one_line(line)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def train(argv: list[str]) -> int:
    """Check what was written, then start launch/train.py with the same words, once for each learner, and wait."""
    args = arguments.parse(argv)
    if args.help:
        print(arguments.help_text())
        return 0
    cfg = args.load()
    prepare_environment()
    if args.dry_run:
        from launch.plan import plan

        print(plan(cfg, args.learners, args.sharding))
        return 0
    if run_folder.examine(cfg).finished:
        print(run_folder.farewell(cfg.run.folder, run_folder.read_summary(cfg.run.folder), was_finished=True))
        return 0
    columns = early.refuse(cfg)
    prepare_hub(cfg)
    if args.accelerate is None:  # else it may want what only the launcher sets, LOCAL_RANK for one
        users_code.check_apart(cfg, columns)
    return launch(argv, args, cfg)


def launch(argv: list[str], args: arguments.TrainArguments, cfg: Config, *, machines: Sequence[str] = ()) -> int:
    """The learner processes of this machine; returns what they end with. `machines`: options of accelerate launch for
    a job on several."""
    with tempfile.TemporaryDirectory(prefix="tokenppo-") as scratch:
        codes = Path(scratch)
        # -P and PYTHONSAFEPATH: a folder `core` or `launch` where the user stands must not be taken for ours.
        command = [sys.executable, "-P"]
        environment = os.environ | {"PYTHONSAFEPATH": "1", EXIT_CODE_FOLDER: str(codes)}
        if args.accelerate is None:  # one learner: for it accelerate launch would do this, in three seconds
            environment |= {"OMP_NUM_THREADS": str(cores()), "ACCELERATE_MIXED_PRECISION": "no"}
        else:
            command += ["-m", "launch.accelerate_launch", "--quiet", "--config_file", args.accelerate, *machines]
            if args.num_processes is not None:
                command += ["--num_processes", str(args.num_processes)]
            command += ["--num_cpu_threads_per_process", str(cores())]
        command += ["-m", "launch.train", *argv]
        # In a session of its own: Ctrl-C reaches this process alone, which passes it on to the learner.
        signal.signal(signal.SIGTERM, raise_terminated)
        signal.signal(signal.SIGHUP, raise_terminated)
        guard = functools.partial(die_with_parent, os.getpid())
        adopt_orphans()
        child = None
        try:
            child = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=guard)
            child.wait()
        except (KeyboardInterrupt, SystemExit) as error:
            if child is not None:
                _stop(child, is_learner=args.accelerate is None)
            return INTERRUPTED if isinstance(error, KeyboardInterrupt) else TERMINATED
        # A rank that ended because of another one says 143; one that was killed says nothing.
        said = {file.name: int(file.read_text() or 1) for file in codes.iterdir()}
        if child.returncode and not (set(said.values()) - {0, TERMINATED}):
            _kill_orphans()
            ended = f", of the others {len(said)} were ended after it" if said else ""
            raise ProcessFault(f"a learner process died without a word: no memory left, or it was killed{ended}")
        # A bug of ours on any rank is one; else what rank 0 says, which is the fault of whichever rank had it.
        codes_by_rank = [said[rank] for rank in sorted(said, key=int)]
        own = [code for code in codes_by_rank if code not in (0, TERMINATED)]
        return 1 if 1 in own else next(iter(own), max(codes_by_rank, default=1))


def _kill_orphans() -> None:
    """A learner that was killed could not end its Ray, whose last processes would take half a minute to notice."""
    import psutil

    orphans = psutil.Process().children(recursive=True)
    for process in orphans:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(orphans, timeout=GRACE_S)


def _stop(child: subprocess.Popen, *, is_learner: bool) -> None:
    """Interrupt the learners, which `child` is or has started; after GRACE_S kill every descendant that is left. Waits
    at most that long."""
    import psutil

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        family = psutil.Process(child.pid).children(recursive=True)
        learners = [] if is_learner else psutil.Process(child.pid).children()
    except psutil.NoSuchProcess:
        return
    for learner in learners or [psutil.Process(child.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself just now
            learner.send_signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE_S
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    _, alive = psutil.wait_procs([p for p in family if p.is_running()], timeout=max(0.0, deadline - time.monotonic()))
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    child.kill()
    child.wait()
