"""Train: one process of this per learner rank.

    tokenppo train --config configs/cards.yaml --run.name first
    accelerate launch --config_file launch/accelerate/cpu.yaml -m launch.train --config configs/cards.yaml

The first line starts the second. Exit codes: core/faults.py.
"""

import inspect
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenppo

tokenppo.refuse_if_shadowed()

from core.config import load  # noqa: E402
from core.faults import TERMINATED, Fault, UserError, exit_code_of  # noqa: E402
from core.plain_text import one_line  # noqa: E402
from launch import arguments, cluster, early, run_folder  # noqa: E402
from launch.cluster import EXIT_CODE_FOLDER  # noqa: E402
from launch.last_words import raise_terminated  # noqa: E402

if TYPE_CHECKING:
    from launch.run import RunResult


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code. One line for each fault, a traceback only for a bug of ours."""
    signal.signal(signal.SIGTERM, raise_terminated)
    try:
        args = arguments.parse(argv)
        if args.help:
            print(arguments.help_text())
            return 0
        cfg = args.load()
        cluster.prepare_environment()
        if args.dry_run:
            from launch.plan import plan

            print(plan(cfg, max(args.learners, cluster.launched()[1])))
            return 0
        # What `tokenppo train` asked already; under a bare accelerate launch nobody did. The folder is rank 0's.
        if EXIT_CODE_FOLDER not in os.environ and cluster.launched()[0] == 0:
            early.refuse(cfg)
        cluster.prepare_hub(cfg)
        from launch.run import run

        result = run(cfg, lives_on=False)
        if cluster.launched()[0] == 0:
            print(run_folder.farewell(result.folder, result.summary, was_finished=result.was_finished))
        return 0
    except (Fault, KeyboardInterrupt, SystemExit) as error:
        _say(error)
        # A mistake of the user's is met by every rank, also before they have joined: rank 0 may be slower to its words.
        if cluster.launched()[0] and (getattr(error, "known_to_all", False) or isinstance(error, UserError)):
            cluster.outlast_rank_0()
        return exit_code_of(error)


def _say(error: BaseException) -> None:
    # Rank 0 says what all ranks raise. What this one met alone is said here, once for each machine.
    if cluster.launched()[0] and (getattr(error, "known_to_all", False) or os.environ.get("LOCAL_RANK") != "0"):
        return
    text = str(error) if isinstance(error, Fault) else "stopped before the end; all processes of this run were ended"
    for line in text.splitlines():
        print(f"tokenppo: {one_line(line)}", file=sys.stderr)


def train_in_process(
    *,
    model: str | dict[str, Any],
    rewards: dict[str, Any],
    prompts: list[Any] | None,
    held_out: list[Any] | None,
    config: str | Path | None,
    sections: dict[str, dict[str, Any]],
) -> "RunResult":
    """What `tokenppo.train` does; see there."""
    overrides: dict[str, Any] = {}
    for section, values in ({"model": {"path": model} if isinstance(model, str) else model} | sections).items():
        if not isinstance(values, dict):
            raise UserError(f"{section} = {values!r}: a section is a dict of its keys, see `tokenppo train --help`")
        overrides |= {f"{section}.{key}": value for key, value in values.items()}
    functions: dict[str, Callable] = {}
    for name, given in rewards.items():
        spec = dict(given) if isinstance(given, dict) else {"fn": given}
        if callable(spec.get("fn")):
            functions[name] = spec["fn"]
            spec["fn"] = _name_of(spec["fn"])
        overrides |= {f"rewards.{name}.{key}": value for key, value in spec.items()}
    inline: dict[str, list[dict[str, Any]] | None] = {"rows": None, "eval_rows": None}
    file = Path(config) if config is not None else None
    given = [
        ("data.path", "rows", "prompts.jsonl", prompts),
        ("data.eval_path", "eval_rows", "held_out.jsonl", held_out),
    ]
    overrides |= {key: name for key, _, name, rows in given if rows is not None}
    cfg = load(file, overrides)
    for key, field, name, rows in given:
        if rows is not None:  # they are kept in the folder of the run, which only now has its name
            inline[field] = [row if isinstance(row, dict) else {cfg.data.prompt_column: row} for row in rows]
            overrides[key] = str(cfg.run.folder / name)
    cfg = load(file, overrides)
    cluster.prepare_environment()
    cluster.prepare_hub(cfg)
    from launch.job import Inline
    from launch.run import run

    return run(cfg, Inline(functions=functions, **inline))


def _name_of(fn: Callable) -> str:
    """`file.py:name` where another process could load it from there, else a name that says it was handed over."""
    name = getattr(fn, "__qualname__", type(fn).__name__)
    try:
        file = inspect.getsourcefile(fn)
    except TypeError:
        file = None
    # A script that is running now would run again if it were loaded for its function.
    loadable = file and file.endswith(".py") and name.isidentifier() and fn.__module__ != "__main__"
    return f"{os.path.abspath(file)}:{name}" if loadable else f"handed_over:{name}"


if __name__ == "__main__":
    tokenppo.collect_less_often()
    codes = os.environ.get(EXIT_CODE_FOLDER)
    if codes is not None:
        cluster.die_with_parent(os.getppid())
        # Its parent is accelerate launch; where that lost its own before the line above, nobody waits for this process.
        if not Path(codes).exists():
            sys.exit(TERMINATED)
    code = 1  # of a bug of ours, whose traceback is shown
    try:
        code = main(sys.argv[1:])
    finally:
        if codes is not None and Path(codes).exists():
            (Path(codes) / str(cluster.launched()[0])).write_text(str(code))
    sys.exit(code)
