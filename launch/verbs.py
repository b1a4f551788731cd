"""The verbs of the command `tokenppo` but `train`: what each takes, an example, and who does it. Imports nothing heavy.

    verb, args = parse(["sample", "runs/demo", "-n", "2"])
    exit_code = verb.start(args)

What a verb does lies in a module of its own, imported when it is done.
"""

import argparse
import difflib
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from core.faults import UserError
from launch import arguments, evaluation_task, run_folder

WEIGHTS = ("final", "best", "base")
FIRST_STEPS = "tokenppo train --config configs/cards.yaml"


@dataclass(frozen=True, kw_only=True)
class Verb:
    name: str
    help: str  # one line, in the list of verbs
    examples: tuple[str, ...]  # complete commands; the first in the list that --help ends with
    arguments: Callable[[argparse.ArgumentParser], None]
    do: Callable[[argparse.Namespace], int]  # gives the exit code; raises Fault
    overrides: bool = False  # takes `--section.key value` too: args.overrides, key -> value; args.words, as written

    def start(self, args: argparse.Namespace) -> int:
        """Do it; a run that is not there is told before its module, which may import for seconds. Raises Fault."""
        for run in [args.run] if "run" in args else getattr(args, "runs", []):
            run_folder.refuse_no_run(run)
        return self.do(args)

    def parser(self) -> argparse.ArgumentParser:
        examples = "".join(f"\n  {line}" for line in self.examples)
        parser = _Parser(
            prog=f"tokenppo {self.name}",
            description=self.help[0].upper() + self.help[1:] + ".",
            epilog=f"example{'s' * (len(self.examples) > 1)}:{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # a script must not change its meaning when a verb gets another option
        )
        self.arguments(parser)
        return parser


class _Parser(argparse.ArgumentParser):
    """One whose mistakes are a UserError of one line, with the nearest option where one is meant."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown == message:
            raise UserError(f"{self.prog.removeprefix('tokenppo ')}: {message}; see {self.prog} --help")
        given = unknown.split()[0].partition("=")[0]
        raise UserError(f"{given}: {self.prog} has no such option{_nearest(given, self._option_string_actions)}")


def _nearest(given: str, known: object) -> str:
    close = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def parse(argv: list[str]) -> tuple[Verb, argparse.Namespace]:
    """Raises UserError for a verb or an option that is none; SystemExit(0) after --help."""
    name = argv[0]
    verb = next((verb for verb in VERBS if verb.name == name), None)
    if verb is None:
        kind = "option" if name.startswith("-") else "verb"
        hint = _nearest(name, ["train", *(verb.name for verb in VERBS)])
        raise UserError(f"{name}: tokenppo has no such {kind}{hint or '; see tokenppo --help'}")
    rest, overrides, words = argv[1:], {}, []
    if verb.overrides:
        rest, overrides, words = arguments.take_overrides(rest)
    args = verb.parser().parse_args(rest)
    args.overrides, args.words = overrides, words
    return verb, args


def help_text() -> str:
    rows = [("train", "train a model; `tokenppo train --help` lists every key"), *((v.name, v.help) for v in VERBS)]
    width = max(len(name) for name, _ in rows)
    lines = "\n".join(
        textwrap.fill(text, 100, initial_indent=f"  {name:<{width}}  ", subsequent_indent=" " * (width + 4))
        for name, text in rows
    )
    return (
        f"usage: tokenppo VERB ...\n\nRLHF in which every token is rewarded.\n\nverbs:\n{lines}\n\n"
        f"`tokenppo VERB --help` says what a verb takes, with examples.\n\nfirst steps:\n  {FIRST_STEPS}\n"
        "  tokenppo train --help"
    )


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="path of a run folder")


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", metavar="RUN|MODEL", help="a run folder, a model folder or a hub id (owner/name)")
    parser.add_argument("--weights", choices=WEIGHTS, default="final", help="of RUN, default final")
    parser.add_argument(
        "--against", metavar="RUN|MODEL|base", help="compare with this: base, best or final is that of the same run"
    )
    parser.add_argument(
        "--config", metavar="F", help="prompts and rewards of this file, as for train; default: those of the run"
    )
    parser.add_argument("--data", metavar="F", help="other prompts than data.eval_path")
    parser.add_argument("--prompts", type=int, metavar="N", help="the first N prompts, default data.eval_prompts")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="answers to each prompt, default 1")
    parser.add_argument(
        "--metric", metavar="NAME", help="who has more of this wins (--metric=-NAME: less); default run.best_metric"
    )
    parser.add_argument("--by", metavar="COLUMN", help="the same by slices: for each value of this column of the data")
    parser.add_argument(
        "--require",
        metavar="EXPR",
        action="append",
        default=[],
        help="exit 7 unless the 95%% interval shows it: 'slot_error < 0.1', 'reward/total > base'; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")


def _eval(args: argparse.Namespace) -> int:
    from launch.cluster import prepare_environment

    evaluation_task.read(  # what cannot work is told before seconds of imports
        args.policy,
        weights=args.weights,
        against=args.against,
        config=args.config,
        data=args.data,
        prompts=args.prompts,
        samples=args.samples,
        metric=args.metric,
        require=args.require,
    )
    prepare_environment()  # before torch and ray are imported
    from launch.evaluate import main

    return main(args)


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    _run(parser)
    parser.add_argument("text", metavar="TEXT", nargs="?", help="the prompt; without it the first held-out one")
    parser.add_argument("--row", type=int, metavar="N", help="the held-out (or training) prompt of this number, from 0")
    parser.add_argument("--weights", choices=WEIGHTS, default="final", help="default final")
    parser.add_argument("--compare", choices=WEIGHTS, help="show the answers of these weights too")
    parser.add_argument("-n", type=int, default=1, metavar="N", help="answers of each model, default 1")
    parser.add_argument("--seed", type=int, default=0, help="of the draws, default 0: the same answers each time")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default rollout.max_new_tokens of the run")
    parser.add_argument("--component", metavar="NAME", help="colour by the raw rewards of this one, not by the sum")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto")
    parser.add_argument("--json", action="store_true", help="every number of every token as one JSON object")


def _sample(args: argparse.Namespace) -> int:
    from launch.cluster import prepare_environment

    prepare_environment()  # keeps libraries quiet, and is read when they are imported
    from launch.sample import main

    return main(args)


def _watch_arguments(parser: argparse.ArgumentParser) -> None:
    _run(parser)
    parser.add_argument("--once", action="store_true", help="show it as it is now, and end")


def _watch(args: argparse.Namespace) -> int:
    from launch.watch import watch

    return watch(args.run, once=args.once)


def _reweight_arguments(parser: argparse.ArgumentParser) -> None:
    _run(parser)
    parser.add_argument("--step", type=int, metavar="N", help="default the last that the ledger has")
    parser.add_argument(
        "--grid", action="append", metavar="NAME=W,W", help="weights of a component to try, each with each; repeatable"
    )
    parser.add_argument(
        "--gradient", choices=WEIGHTS, metavar="WEIGHTS", help="compare gradients too, at base, best or final weights"
    )
    parser.add_argument("-o", dest="out", type=Path, metavar="FILE.html", help="plot what serves which component")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")


def _reweight(args: argparse.Namespace) -> int:
    from launch.cluster import prepare_environment

    prepare_environment()
    from launch.reweight import main

    return main(args)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="path of a run folder; several are compared")
    parser.add_argument("-o", metavar="FILE.html", type=Path, help="default RUN/report.html, of one run")


def _report(args: argparse.Namespace) -> int:
    from launch.report.render import write

    print(write(args.runs, args.o))
    return 0


def _replay_arguments(parser: argparse.ArgumentParser) -> None:
    _run(parser)
    parser.add_argument("--step", type=int, metavar="N", required=True, help="of the ledger, from 1")
    parser.add_argument("--json", action="store_true", help="the stages as one JSON object")


def _replay(args: argparse.Namespace) -> int:
    from launch.cluster import prepare_environment

    prepare_environment()  # keeps libraries quiet, and is read when they are imported
    from launch.replay import replay_run

    return replay_run(args.run, args.step, as_json=args.json)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    _run(parser)
    parser.add_argument("out", metavar="OUT", help="folder to write; it must not exist")
    parser.add_argument("--weights", choices=("final", "best"), default="final", help="default final")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it too; a new repository is private")


def _export(args: argparse.Namespace) -> int:
    from launch.export import export_run

    print(export_run(args.run, Path(args.out), weights=args.weights, push=args.push))
    return 0


def _check_reward_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fn", metavar="FILE:FN", help="my_rewards.py:polite, package.module:fn, verl:FILE:FN, ...")
    parser.add_argument("--data", metavar="F", help="rows with prompt and completion; else built-in samples")
    parser.add_argument("--options", metavar="YAML", help="options of the function, e.g. '{scale: 0.1}'")
    parser.add_argument("--model", metavar="PATH", help="cut into the tokens of this model, else into words")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for components that are models")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")


def _check_reward(args: argparse.Namespace) -> int:
    from launch.check_reward import main

    return main(args)


def _serve_reward_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="F", required=True, help="file with the section `rewards`")
    parser.add_argument(
        "--host", default="127.0.0.1", help="default 127.0.0.1; an address that others reach wants a token"
    )
    parser.add_argument("--port", type=int, default=8080, help="default 8080; 0 is any free one")
    parser.add_argument("--token-file", metavar="F", help="secret that callers must send; else $TOKENPPO_REWARD_TOKEN")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for components that are models")


def _serve_reward(args: argparse.Namespace) -> int:
    from launch.serve_reward import main

    return main(args)


def _health_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", nargs="?", default="runs", help="folder of all runs, default runs")
    parser.add_argument("--stale-s", type=float, default=3600, help="seconds a run may write nothing, default 3600")


def _health(args: argparse.Namespace) -> int:
    from launch.health import report

    print(report(Path(args.dir), args.stale_s))
    return 0


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="F", help="the configuration to look for: does it fit here")
    parser.add_argument("--accelerate", metavar="FILE", help="as for train: how learners share their memory")
    parser.add_argument("--num-processes", metavar="N", help="as for train: how many learners")
    parser.add_argument("--reward", metavar="FN=WEIGHT", action="append", default=[], help="as for train")
    parser.add_argument("--json", action="store_true", help="the findings as one JSON object")


def _doctor(args: argparse.Namespace) -> int:
    from launch.doctor.examination import main

    return main(args)


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="F", type=Path, required=True, help="what all trials have in common")
    parser.add_argument(
        "--grid", metavar="KEY=V,V", action="append", required=True, help="values of a key; may be given several times"
    )
    parser.add_argument("-o", "--out", metavar="FOLDER", type=Path, required=True, help="of the trials' run folders")
    parser.add_argument("--metric", metavar="NAME", help="of docs/metrics.md, default that of run.best_metric")
    parser.add_argument("--lowest", action="store_true", help="the lower the metric the better")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trials at a time, default 1")
    parser.add_argument(
        "--gpus", type=float, default=0.0, metavar="N", help="GPUs that Ray gives each trial, default 0"
    )
    parser.add_argument("--json", action="store_true", help="the outcomes as one JSON object")
    parser.add_argument("rest", metavar="-- OPTIONS", nargs="*", help="more options of tokenppo train, for all trials")


def _sweep(args: argparse.Namespace) -> int:
    from launch.cluster import prepare_environment

    prepare_environment()
    from launch.sweep import main

    return main(args)


def _submit_arguments(parser: argparse.ArgumentParser) -> None:
    from launch.submit.command import add_arguments

    add_arguments(parser)


def _submit(args: argparse.Namespace) -> int:
    from launch.submit.command import main

    return main(args)


VERBS = (  # in the order in which one needs them
    Verb(
        name="doctor",
        help="what keeps this machine from training, each with a remedy; exit 0 if nothing does, else 2 or 3",
        examples=(
            "tokenppo doctor",
            "tokenppo doctor --config configs/cards.yaml --accelerate zero2 --optim.lr 3e-4",
            "tokenppo doctor --resources.ray_address 10.0.0.1:6379 --json",
        ),
        arguments=_doctor_arguments,
        do=_doctor,
        overrides=True,
    ),
    Verb(
        name="check-reward",
        help="try a reward function on samples: is it sound, what does it pay",
        examples=(
            "tokenppo check-reward examples/cards/rewards.py:quality --data examples/cards/data/heldout.jsonl",
            "tokenppo check-reward my_rewards.py:polite --options '{scale: 0.1}' --json",
        ),
        arguments=_check_reward_arguments,
        do=_check_reward,
    ),
    Verb(
        name="submit",
        help="train on a cluster: make the job of SLURM, Ray or Kubernetes, and send it",
        examples=(
            "tokenppo submit slurm --config configs/cards.yaml --nodes 2 --gpus-per-node 8 --run.name first",
            "tokenppo submit slurm --config configs/cards.yaml --nodes 2 --time 1:00:00 --dry-run",
            "tokenppo submit ray --config configs/cards.yaml --address http://127.0.0.1:8265 --run.dir /shared/runs",
            "tokenppo submit k8s --config configs/cards.yaml --nodes 2 --image tokenppo:cuda --dry-run",
        ),
        arguments=_submit_arguments,
        do=_submit,
        overrides=True,
    ),
    Verb(
        name="watch",
        help="the panel of a run that is going on somewhere else; ends with it, and with its exit code",
        examples=("tokenppo watch runs/demo", "tokenppo watch runs/demo --once"),
        arguments=_watch_arguments,
        do=_watch,
    ),
    Verb(
        name="sweep",
        help="train once for each combination of settings, and compare",
        examples=(
            "tokenppo sweep --config configs/cards.yaml --grid optim.lr=3e-4,1e-3 -o runs/lr -- --run.steps 8",
            "tokenppo sweep --config configs/cards.yaml --grid rewards.quality.weight=0.5,1,2 --metric eval/slot_error"
            " --lowest -o runs/weights",
        ),
        arguments=_sweep_arguments,
        do=_sweep,
    ),
    Verb(
        name="sample",
        help="show what a trained model answers, and what each token of it earns",
        examples=(
            'tokenppo sample runs/demo "name hugo ; food korean ; =>" --compare base',
            "tokenppo sample runs/demo --row 3 -n 2 --json",
        ),
        arguments=_sample_arguments,
        do=_sample,
    ),
    Verb(
        name="eval",
        help="score held-out prompts, and show whether one policy is better than another",
        examples=(
            "tokenppo eval runs/demo --against base",
            "tokenppo eval runs/demo --against base --require 'reward/total > base' --require 'slot_error < 0.1'",
            "tokenppo eval my-model --config configs/cards.yaml --against runs/demo --json",
        ),
        arguments=_eval_arguments,
        do=_eval,
    ),
    Verb(
        name="reweight",
        help="a step that was taken, with other weights of the rewards: what would its tokens have been told",
        examples=(
            "tokenppo reweight runs/demo --rewards.quality.weight 2",
            "tokenppo reweight runs/demo --grid quality=0.5,1,2 --grid coverage=0,1 --gradient final -o pareto.html",
        ),
        arguments=_reweight_arguments,
        do=_reweight,
        overrides=True,
    ),
    Verb(
        name="report",
        help="write a page on runs, at work or over: did they learn, curves, each token's numbers, what went wrong",
        examples=("tokenppo report runs/demo", "tokenppo report runs/demo runs/calm -o compared.html"),
        arguments=_report_arguments,
        do=_report,
    ),
    Verb(
        name="replay",
        help="compute a step of a run again and say which stage of it differs, if any",
        examples=("tokenppo replay runs/exact --step 1", "tokenppo replay runs/exact --step 30 --json"),
        arguments=_replay_arguments,
        do=_replay,
    ),
    Verb(
        name="export",
        help="write the model of a run, with a card, for others or for the hub",
        examples=("tokenppo export runs/demo demo-model", "tokenppo export runs/demo demo-model --push me/demo"),
        arguments=_export_arguments,
        do=_export,
    ),
    Verb(
        name="serve-reward",
        help="score for other machines and programs over HTTP",
        examples=("tokenppo serve-reward --config configs/cards.yaml --port 8080",),
        arguments=_serve_reward_arguments,
        do=_serve_reward,
    ),
    Verb(
        name="health",
        help="exit 0 if this installation and the runs at work are well, 3 if not",
        examples=("tokenppo health runs --stale-s 600",),
        arguments=_health_arguments,
        do=_health,
    ),
)
