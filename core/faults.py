"""Every way a run can end other than well: one class per kind of fault, each with the exit code of the process.

| exit | class | meaning |
|---|---|---|
| 0 | | the run ended well |
| 1 | | a bug of ours: the traceback is shown |
| 2 | UserError | what was written in a file or on the command line cannot work; nothing was started or lost |
| 3 | ProcessFault | a process died or missed its deadline more often than the run may bear |
| 4 | RewardFault | rewards could not be computed for more samples than the run may lose |
| 5 | InvariantFault | training would go on with wrong numbers (stale weights, NaN); of `replay`: a stage differs |
| 6 | StorageFault | a file of the run could not be written or read back whole |
| 7 | UnmetRequirement | an evaluation does not show what `--require` asks for |
| 8 | Paused | the run was asked to pause and has saved: the same command goes on |
| 130 | | interrupted (Ctrl-C) |
| 143 | | terminated (SIGTERM) |
"""


class Fault(Exception):
    """A failure with a name, a remedy in its message, and an exit code."""

    exit_code = 1


class UserError(Fault):
    """What the user wrote cannot work: the message names key, value and remedy in one line."""

    exit_code = 2


class EnvironmentFault(UserError):
    """The environment of the rollouts raised, gave what is no text, or missed its deadline. What it is given decides
    what it does, so that another worker would see the same: the run ends."""


class ProcessFault(Fault):
    """A worker, actor or peer died, or did not answer within its deadline."""

    exit_code = 3


class RewardFault(Fault):
    """A component raised, or answered with something that is no reward."""

    exit_code = 4


class InvariantFault(Fault):
    """Numbers that must be equal are not: training on would learn from wrong data."""

    exit_code = 5


class TransitFault(InvariantFault):
    """Weights did not arrive as they were sent; a second delivery may. A worker's live weights are as they were."""


class StorageFault(Fault):
    """A file of the run could not be written, or what was written is damaged."""

    exit_code = 6


class UnmetRequirement(Fault):
    """An evaluation went well, and does not show what was asked of it: each line names one requirement and why."""

    exit_code = 7


class Paused(Fault):
    """A run was asked to pause (a file `pause` in its folder): it has saved, and the same command goes on. Raised on
    every rank after the same step."""

    exit_code = 8
    known_to_all = True


INTERRUPTED = 130
TERMINATED = 143


def exit_code_of(error: BaseException) -> int:
    """The exit code that a process ends with because of `error`."""
    if isinstance(error, Fault):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 1
