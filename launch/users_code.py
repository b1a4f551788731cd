"""What the user wrote, loaded before anything is started: rewards, environment, augmentation.

The learner asks the same, after seconds of imports. So `tokenppo train` asks first, in a process that is thrown away,
with all that it started: a component may import anything, and this one stays as long as the run does.
"""

import contextlib
import json
import os
import select
import signal
import sys
import time

from core.faults import UserError
from core.schema import Config
from launch import cluster, early, environment

PATIENCE_S = 2.0  # what takes longer, the import of torch for one, is left to the learner


def check(cfg: Config, columns: set[str] | None) -> None:
    """Raise UserError. `columns`: those of the data that reach the rewards; None where that is not known yet."""
    early.check_rewards(cfg, columns=columns)
    environment.check(cfg)
    early.check_augment(cfg)


def check_apart(cfg: Config, columns: set[str] | None) -> None:
    """`check` in a process of its own, whose answer is waited for no longer than PATIENCE_S."""
    with cluster.orphans_adopted():  # what it starts and leaves behind can be found then
        said = _ask(cfg, columns)
    refusal = json.loads(said) if said.endswith(b"\n") else None  # else it died, or is at work: the learner will say
    if refusal is not None:
        raise UserError(refusal)


def _ask(cfg: Config, columns: set[str] | None) -> bytes:
    """Fork, and return what the child says, empty where it died and unfinished where it is still at work."""
    import psutil

    before = {child.pid for child in psutil.Process().children()}
    reading, writing = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            _answer(writing, parent, cfg, columns)
        finally:
            os._exit(0)
    os.close(writing)
    try:
        return _read(reading)
    finally:
        os.close(reading)
        _end(pid, before)


def _read(pipe: int) -> bytes:
    """What is written until it is closed, or PATIENCE_S are over."""
    said, until = b"", time.monotonic() + PATIENCE_S
    while (left := until - time.monotonic()) > 0 and select.select([pipe], [], [], left)[0]:
        more = os.read(pipe, 2**16)
        said += more
        if not more or said.endswith(b"\n"):
            break
    return said


def _end(pid: int, before: set[int]) -> None:
    """Kill the process and whatever it started, in sessions of their own too."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(pid).children(recursive=True)
        for process in [psutil.Process(pid), *family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    os.waitpid(pid, 0)
    while orphans := [child for child in psutil.Process().children() if child.pid not in before]:
        for child in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(orphans, timeout=1)


def _answer(to: int, parent: int, cfg: Config, columns: set[str] | None) -> None:
    """Write the words of a UserError, or null, as a line of JSON; then wait to be killed."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    cluster.die_with_parent(parent)
    silent = os.open(os.devnull, os.O_WRONLY)  # the learner shows what it prints
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    sys.stdout = sys.stderr = os.fdopen(silent, "w")
    refusal = None
    try:
        check(cfg, columns)
    except UserError as error:
        refusal = str(error)
    os.write(to, json.dumps(refusal).encode() + b"\n")
    signal.pause()
