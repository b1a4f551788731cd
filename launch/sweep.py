"""`tokenppo sweep`: whole trainings over a grid of settings, with Ray Tune.

    tokenppo sweep --config configs/cards.yaml --grid optim.lr=1e-4,1e-3 --grid rewards.quality.weight=0.5,1 -o sweep

    this process, a Ray for Tune  -->  an actor per trial, --jobs at once  -->  `tokenppo train`, a Ray of its own

Tune decides what runs when and where; a trial is the command that one would type, in `FOLDER/<its settings>/`, with
what it says in `FOLDER/<its settings>.log`. What a trial came to stands in its run folder, so the same command again
goes on: what is finished is read, what is not goes on from its last checkpoint, and a larger grid adds trials.

A trial that fails ends no other. Ctrl-C interrupts the trials as it interrupts a run, and waits for them; a trial whose
actor dies (or this process) is told to end by the system.
"""

import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.config import parse_override
from core.faults import ProcessFault, UserError
from core.metrics import lookup
from core.plain_text import one_line
from core.schema import Config
from launch import arguments, cluster, early, run_folder

LONGEST_NAME = 120  # of a folder; file systems take 255 bytes
END_S = 20.0  # for interrupted trials: `tokenppo train` itself waits 8 s for its learner
OURS = ("run.dir", "run.name")
# Ray's own variables of the actor that starts a trial would make the trial's Ray take itself for a part of this one.
OF_ACTORS = re.compile(r"RAY_|OMP_NUM_THREADS$|TUNE_")
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Trial:
    name: str  # of its folder
    settings: dict[str, str]  # what the grid says: key -> value as it is typed
    words: list[str]  # of `tokenppo train`
    cfg: Config


@dataclass(frozen=True)
class Outcome:
    """What came of a trial. `last` and `best`: of the metric; None where it has no row with it."""

    name: str
    settings: dict[str, str]
    exit: int | None  # None: it was not begun, or said nothing
    steps: int
    last: float | None
    best: float | None
    seconds: float | None
    error: str | None

    @property
    def well(self) -> bool:
        return self.exit == 0


def grid_of(given: list[str]) -> dict[str, list[str]]:
    """`["optim.lr=1e-4,1e-3"]` -> key -> values as they are typed. A value with commas wants a YAML list of values,
    `rollout.stop_strings=[["a", "b"], []]`. Raises UserError."""
    grid: dict[str, list[str]] = {}
    for text in given:
        key, equals, values = text.partition("=")
        if not equals or not key or not values:
            raise UserError(f"--grid {text}: wants KEY=VALUE,VALUE, e.g. --grid optim.lr=1e-4,1e-3")
        if key in OURS:
            raise UserError(f"--grid {text}: each trial has a {key} of its own already; name the folder with -o")
        if key in grid:
            raise UserError(f"--grid {text}: {key} is given twice; give all its values at once")
        if values.startswith("["):
            parsed = parse_override(key, values)
            grid[key] = [value if isinstance(value, str) else json.dumps(value) for value in parsed]
        else:
            grid[key] = values.split(",")
        if "" in grid[key] or len({*grid[key]}) != len(grid[key]):
            raise UserError(f"--grid {text}: a value is missing or stands there twice")
    return grid


def trials_of(config: Path, grid: dict[str, list[str]], folder: Path, rest: list[str]) -> list[Trial]:
    """Every combination, checked as far as it can be without starting anything. Raises UserError."""
    found = []
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        name = name_of(settings)
        words = ["--config", str(config), *rest, *(f"--{key}={value}" for key, value in settings.items())]
        words += ["--run.dir", str(folder), "--run.name", name]
        cfg = arguments.parse(words).load()
        early.refuse(cfg)
        found.append(Trial(name, settings, words, cfg))
    return found


def name_of(settings: dict[str, str]) -> str:
    """Of a trial's folder: the same settings have the same, whatever else is in the grid."""
    plain = ",".join(f"{key}={value}" for key, value in sorted(settings.items()))
    told = "_".join(f"{key}-{value}" for key, value in sorted(settings.items()))
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", told)
    if name == told and len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.blake2b(plain.encode(), digest_size=4).hexdigest()}"


def outcome_of(trial: Trial, metric: str, lowest: bool, code: int | None = None) -> Outcome:
    """Out of its folder. `code`: the exit code of the process, where it ran now; else that of its summary."""
    folder = trial.cfg.run.folder
    summary = run_folder.read_summary(folder)
    values = [row[metric] for row in run_folder.read_rows(folder) if row.get(metric) is not None]
    exited = summary.get("exit") if code is None else code
    error = None
    if exited != 0:
        error = _last_words(folder.with_name(f"{trial.name}.log")) or summary.get("error")
    return Outcome(
        name=trial.name,
        settings=trial.settings,
        exit=exited,
        steps=summary.get("steps", 0),
        last=values[-1] if values else None,
        best=(min if lowest else max)(values) if values else None,
        seconds=summary.get("seconds", {}).get("whole_run"),
        error=error,
    )


def _last_words(log: Path) -> str | None:
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    ours = [line.removeprefix("tokenppo: ") for line in said if line.startswith("tokenppo: ")]
    return next(iter([*reversed(ours), *reversed(said)]), None)


def environment_of_trial(actors: Mapping[str, str], users: Mapping[str, str], gpus: float) -> dict[str, str]:
    """What a trial has, out of the environment of its actor and of that in which the sweep was typed."""
    kept = {k: v for k, v in actors.items() if not OF_ACTORS.match(k)} | {
        k: v for k, v in users.items() if OF_ACTORS.match(k)
    }
    if not gpus:  # Ray shows an actor without GPUs none; the trial sees what the user does
        kept.pop(VISIBLE, None)
        kept |= {VISIBLE: users[VISIBLE]} if VISIBLE in users else {}
    house = str(Path(__file__).resolve().parent.parent)
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [house, kept.get("PYTHONPATH")]))
    return kept


def train_trial(
    setting: dict[str, Any], words: dict[str, list[str]], folder: str, cwd: str, users: dict[str, str], gpus: float
) -> None:
    """What an actor of Tune does: the command of one trial, to its end. Reports its exit code.

    Args:
        setting: Tune's, {"trial": name}.
        users: what the environment in which the sweep was typed has of what actors have of their own.
    """
    from ray import tune

    name = setting["trial"]
    command = [sys.executable, "-P", "-m", "tokenppo", "train", *words[name]]
    with open(Path(folder) / f"{name}.log", "ab") as log:
        child = subprocess.Popen(
            command,
            env=environment_of_trial(os.environ, users, gpus),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=functools.partial(_hear_signals, os.getpid()),
        )
        tune.report({"exit": child.wait()})


def _hear_signals(parent: int) -> None:
    """Ray blocks Ctrl-C in its workers, and what they start inherits that."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    cluster.die_with_parent(parent)


def run_trials(trials: list[Trial], folder: Path, jobs: int, gpus: float) -> dict[str, int]:
    """Train them, at most `jobs` at a time; name -> exit code of those that ended.

    Raises KeyboardInterrupt on Ctrl-C, when none of them is at work any more.
    """
    users = {k: v for k, v in os.environ.items() if OF_ACTORS.match(k) or k == VISIBLE}
    ended: dict[str, int] = {}
    # Read when Tune is imported: no events for TensorBoard of its own, the folder stays, and Ctrl-C is ours.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    os.environ |= {"TUNE_DISABLE_SIGINT_HANDLER": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it misses the files of the loggers that are off
    with cluster.ray_session(trials[0].cfg, log_to_driver=False):
        from ray import tune

        class Tell(tune.Callback):
            def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
                _tell(f"{trial.config['trial']}: begins")

            def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
                ended[trial.config["trial"]] = code = trial.last_result["exit"]
                _tell(f"{trial.config['trial']}: ended with exit code {code}")

            def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
                _tell(f"{trial.config['trial']}: its process was lost")

        words = {trial.name: trial.words for trial in trials}
        trainable = tune.with_parameters(
            train_trial, words=words, folder=str(folder), cwd=str(Path.cwd()), users=users, gpus=gpus
        )
        # It wants some; the trial's own Ray counts what it needs, and `jobs` is what bounds how many there are.
        resources = {"CPU": 0.001} | ({"GPU": gpus} if gpus else {})
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources),
            param_space={"trial": tune.grid_search([trial.name for trial in trials])},
            tune_config=tune.TuneConfig(max_concurrent_trials=jobs),
            run_config=tune.RunConfig(name="tune", storage_path=str(folder / ".tune"), verbose=0, callbacks=[Tell()]),
        )
        try:
            tuner.fit()
        except KeyboardInterrupt:
            _interrupt_trials(folder)
            _tell(f"{folder}: interrupted; the same command goes on from the last checkpoints")
            raise
    return ended


def _tell(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)


def _interrupt_trials(folder: Path) -> None:
    """Send Ctrl-C to each trial that this process has started, and wait for their ends."""
    import psutil

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    mine = []
    for process in psutil.Process().children(recursive=True):
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if line[3:5] == ["tokenppo", "train"] and str(folder) in line:
            mine.append(process)
    for process in mine:
        try:
            process.send_signal(signal.SIGINT)
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(mine, timeout=END_S)


def table(outcomes: list[Outcome], metric: str) -> str:
    """The outcomes in their order, a line each."""
    keys = list(outcomes[0].settings)
    rows = [[*keys, metric, "best", "steps", "seconds", ""]]
    for o in outcomes:
        state = "" if o.well else "not begun" if o.exit is None else f"exit {o.exit}: {o.error}"
        rows.append([*o.settings.values(), _number(o.last), _number(o.best), str(o.steps), _number(o.seconds), state])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def sweep(
    config: Path,
    grid: list[str],
    folder: Path,
    *,
    metric: str | None = None,
    lowest: bool = False,
    jobs: int = 1,
    gpus: float = 0.0,
    rest: list[str] | None = None,
    as_json: bool = False,
) -> int:
    """Train what is not finished, write `sweep.json`, print the table. Exit code of the first trial that failed, or 0.

    Raises UserError before anything is started; KeyboardInterrupt.
    """
    folder = folder.absolute()
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: wants at least one trial at a time")
    if importlib.util.find_spec("ray.tune") is None or importlib.util.find_spec("pandas") is None:
        raise UserError("tokenppo sweep wants Ray Tune: pip install 'tokenppo[tune]'")
    trials = trials_of(config, grid_of(grid), folder, rest or [])
    cfg = trials[0].cfg
    if metric is None:
        metric = f"eval/{cfg.run.best_metric.removeprefix('-')}" if cfg.data.has_held_out else "reward/total"
        lowest = lowest or cfg.run.best_metric.startswith("-")
    try:
        lookup(metric)
    except KeyError as error:
        raise UserError(f"--metric {metric}: {error.args[0]}") from None
    due = [trial for trial in trials if not run_folder.examine(trial.cfg).finished]
    _tell(f"{folder}: {len(trials)} trials, {len(trials) - len(due)} finished already")
    codes: dict[str, int] = {}
    if due:
        folder.mkdir(parents=True, exist_ok=True)
        codes = run_trials(due, folder, jobs, gpus)
    outcomes = [outcome_of(trial, metric, lowest, codes.get(trial.name)) for trial in trials]
    sign = 1 if lowest else -1
    outcomes.sort(key=lambda o: (not o.well, o.last is None, sign * (o.last or 0.0)))
    told = {"metric": metric, "better": "lower" if lowest else "higher", "trials": [asdict(o) for o in outcomes]}
    run_folder.write_whole(folder / "sweep.json", json.dumps(told, indent=1) + "\n")
    print(json.dumps(told) if as_json else table(outcomes, metric))
    failed = [o for o in outcomes if not o.well]
    return next((o.exit for o in failed if o.exit), ProcessFault.exit_code) if failed else 0


def main(args: Any) -> int:
    """The verb, from its parsed arguments."""
    return sweep(
        args.config,
        args.grid,
        args.out,
        metric=args.metric,
        lowest=args.lowest,
        jobs=args.jobs,
        gpus=args.gpus,
        rest=args.rest,
        as_json=args.json,
    )
