"""What the user wrote, loaded before anything is started: rewards, environment, augmentation.

The learner asks the same, after seconds of imports. So `tokenppo train` asks first, in a process that is thrown away:
a component may import anything, and this one stays as long as the run does.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection

from core.faults import UserError
from core.schema import Config
from launch import early, environment

PATIENCE_S = 2.0  # what takes longer, the import of torch for one, is left to the learner


def check(cfg: Config, columns: set[str] | None) -> None:
    """Raise UserError. `columns`: those of the data that reach the rewards; None where that is not known yet."""
    early.check_rewards(cfg, columns=columns)
    environment.check(cfg)
    early.check_augment(cfg)


def check_apart(cfg: Config, columns: set[str] | None) -> None:
    """`check` in a process of its own, whose answer is waited for no longer than PATIENCE_S."""
    here = multiprocessing.get_context("fork")
    ours, theirs = here.Pipe(duplex=False)
    process = here.Process(target=_answer, args=(theirs, cfg, columns))
    process.start()
    theirs.close()
    try:
        refusal = ours.recv() if ours.poll(PATIENCE_S) else None
    except EOFError:  # it died, of what the learner will meet too and put in words
        refusal = None
    finally:
        ours.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it is over, or has no group of its own yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    if refusal is not None:
        raise UserError(refusal)


def _answer(to: Connection, cfg: Config, columns: set[str] | None) -> None:
    """Send the words of a UserError, or None."""
    os.setsid()  # with all that the user's code may start
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    silent = os.open(os.devnull, os.O_WRONLY)  # the learner shows what it prints
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    sys.stdout = sys.stderr = os.fdopen(silent, "w")
    try:
        check(cfg, columns)
    except UserError as error:
        to.send(str(error))
    else:
        to.send(None)
