"""The command line of training, the same behind `tokenppo train`, `accelerate launch -m launch.train` and --dry-run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config import Config, leaf_keys, load, nearest_key, parse_override, type_name
from core.faults import UserError


@dataclass
class TrainArguments:
    config: Path | None = None
    dry_run: bool = False
    help: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Config:
        return load(self.config, self.overrides)


def parse(argv: list[str]) -> TrainArguments:
    """--config F, --dry-run, --help, and any `--section.key value` or `--section.key=value`. Raises UserError."""
    args, rest = TrainArguments(), list(argv)
    while rest:
        flag = rest.pop(0)
        if flag in ("-h", "--help"):
            args.help = True
        elif flag == "--dry-run":
            args.dry_run = True
        elif flag == "--config" or flag.startswith("--config="):
            value = flag.partition("=")[2] or (rest.pop(0) if rest else "")
            if not value:
                raise UserError("--config: wants the path of a YAML file")
            args.config = Path(value)
        elif flag.startswith("--"):
            key, equals, value = flag[2:].partition("=")
            if "." not in key:
                close = nearest_key(key)
                hint = f"; did you mean --{close}?" if close and "." in close else "; see tokenppo train --help"
                raise UserError(f"--{key}: there is no such option{hint}")
            if not equals:  # a flag without a value switches on: --run.deterministic
                value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
            args.overrides[key] = parse_override(key, value)
        else:
            raise UserError(f"{flag}: what is this? Options are --config FILE, --dry-run and --section.key VALUE")
    return args


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
        "  tokenppo train --model.path Qwen/Qwen2.5-0.5B --data.path prompts.jsonl --rewards.mine.fn my.py:fn",
        "",
        "  --config FILE   YAML with the sections below; relative paths in it are relative to it",
        "  --dry-run       print the plan (models, processes, batches, memory, files) and write nothing",
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
