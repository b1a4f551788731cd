"""The configuration from file and command line, checked at birth. No torch here: `--help` answers at once.

    cfg = load(Path("configs/cards.yaml"), {"optim.lr": "1e-6", "rewards.quality.weight": "2"})

A file gives sections of values; overrides are merged into it by dotted path; the result is validated once. Relative
paths in a file are resolved against that file, those of overrides against the working folder.
"""

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from core.faults import UserError
from core.reward_name import RewardName
from core.schema import DATA_FILES, Config, RewardConfig, leaf_keys
from core.secret_names import is_secret

PATHS = ("model.path", "model.value_path", "data.path", "data.eval_path", "data.ptx_path", "rollout.python", "run.dir")
FUNCTION = re.compile(r"rewards\.[^.]+\.fn|data\.augment|rollout\.environment")
# Their keys are the user's own, dots and all.
WHOLE = re.compile(r"rewards\.[^.]+\.options|data\.mixture|rollout\.environment_options")
SERVER = re.compile(r"(?:openrlhf:)?https?://")  # its only secret is the token that it wants
OPTION = re.compile(r"\.(?:environment_)?options\.")  # before the name of a user's own argument


def _anchor(key: str, value: Any, folder: Path) -> Any:
    """Resolve a relative path against `folder`. A name that is no path here (a hub id, a module) stays as it is."""
    if key == "data.mixture" and isinstance(value, dict):
        anchored = {_anchor("data.path", str(name), folder): weight for name, weight in value.items()}
        if len(anchored) < len(value):
            raise UserError(f"data.mixture = {value}: names one dataset twice; give it once, with the sum of weights")
        return anchored
    if not isinstance(value, str) or not value:
        return value
    if FUNCTION.fullmatch(key):
        try:
            return str(RewardName.parse(value).anchored(folder))
        except ValueError:  # said in full where it is loaded
            return value
    if key not in PATHS:
        return value
    candidate = Path(os.path.expanduser(value))
    resolved = candidate if candidate.is_absolute() else folder / candidate
    looks_like_path = key in ("run.dir", "rollout.python") or value.startswith((".", "/", "~"))
    if looks_like_path or resolved.exists() or Path(value).suffix in DATA_FILES:
        return os.path.normpath(resolved.absolute())
    return value


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"--{key}: {parent} is a value, not a section; see `tokenppo train --help`")
    tree[leaf] = value


def _refuse_secrets(tree: Any, prefix: str = "", of_server: bool = False) -> None:
    """Raise UserError, which does not repeat the value, for a secret by its name: what is here is written into the run
    folder, into checkpoints and logs."""
    named = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    of_server = of_server or (isinstance(tree, dict) and SERVER.match(str(tree.get("fn"))) is not None)
    for name, value in named:
        key = f"{prefix}{name}"
        if is_secret("auth_token" if of_server and name == "token" else str(name), value):
            raise UserError(
                f"{key}: is a secret by its name, and a configuration is written into the run folder, checkpoints and"
                " logs; take it from the environment or a file where it is used (of a reward server token_file names"
                " it)"
            )
        _refuse_secrets(value, f"{key}.", of_server)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and not WHOLE.fullmatch(key):
            flat.update(_flatten(value, f"{key}."))
        else:
            flat[key] = value
    return flat


def parse_override(key: str, text: str) -> Any:
    """The value of `--key text`: lists and dicts are YAML, `null` is None, the schema reads all else from text."""
    kind = leaf_keys().get(re.sub(r"^rewards\.[^.]+\.", "rewards.NAME.", key), (None,))[0]
    if text in get_args(kind):  # before null: `none` is a choice of some keys
        return text
    if text in ("null", "none", "None", "~"):
        return None
    if text[:1] in "[{" or OPTION.search(key):
        try:
            return yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise UserError(f"--{key} {text}: not valid YAML ({str(error).splitlines()[0]})") from None
    return text


class _Loader(yaml.SafeLoader):
    """safe_load that refuses a key given twice (YAML would silently keep the last) and reads 1e-3 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key}` appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The tree in a YAML file. Raises UserError with file and line where it is none."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"--config {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"--config {path}{where}: not valid YAML ({reason})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"--config {path}: holds a {type(tree).__name__}, not sections of values")
    return tree


def load(config_file: Path | None, overrides: dict[str, Any] | None = None, *, folder: Path | None = None) -> Config:
    """The checked configuration.

    Args:
        config_file: YAML, or None for defaults.
        overrides: dotted key -> value (already parsed); they win over the file.
        folder: what relative paths in overrides are relative to; the working folder if None.
    Raises:
        UserError: one line per problem: key, value, what is wrong, nearest name or remedy.
    """
    tree: dict[str, Any] = {}
    if config_file is not None:
        for key, value in _flatten(read_yaml(config_file)).items():
            _set(tree, str(key), _anchor(str(key), value, config_file.absolute().parent))
    for key, value in (overrides or {}).items():
        _set(tree, key, _anchor(key, value, folder or Path.cwd()))
    _refuse_secrets(tree)
    run = tree.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("dir", str((folder or Path.cwd()) / "runs"))
    return from_tree(tree)


def load_rewards(config_file: Path) -> dict[str, RewardConfig]:
    """The section `rewards` of a file, whatever else is in it. Raises UserError."""
    tree = read_yaml(config_file).get("rewards")
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"--config {config_file}: has no section `rewards` that names components")
    for key, value in _flatten({"rewards": tree}).items():
        _set({"rewards": tree}, str(key), _anchor(str(key), value, config_file.absolute().parent))
    _refuse_secrets(tree, "rewards.")
    try:
        return TypeAdapter(dict[str, RewardConfig]).validate_python(tree)
    except ValidationError as error:
        problems = [problem | {"loc": ("rewards", *problem["loc"])} for problem in error.errors()]
        raise UserError("\n".join(map(_explain, problems))) from None


def from_tree(tree: dict[str, Any]) -> Config:
    """Validate a tree of plain values. Raises UserError, one line per problem."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(problem) for problem in error.errors())) from None


def _explain(problem: dict[str, Any]) -> str:
    """One line for one problem: `key = value: what is wrong; remedy`."""
    context = problem.get("ctx", {})
    key = str(context.get("key") or ".".join(str(part) for part in problem["loc"]))
    kind = problem["type"]
    if kind == "extra_forbidden":
        close = nearest_key(key)
        return f"{key}: there is no such key" + (f"; did you mean {close}?" if close else "; see tokenppo train --help")
    if kind == "missing":
        key = {"model": "model.path", "data": "data.path", "rewards": "rewards.NAME.fn"}.get(key, key)
        return f"{key}: is required; set it in the config file or with --{key} VALUE"
    if kind == "disagree":
        return f"{key} = {context['value']}: {context['remedy']}"
    if kind == "within":
        return f"{key}.{context['leaf']} = {context['value']}: {context['remedy']}"
    if kind == "truth":
        return f"{key}.{context['leaf']} = {str(context['value']).lower()}: {context['remedy']}"
    message = problem["msg"].replace("Input should be", "must be").replace("Value error, ", "")
    return f"{key} = {problem['input']!r}: {message[:1].lower() + message[1:]}"


# What the same setting is called elsewhere, too far in letters for a guess.
FAMILIAR = {
    "learning_rate": "optim.lr",
    "lam": "ppo.gae_lambda",
    "clip_range": "ppo.cliprange",
    "init_kl_coef": "ppo.kl_coef",
    "num_ppo_epochs": "ppo.ppo_epochs",
    "max_steps": "run.steps",
    "total_steps": "run.steps",
    "output_dir": "run.dir",
    "max_tokens": "rollout.max_new_tokens",
    "stop": "rollout.stop_strings",
    "num_generations": "rollout.n_samples_per_prompt",
}


def nearest_key(key: str) -> str | None:
    """The key of the schema that a mistyped one most likely means."""
    component = re.match(r"rewards\.([^.]+)\.", key)
    known = [k.replace("NAME", component.group(1)) if component else k for k in leaf_keys()]
    sections = list(Config.model_fields)
    if key.rsplit(".", 1)[-1] in FAMILIAR:
        return FAMILIAR[key.rsplit(".", 1)[-1]]
    close = difflib.get_close_matches(key, known + sections, n=1, cutoff=0.75)
    close = close or difflib.get_close_matches(key, sections, n=1, cutoff=0.6)
    if not close:  # the right name in the wrong section, or in none
        leaf = key.rsplit(".", 1)[-1]
        close = [k for k in known if k.rsplit(".", 1)[1] == leaf][:1]
    return close[0] if close else None


def to_yaml(cfg: Config) -> str:
    """The whole configuration, defaults included, as a file that `load` reads back to an equal one."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def type_name(annotation: Any) -> str:
    """A type as a person reads it: `float`, `int or null`, `k1 | k2 | k3`."""
    args = get_args(annotation)
    if not args:
        return getattr(annotation, "__name__", str(annotation))
    if type(None) in args:
        return " | ".join(type_name(a) for a in args if a is not type(None)) + " | null"
    if all(isinstance(a, str) for a in args):
        return " | ".join(args)
    name = getattr(getattr(annotation, "__origin__", None), "__name__", str(annotation))
    return f"{name} of {' , '.join(type_name(a) for a in args)}" if name in ("list",) else name


def markdown() -> str:
    """docs/configuration.md, whole."""
    lines = [
        "# Configuration",
        "",
        "Generated from `core/schema.py` by `python -m core.config > docs/configuration.md`: change it there.",
        "",
        "A YAML file (`--config`) gives sections of values, `--section.key VALUE` wins over it. Relative paths in a",
        "file are relative to that file, those on the command line to the working folder. A key that does not exist is",
        "an error that names the nearest one; so is a value out of range, NaN, or a key given twice. `NAME` is the",
        "name of a reward component: letters, digits and `_`. `config.yaml` in the run folder holds all keys of a run.",
    ]
    section = ""
    for key, (kind, default, text) in leaf_keys().items():
        head, leaf = key.rsplit(".", 1)
        if head != section:
            lines += ["", f"## {head}", "", "| key | type | default | range | meaning |", "|---|---|---|---|---|"]
            section = head
        kind_name = type_name(kind).replace("|", "or")
        shown = "required" if default == "required" else f"`{json.dumps(default)}`"
        meaning = " ".join(text.split()).removesuffix(" Required.").replace("|", "\\|")
        lines.append(f"| `{leaf}` | {kind_name} | {shown} | {_range_of(key)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _range_of(key: str) -> str:
    """The bounds of a number, or of the length of a text: `>= 1, < 2`."""
    section, leaf = key.split(".")[0], key.rsplit(".", 1)[1]
    model = RewardConfig if section == "rewards" else Config.model_fields[section].annotation
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >="}
    bounds = [(sign, getattr(m, name, None)) for m in model.model_fields[leaf].metadata for name, sign in signs.items()]
    return ", ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)


if __name__ == "__main__":
    print(markdown(), end="")
