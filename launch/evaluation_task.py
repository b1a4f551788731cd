"""What `tokenppo eval` is asked to do, as far as files and words say. Imports nothing heavy: the verb asks here before
it imports what computes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.config import load
from core.faults import UserError
from core.schema import Config
from launch import requirement
from launch.requirement import Requirement

OF_BASE = ("objective/kl", "objective/kl_k3")
OF_BOTH = ("win_rate", "length_controlled")
WEIGHTS = ("final", "best", "base")


@dataclass(frozen=True)
class Policy:
    label: str
    path: str  # a folder that from_pretrained loads, or a hub id
    config: Path | None = None  # of the run it comes from
    run: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    cfg: Config  # the task; `model.path` is the base
    file: Path  # it was read from, with
    overrides: dict[str, object]
    decides: str  # which mean says who wins a prompt
    wanted: list[Requirement]
    policies: list[Policy]  # one or two


def read(
    policy: str,
    *,
    weights: str = "final",
    against: str | None = None,
    config: str | None = None,
    data: str | None = None,
    prompts: int | None = None,
    samples: int = 1,
    metric: str | None = None,
    require: Sequence[str] = (),
) -> Asked:
    """Arguments as the verb's. Raises UserError for what cannot work."""
    first = _policy(policy, weights, "POLICY")
    named = None if against is None or against in WEIGHTS else _policy(against, "final", "--against")
    file = Path(config) if config is not None else first.config or (named.config if named else None)
    if file is None:
        raise UserError(
            f"POLICY = {policy}: a model has neither prompts nor rewards; say which with --config (a file as for"
            " `tokenppo train`, or config.yaml of a run)"
        )
    cfg, overrides = _task(file, data, prompts)
    decides = _decides(cfg, metric)
    names = [*cfg.evaluation_means, *OF_BASE]
    wanted = [requirement.parse(text, names, alone=OF_BOTH) for text in require]
    against = _other(against, wanted)
    base = Policy("base", cfg.model.path)
    policies = [base if weights == "base" else first]
    if against is not None:
        policies.append(named or (base if against == "base" else _of_same_run(first, against)))
    if samples < 1:
        raise UserError(f"--samples {samples}: give at least 1")
    return Asked(cfg=cfg, file=file, overrides=overrides, decides=decides, wanted=wanted, policies=policies)


def _policy(word: str, weights: str, what: str) -> Policy:
    """What a word of the command line means. Raises UserError with the nearest folder."""
    folder = Path(word)
    if (folder / "config.json").is_file():
        if weights != "final":
            raise UserError(f"--weights {weights}: {word} is a model; name the folder of its run, or leave it out")
        run = folder.absolute().parent  # of best/ or final/
        of_run = (run / "config.yaml", run) if (run / "config.yaml").is_file() else ()
        return Policy(word, str(folder.absolute()), *of_run)
    if (folder / "config.yaml").is_file():
        config = folder / "config.yaml"
        if weights == "base":
            return Policy("base", load(config).model.path, config, folder)
        if not (folder / weights).is_dir():
            raise UserError(f"--weights {weights}: {folder / weights} does not exist")
        return Policy(f"{folder.absolute().name}/{weights}", str((folder / weights).absolute()), config, folder)
    if folder.is_dir():
        raise UserError(
            f"{what} = {word}: neither a run (no config.yaml) nor a model (no config.json) is in this folder"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", word) and not folder.parent.is_dir():
        return Policy(word, word)  # a hub id: whether there is such a one, its loading says
    beside = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
    close = requirement.nearest(folder.name, beside) if beside else ""
    raise UserError(f"{what} = {word}: there is no such folder{close}")


def _of_same_run(policy: Policy, weights: str) -> Policy:
    if policy.run is None:
        raise UserError(f"--against {weights}: names weights of a run, and POLICY is a model; give a folder")
    return _policy(str(policy.run), weights, "--against")


def _other(against: str | None, wanted: list[Requirement]) -> str | None:
    """Whom POLICY is compared with: what a requirement speaks of goes without saying, if it is the base."""
    for r in wanted:
        if r.bound == "base" and against not in (None, "base"):
            raise UserError(f"--require {r.text!r}: the comparison is with --against {against}; write `against`")
        if r.bound == "base":
            against = "base"
    for r in wanted:
        if against is None and (r.bound == "against" or r.name in OF_BOTH):
            raise UserError(f"--require {r.text!r}: wants another policy; name it with --against, e.g. --against base")
    return against


def _task(file: Path, data: str | None, prompts: int | None) -> tuple[Config, dict[str, object]]:
    """The configuration, whose `model.path` is the base, and what it has beyond the file. Raises UserError."""
    overrides: dict[str, object] = {"model.reference": "auto"}  # a reward server's reference would be asked for nothing
    overrides |= {} if data is None else {"data.eval_path": data, "data.eval_frac": 0}
    overrides |= {} if prompts is None else {"data.eval_prompts": prompts}
    cfg = load(file, overrides)
    if not cfg.data.has_held_out:
        raise UserError("data.eval_path = null: this task has no held-out prompts; name some with --data")
    return cfg, overrides


def _decides(cfg: Config, metric: str | None) -> str:
    """Which mean says who wins a prompt."""
    decides = metric or cfg.run.best_metric
    names = [*cfg.evaluation_means, *OF_BASE]
    if decides.removeprefix("-") not in names:
        key = "run.best_metric" if metric is None else "--metric"
        raise UserError(
            f"{key} {decides}: there is no number of that name{requirement.nearest(decides.removeprefix('-'), names)}"
        )
    return decides
