"""The command `tokenppo`: verbs by argparse, keys of `train` from the schema. Imports nothing heavy."""

import argparse
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from core.faults import INTERRUPTED, TERMINATED, Fault, ProcessFault
from core.schema import Config
from launch import arguments, early, run_folder
from launch.cluster import EXIT_CODE_FOLDER, adopt_orphans, cores, die_with_parent, prepare_environment, prepare_hub

GRACE_S = 8.0  # between the first signal and the killing of what is left


def main(argv: list[str]) -> int:
    """Returns the exit code; one line for each fault."""
    parser = argparse.ArgumentParser(
        prog="tokenppo",
        description="RLHF in which every token is rewarded.",
        epilog="first steps:\n  tokenppo train --config configs/cards.yaml\n  tokenppo train --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    verbs.add_parser("train", add_help=False, help="train a model; `tokenppo train --help` lists every key")
    evaluate = verbs.add_parser("evaluate", help="score held-out prompts with the weights of a finished run")
    evaluate.add_argument("run", metavar="RUN", help="path of a run folder")
    evaluate.add_argument("--weights", choices=("final", "best", "base"), default="final", help="default final")
    evaluate.add_argument("--data", help="other prompts than data.eval_path of the run")
    evaluate.set_defaults(do=_evaluate)
    samples = verbs.add_parser("sample", help="show what a trained model answers, and what each token of it earns")
    samples.add_argument("run", metavar="RUN", help="path of a run folder")
    samples.add_argument("text", metavar="TEXT", nargs="?", help="the prompt; without it the first held-out one")
    samples.add_argument(
        "--row", type=int, metavar="N", help="the held-out (or training) prompt of this number, from 0"
    )
    samples.add_argument("--weights", choices=("final", "best", "base"), default="final", help="default final")
    samples.add_argument("--compare", choices=("final", "best", "base"), help="show the answers of these weights too")
    samples.add_argument("-n", type=int, default=1, metavar="N", help="answers of each model, default 1")
    samples.add_argument("--seed", type=int, default=0, help="of the draws, default 0: the same answers each time")
    samples.add_argument("--max-new-tokens", type=int, metavar="N", help="default rollout.max_new_tokens of the run")
    samples.add_argument("--component", metavar="NAME", help="colour by the raw rewards of this one, not by the sum")
    samples.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto")
    samples.add_argument("--json", action="store_true", help="every number of every token as one JSON object")
    samples.set_defaults(do=_sample)
    export = verbs.add_parser("export", help="write the model of a run, with a card, for others or for the hub")
    export.add_argument("run", metavar="RUN", help="path of a run folder")
    export.add_argument("out", metavar="OUT", help="folder to write; it must not exist")
    export.add_argument("--weights", choices=("final", "best"), default="final", help="default final")
    export.add_argument("--push", metavar="OWNER/NAME", help="upload it too; a new repository is private")
    export.set_defaults(do=_export)
    checks = verbs.add_parser("check-reward", help="try a reward function on samples: is it sound, what does it pay")
    checks.add_argument("fn", metavar="FILE:FN", help="my_rewards.py:polite, package.module:fn, verl:FILE:FN, ...")
    checks.add_argument("--data", metavar="F", help="rows with prompt and completion; else built-in samples")
    checks.add_argument("--options", metavar="YAML", help="options of the function, e.g. '{scale: 0.1}'")
    checks.add_argument("--model", metavar="PATH", help="cut into the tokens of this model, else into words")
    checks.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for components that are models")
    checks.add_argument("--json", action="store_true", help="the report as one JSON object")
    checks.set_defaults(do=_check_reward)
    serve = verbs.add_parser("serve-reward", help="score for other machines and programs over HTTP")
    serve.add_argument("--config", metavar="F", required=True, help="file with the section `rewards`")
    serve.add_argument(
        "--host", default="127.0.0.1", help="default 127.0.0.1; an address that others reach wants a token"
    )
    serve.add_argument("--port", type=int, default=8080, help="default 8080; 0 is any free one")
    serve.add_argument("--token-file", metavar="F", help="secret that callers must send; else $TOKENPPO_REWARD_TOKEN")
    serve.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for components that are models")
    serve.set_defaults(do=_serve_reward)
    health = verbs.add_parser("health", help="exit 0 if this installation and the runs at work are well, 3 if not")
    health.add_argument("dir", metavar="DIR", nargs="?", default="runs", help="folder of all runs, default runs")
    health.add_argument("--stale-s", type=float, default=3600, help="seconds a run may write nothing, default 3600")
    health.set_defaults(do=_health)
    try:
        if argv[:1] == ["train"]:
            return train(argv[1:])
        args = parser.parse_args(argv)
        return args.do(args)
    except Fault as error:
        for line in str(error).splitlines():
            print(f"tokenppo: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def _evaluate(args: argparse.Namespace) -> int:
    import tokenppo

    means = tokenppo.evaluate(args.run, weights=args.weights, data=args.data)
    width = max(map(len, means))
    print("\n".join(f"{name:<{width}}  {value:.4g}" for name, value in means.items()))
    return 0


def _sample(args: argparse.Namespace) -> int:
    prepare_environment()  # keeps libraries quiet, and is read when they are imported
    from launch.sample import main

    return main(args)


def _export(args: argparse.Namespace) -> int:
    from launch.export import export_run

    print(export_run(Path(args.run), Path(args.out), weights=args.weights, push=args.push))
    return 0


def _check_reward(args: argparse.Namespace) -> int:
    from launch.check_reward import main

    return main(args)


def _serve_reward(args: argparse.Namespace) -> int:
    from launch.serve_reward import main

    return main(args)


def _health(args: argparse.Namespace) -> int:
    from launch.health import report

    print(report(Path(args.dir), args.stale_s))
    return 0


def train(argv: list[str]) -> int:
    """Check what was written, then start `accelerate launch -m launch.train` with the same words and wait for it."""
    args = arguments.parse(argv)
    if args.help:
        print(arguments.help_text())
        return 0
    cfg = args.load()
    prepare_environment()
    if args.dry_run:
        from launch.plan import plan

        print(plan(cfg, args.learners))
        return 0
    if run_folder.examine(cfg).finished:
        print(run_folder.farewell(cfg.run.folder, run_folder.read_summary(cfg.run.folder), was_finished=True))
        return 0
    early.refuse(cfg)
    prepare_hub(cfg)
    return _launch(argv, args, cfg)


def accelerate_config(cfg: Config) -> Path:
    """The accelerate file for one process on this machine."""
    gpu = cfg.resources.device != "cpu" and shutil.which("nvidia-smi") is not None
    return arguments.accelerate_file("gpu" if gpu else "cpu")


def _launch(argv: list[str], args: arguments.TrainArguments, cfg: Config) -> int:
    with tempfile.TemporaryDirectory(prefix="tokenppo-") as scratch:
        codes = Path(scratch)
        # -P and PYTHONSAFEPATH: a folder `core` or `launch` where the user stands must not be taken for ours.
        command = [sys.executable, "-P", "-m", "launch.accelerate_launch", "--quiet"]
        command += ["--config_file", args.accelerate or str(accelerate_config(cfg))]
        if args.num_processes is not None:
            command += ["--num_processes", str(args.num_processes)]
        command += ["--num_cpu_threads_per_process", str(cores()), "-m", "launch.train", *argv]
        environment = os.environ | {"PYTHONSAFEPATH": "1", EXIT_CODE_FOLDER: str(codes)}
        # In a session of its own: Ctrl-C reaches this process alone, which passes it on to the learner.
        signal.signal(signal.SIGTERM, _raise_terminated)
        signal.signal(signal.SIGHUP, _raise_terminated)
        guard = functools.partial(die_with_parent, os.getpid())
        adopt_orphans()
        child = None
        try:
            child = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=guard)
            child.wait()
        except (KeyboardInterrupt, SystemExit) as error:
            if child is not None:
                _stop(child)
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


def _raise_terminated(signum: int, frame: object) -> None:
    raise SystemExit(TERMINATED)


def _kill_orphans() -> None:
    """A learner that was killed could not end its Ray, whose last processes would take half a minute to notice."""
    import psutil

    orphans = psutil.Process().children(recursive=True)
    for process in orphans:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(orphans, timeout=GRACE_S)


def _stop(child: subprocess.Popen) -> None:
    """Interrupt the learner; after GRACE_S kill every descendant that is left. Waits at most that long."""
    import psutil

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        family = psutil.Process(child.pid).children(recursive=True)
        learners = psutil.Process(child.pid).children()
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
