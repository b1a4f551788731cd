"""The command line of training, the same behind `tokenppo train`, `accelerate launch -m launch.train` and --dry-run."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config import load, nearest_key, parse_override, read_yaml, type_name
from core.faults import UserError
from core.reward_name import RewardName
from core.schema import Config, leaf_keys
from launch.memory import Sharding

FLAGS = ("accelerate", "config", "dry-run", "help", "num-processes", "reward")
ACCELERATE_FILES = Path(__file__).parent / "accelerate"


@dataclass
class TrainArguments:
    config: Path | None = None
    dry_run: bool = False
    help: bool = False
    accelerate: str | None = None  # name or path of an accelerate file
    num_processes: int | None = None  # instead of what that file says
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def learners(self) -> int:
        """Learner processes that these options ask for."""
        if self.accelerate is None or self.num_processes is not None:
            return self.num_processes or 1
        return int(read_yaml(Path(self.accelerate)).get("num_processes") or 1)

    @property
    def sharding(self) -> Sharding:
        """How those processes share what they hold."""
        return Sharding.of({} if self.accelerate is None else read_yaml(Path(self.accelerate)), self.learners)

    def load(self) -> Config:
        return load(self.config, self.overrides)


def parse(argv: list[str]) -> TrainArguments:
    """--config F, --accelerate F, --num-processes N, --dry-run, --help, any `--section.key value`. Raises UserError."""
    args, rest = TrainArguments(), list(argv)
    while rest:
        flag = rest.pop(0)
        if flag in ("-h", "--help"):
            args.help = True
        elif flag == "--dry-run":
            args.dry_run = True
        elif (name := flag.partition("=")[0]) in ("--config", "--accelerate", "--num-processes", "--reward"):
            value = flag.partition("=")[2] or (rest.pop(0) if rest else "")
            if name == "--config":
                if not value:
                    raise UserError("--config: wants the path of a YAML file")
                args.config = Path(value)
            elif name == "--accelerate":
                args.accelerate = str(accelerate_file(value))
            elif name == "--reward":
                args.overrides |= reward_override(value, args.overrides)
            else:
                if not value.isdigit() or int(value) < 1:
                    raise UserError(f"--num-processes {value}: wants the number of learner processes, at least 1")
                args.num_processes = int(value)
        elif flag.startswith("--"):
            key = flag[2:].partition("=")[0]
            if "." not in key:
                close = next(iter(difflib.get_close_matches(key, FLAGS, n=1)), None) or nearest_key(key)
                meant = close is not None and ("." in close or close in FLAGS)
                hint = f"; did you mean --{close}?" if meant else "; see tokenppo train --help"
                raise UserError(f"--{key}: there is no such option{hint}")
            args.overrides |= _override(flag, rest)
        else:
            raise UserError(
                f"{flag}: what is this? Options are --config FILE, --reward FILE:FN=WEIGHT, --section.key VALUE"
            )
    if args.num_processes is not None and args.accelerate is None:
        raise UserError(f"--num-processes {args.num_processes}: goes with --accelerate, e.g. --accelerate ddp")
    return args


def take_overrides(argv: list[str]) -> tuple[list[str], dict[str, Any], list[str]]:
    """(What is left, dotted key -> value of each `--section.key value`, these as written). Raises UserError."""
    left, rest, overrides, words = [], list(argv), {}, []
    while rest:
        before, flag = list(rest), rest.pop(0)
        if flag.startswith("--") and "." in flag.partition("=")[0]:
            overrides |= _override(flag, rest)
            words += before[: len(before) - len(rest)]
        else:
            left.append(flag)
    return left, overrides, words


def _override(flag: str, rest: list[str]) -> dict[str, Any]:
    """Of `--section.key=value`, or of `--section.key` whose value is taken off `rest`."""
    key, equals, value = flag[2:].partition("=")
    if not equals:  # a flag without a value switches on: --run.deterministic
        value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
    return {key: parse_override(key, value)}


def reward_override(given: str, before: dict[str, Any]) -> dict[str, Any]:
    """`my.py:polite=0.5` -> the keys of a component `polite` of weight 0.5; without a weight 1. Raises UserError."""
    fn, equals, weight = given.rpartition("=")
    fn, weight = (fn, weight) if equals else (given, "1")
    try:
        name = RewardName.parse(fn)
    except ValueError as error:
        raise UserError(f"--reward {given}: {error}, then =WEIGHT, e.g. --reward my_rewards.py:polite=0.5") from None
    if name.is_url:
        raise UserError(f"--reward {given}: which component of that server? Write --rewards.NAME.fn {fn}")
    key = f"rewards.{name.attribute}"
    if f"{key}.fn" in before:
        raise UserError(
            f"--reward {given}: there is a component {name.attribute} already; write --rewards.NAME.fn {fn}"
        )
    return {f"{key}.fn": fn, f"{key}.weight": parse_override(f"{key}.weight", weight)}


def accelerate_file(given: str) -> Path:
    """`zero2` -> launch/accelerate/zero2.yaml; a path stays one. Raises UserError where there is no such file."""
    names = sorted(file.stem for file in ACCELERATE_FILES.glob("*.yaml"))
    file = ACCELERATE_FILES / f"{given}.yaml" if given in names else Path(given)
    if not file.is_file():
        raise UserError(f"--accelerate {given}: there is no such file, and no such name: {', '.join(names)}")
    return file.absolute()


def help_text() -> str:
    """All keys with type, default and explanation, from the schema."""
    lines = [
        "usage: tokenppo train --config FILE [--dry-run] [--section.key VALUE ...]",
        "",
        "Train a language model with PPO on the rewards of single tokens. The same command line works under",
        "`accelerate launch --config_file launch/accelerate/cpu.yaml -m launch.train ...`.",
        "",
        "  tokenppo train --config configs/cards.yaml --run.name first",
        "  tokenppo train --config configs/cards.yaml --optim.lr 3e-4 --rewards.quality.weight 2 --dry-run",
        "  tokenppo train --model.path Qwen/Qwen2.5-0.5B --data.path prompts.jsonl --reward my.py:polite=0.5",
        "  tokenppo train --accelerate zero2 --config configs/cards.yaml",
        "",
        "  --config FILE        YAML with the sections below; relative paths in it are relative to it",
        "  --accelerate FILE    several learner processes: ddp, zero1 to zero3, or an accelerate file of yours",
        "  --num-processes N    how many, where that is not what the accelerate file says",
        "  --reward FN=WEIGHT   a component named as its function, e.g. my.py:polite=0.5; may be given several times",
        "  --dry-run            print the plan (models, processes, batches, memory, files) and write nothing",
        "",
    ]
    section = ""
    for key, (kind, default, text) in leaf_keys().items():
        head = key.rsplit(".", 1)[0]
        if head != section:
            lines += [f"{head}:"]
            section = head
        shown = "required" if default == "required" else f"default {'null' if default is None else default}"
        first, *more = _wrap(f"{text} [{type_name(kind)}, {shown}]", 76)
        lines += [f"  --{key:<36} {first}" if len(key) <= 36 else f"  --{key}\n{'':41}{first}"]
        lines += [f"{'':41}{line}" for line in more]
    return "\n".join(lines)


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)
