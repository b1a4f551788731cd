"""The configuration: typed, explained under each field, checked at birth. No torch here: `--help` answers at once.

    cfg = load(Path("configs/cards.yaml"), {"optim.lr": "1e-6", "rewards.quality.weight": "2"})

A file gives sections of values; overrides are merged into it by dotted path; the result is validated once. Relative
paths in a file are resolved against that file, those of overrides against the working folder.
"""

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from core.faults import UserError
from core.metrics import RESERVED_COMPONENTS


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, values: Any) -> Any:
        """pydantic would take True for 1, which nobody means who writes `steps: true`."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(str(name))
            kinds = {field.annotation, *get_args(field.annotation)} if field else set()
            if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
                raise PydanticCustomError(
                    "truth", "{remedy}", {"leaf": name, "value": value, "remedy": "must be a number, not true or false"}
                )
        return values


class ModelConfig(Section):
    path: str = Field(min_length=1)
    """The policy to train: a folder that `from_pretrained` loads, or a hub id. Required."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the forward passes and of the rollout workers; the learner keeps its parameters in float32."""


class DataConfig(Section):
    path: str = Field(min_length=1)
    """Prompts: a JSONL or Parquet file, or a dataset id. Every column but the prompt reaches the rewards. Required."""
    split: str = "train"
    """Split of a dataset id; a file is one split."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or a list of messages (the tokenizer's chat template is applied)."""
    eval_path: str | None = None
    """Held-out prompts in the same form; no evaluation without it."""
    eval_split: str = "test"
    """Split of `data.eval_path` where that is a dataset id."""
    eval_prompts: int = Field(500, ge=1)
    """How many held-out prompts an evaluation answers, one sample each: the first ones of the file."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longest prompt in tokens; a longer one is an error that names its row."""
    shuffle: bool = True
    """A new order in each epoch, a function of `run.seed` and the epoch."""


class RolloutConfig(Section):
    workers: int = Field(2, ge=1, le=4096)
    """Rollout workers (Ray actors) in the whole cluster."""
    batch_size: int = Field(256, ge=1)
    """Responses per step over all workers: prompts per step x `n_samples_per_prompt`."""
    n_samples_per_prompt: int = Field(1, ge=1)
    """Responses to each prompt."""
    max_new_tokens: int = Field(512, ge=1)
    """Longest response; a longer one is cut and its finish_reason is `length`."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits in sampling and in every log-prob of the learner."""
    chunk_size: int = Field(32, ge=1)
    """Responses written together by one worker. Chunks are cut by prompt number, never by worker."""
    timeout_s: float = Field(600, gt=0)
    """Deadline of one chunk, of a worker's start, and of its replacement."""
    max_worker_losses: int = Field(8, ge=0)
    """Workers of one learner process that may die or hang during the run before it stops."""


class RewardConfig(Section):
    fn: str = Field(min_length=1)
    """`file.py:function` or `package.module:function`; a class is instantiated with `options`. Required."""
    weight: float = 1.0
    """Factor in the sum of components; with 0 the component is only a metric, logged but never paid."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function or class."""
    spans: Literal["spread", "last"] = "spread"
    """The score of a span goes evenly to its tokens, or whole to the last of them."""
    normalize: Literal["none", "running", "batch"] = "none"
    """Divide by the standard deviation of all batches so far, or of this batch. The mean is never shifted."""
    clip: float | None = Field(None, gt=0)
    """Bound of the absolute (normalised) value of one token."""


class PPOConfig(Section):
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation."""
    cliprange: float = Field(0.2, gt=0, lt=1)
    """The probability ratio is clipped at 1 - cliprange (and 1 + cliprange unless `cliprange_high`)."""
    cliprange_high: float | None = Field(None, gt=0)
    """Upper clip of the ratio where it differs."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound of the loss of tokens with negative advantage, in units of |A|; off by default."""
    cliprange_value: float = Field(0.2, gt=0)
    """A value may move this far from the old one before its loss is clipped."""
    vf_coef: float = Field(0.1, ge=0)
    """Weight of the value loss."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    ppo_epochs: int = Field(2, ge=1)
    """Passes over each batch."""
    mini_batch_size: int = Field(64, ge=1)
    """Responses per optimizer step, over all ranks; divides `rollout.batch_size`."""
    micro_batch_size: int = Field(8, ge=1)
    """Responses per forward pass on one rank; no number depends on it but memory and time."""
    kl_coef: float = Field(0.02, ge=0)
    """Weight of the KL penalty against the reference in the reward of each token."""
    target_kl: float | None = Field(None, gt=0)
    """Steer `kl_coef` towards this KL in nats per response; fixed if null."""
    kl_horizon: int = Field(10_000, ge=1)
    """Responses over which the controller of `target_kl` works."""
    whiten_advantages: bool = True
    """Mean 0, deviation 1 over the valid tokens of the whole batch."""
    bootstrap_cut: bool = False
    """Continue a cut response with the value of its last state. False where the length limit belongs to the task."""


class OptimConfig(Section):
    lr: float = Field(1e-6, ge=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Decay to 0 over the optimizer steps of the run."""
    warmup_frac: float = Field(0.0, ge=0, lt=1)
    """Share of the optimizer steps in which the rate rises from 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's running mean and square of the gradient."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clip of the global gradient norm."""


class SyncConfig(Section):
    bucket_mb: float = Field(256, gt=0)
    """Weights travel in buckets of about this size."""
    timeout_s: float = Field(300, gt=0)
    """Deadline of each stage of a weight sync."""


class LogConfig(Section):
    trackers: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    """Besides metrics.jsonl, which is always written."""
    project: str = "tokenppo"
    """Project name in W&B, and TensorBoard's folder in the run folder."""


class ResourcesConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run; auto is cuda where there is one."""
    learner_threads: int | None = Field(None, ge=1)
    """CPU threads of each learner process; null is an equal share of the cores."""
    worker_threads: int | None = Field(None, ge=1)
    """CPU threads of each rollout worker; null is an equal share of the cores."""
    object_store_mb: int = Field(512, ge=80)
    """Ray's shared memory, where this run starts Ray."""
    ray_address: str | None = None
    """An existing Ray cluster to join; null starts one on this machine and ends it with the run."""
    reward_timeout_s: float = Field(300, gt=0)
    """Deadline for the scores of one chunk."""
    collective_timeout_s: float = Field(1800, gt=0)
    """How long a learner process waits for the others wherever they meet."""


class RunSection(Section):
    name: str = "run"
    """Name of the run, the last part of its folder."""
    dir: str = "runs"
    """Folder of all runs."""
    steps: int = Field(100, ge=1)
    """PPO updates."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Decides the order of prompts, every sampled token and the membership of mini-batches."""
    eval_every: int = Field(10, ge=1)
    """Steps between evaluations; the first and the last policy are always evaluated."""
    save_every: int = Field(10, ge=1)
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the last checkpoints are kept."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on in a folder that holds this very run. never: refuse a folder that holds one."""
    deterministic: bool = False
    """Same numbers bit for bit in two runs on one machine: one thread per process, deterministic kernels."""
    checks: bool = True
    """Stop when numbers that must be equal are not: log-probs of workers and learner, weights, the first ratio."""
    max_dropped_frac: float = Field(0.02, ge=0, lt=1)
    """Share of a learner process's samples in a step that may be lost to failing rewards before the run stops."""

    @property
    def folder(self) -> Path:
        return Path(self.dir) / self.name


class Config(Section):
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    rewards: dict[str, RewardConfig]
    ppo: PPOConfig = PPOConfig()
    optim: OptimConfig = OptimConfig()
    sync: SyncConfig = SyncConfig()
    log: LogConfig = LogConfig()
    resources: ResourcesConfig = ResourcesConfig()
    run: RunSection = RunSection()

    @property
    def prompts_per_step(self) -> int:
        return self.rollout.batch_size // self.rollout.n_samples_per_prompt

    @property
    def optimizer_steps(self) -> int:
        return self.run.steps * self.ppo.ppo_epochs * (self.rollout.batch_size // self.ppo.mini_batch_size)

    @model_validator(mode="after")
    def _agree(self) -> "Config":
        def refuse(key: str, value: object, remedy: str) -> None:
            raise PydanticCustomError("disagree", "{remedy}", {"key": key, "value": value, "remedy": remedy})

        batch, mini, n = self.rollout.batch_size, self.ppo.mini_batch_size, self.rollout.n_samples_per_prompt
        if batch % n:
            near = [v for v in (batch // n * n, batch // n * n + n) if v]
            refuse("rollout.batch_size", batch, f"no multiple of rollout.n_samples_per_prompt {n}; nearest are {near}")
        if batch % mini:
            near = _nearest_divisors(batch, mini)
            refuse("ppo.mini_batch_size", mini, f"does not divide rollout.batch_size {batch}; nearest are {near}")
        if self.ppo.target_kl is not None and self.ppo.kl_horizon < batch:
            refuse(
                "ppo.kl_horizon", self.ppo.kl_horizon, f"is less than one batch: at least {batch} keeps kl_coef above 0"
            )
        if not all(0 <= beta < 1 for beta in self.optim.betas):
            refuse("optim.betas", list(self.optim.betas), "both must be at least 0 and less than 1, e.g. [0.9, 0.95]")
        if not self.rewards:
            refuse("rewards", "{}", "is empty: name at least one component, e.g. --rewards.mine.fn my_rewards.py:fn")
        if not any(r.weight for r in self.rewards.values()):
            refuse("rewards", sorted(self.rewards), "all have weight 0, so nothing would be learnt: give one a weight")
        for name in self.rewards:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name in RESERVED_COMPONENTS:
                taken = ", ".join(sorted(RESERVED_COMPONENTS))
                refuse(f"rewards.{name}", name, f"is no component name: letters, digits and _, and none of {taken}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", self.run.name):
            refuse("run.name", self.run.name, "must begin with a letter or digit and go on with those, '.', '_' or '-'")
        return self


def _nearest_divisors(n: int, wanted: int) -> list[int]:
    """Up to two divisors of n next to `wanted`, in time that a mistyped n of twenty digits cannot stretch."""
    near: list[int] = []
    for distance in range(1, 100_000):
        near += [d for d in (wanted - distance, wanted + distance) if 0 < d <= n and n % d == 0]
        if len(near) >= 2:
            break
    return sorted(near[:2]) or sorted({1, n})


def leaf_keys() -> dict[str, tuple[Any, Any, str]]:
    """Dotted key -> (type, default, explanation), in the order of the schema; components stand as `rewards.NAME.*`."""
    keys: dict[str, tuple[Any, Any, str]] = {}
    for section, info in Config.model_fields.items():
        kind, prefix = (RewardConfig, "rewards.NAME") if section == "rewards" else (info.annotation, section)
        for name, leaf in kind.model_fields.items():
            default = "required" if leaf.is_required() else leaf.get_default(call_default_factory=True)
            keys[f"{prefix}.{name}"] = (leaf.annotation, default, leaf.description or "")
    return keys


def _is_path(key: str) -> bool:
    return key in ("model.path", "data.path", "data.eval_path", "run.dir") or bool(
        re.fullmatch(r"rewards\.[^.]+\.fn", key)
    )


def _anchor(key: str, value: Any, folder: Path) -> Any:
    """Resolve a relative path against `folder`. A name that is no path here (a hub id, a module) stays as it is."""
    if not isinstance(value, str) or not value or not _is_path(key):
        return value
    path, colon, attribute = value.rpartition(":") if key.endswith(".fn") else (value, "", "")
    if key.endswith(".fn") and not path.endswith(".py"):
        return value
    candidate = Path(os.path.expanduser(path))
    resolved = candidate if candidate.is_absolute() else folder / candidate
    looks_like_path = key == "run.dir" or key.endswith(".fn") or path.startswith((".", "/", "~"))
    if looks_like_path or resolved.exists() or Path(path).suffix in (".jsonl", ".json", ".parquet"):
        return os.path.normpath(resolved.absolute()) + colon + attribute
    return value


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"--{key}: {parent} is a value, not a section; see `tokenppo train --help`")
    tree[leaf] = value


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and not re.fullmatch(r"rewards\.[^.]+\.options", key):
            flat.update(_flatten(value, f"{key}."))
        else:
            flat[key] = value
    return flat


def parse_override(key: str, text: str) -> Any:
    """The value of `--key text`: lists and dicts are YAML, `null` is None, the schema reads all else from text."""
    if text in ("null", "none", "None", "~"):
        return None
    if text[:1] in "[{" or ".options." in key:
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
    run = tree.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("dir", str((folder or Path.cwd()) / "runs"))
    return from_tree(tree)


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
        "Generated from `core/config.py` by `python -m core.config > docs/configuration.md`: change it there.",
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
