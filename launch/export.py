"""A trained model as a folder that others load, and onto the hub: `tokenppo export RUN OUT`.

OUT holds what transformers' `from_pretrained` wants (weights in safetensors, config, generation config, tokenizer), the
value head beside it, and a README.md that says how the model was made. It is whole or absent, and its bytes are those
that training wrote: they are compared with the manifest of `final/` or `best/`, before copying and after.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from core.config import load
from core.faults import ProcessFault, StorageFault, UserError
from core.schema import Config, leaf_keys
from launch import early, run_folder
from trainer import checkpoint

# Where a run stood on this machine is nobody's business; rewards have a table of their own.
UNSAID = ("run.dir", "run.name", "run.resume", "resources.ray_address")


def export_run(run: Path, out: Path, *, weights: str = "final", push: str | None = None) -> str:
    """Write OUT, and upload it where `push` names a repository; returns what was done, in words.

    Raises UserError for what cannot work, StorageFault for weights that are damaged or a disk that is full,
    ProcessFault for a hub that cannot be reached. OUT stays where only the upload failed.
    """
    source = run / weights
    run_folder.refuse_no_run(run)
    if not source.is_dir():
        held_out = "; it is written where there are held-out prompts (data.eval_path)" if weights == "best" else ""
        raise UserError(f"--weights {weights}: {source} does not exist{held_out}")
    if out.exists():
        raise UserError(f"OUT = {out}: it exists already; give another folder, or move that one away")
    if push is not None:
        _refuse_push(push)
    cfg, summary = load(run / "config.yaml"), run_folder.read_summary(run)
    early.refuse_weights(source, f"--weights {weights}")
    proven = (source / checkpoint.MANIFEST).is_file()  # folders of earlier versions have none
    if proven and (damage := checkpoint.damage_of(source, only=False)):
        raise StorageFault(
            f"{source} is damaged ({damage}); export other --weights, or the run again from a checkpoint"
        )
    fresh = out.with_name(f".{out.name}.new")
    with checkpoint.storage(out):
        shutil.rmtree(fresh, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, fresh)
        if proven:
            if damage := checkpoint.damage_of(fresh, only=False):
                shutil.rmtree(fresh)
                raise StorageFault(f"{out} could not be written whole ({damage}); look at that disk")
            (fresh / checkpoint.MANIFEST).unlink()
        (fresh / "README.md").write_text(card(cfg, summary, weights, push), encoding="utf-8")
        checkpoint.flush(fresh)
        os.rename(fresh, out)
        checkpoint.flush(out.parent, deep=False)
    done = f"{out}: {weights} weights of {cfg.run.name}, {', '.join(sorted(p.name for p in out.iterdir()))}"
    if push is None:
        return done
    return f"{done}\n{_push(out, push)}"


def card(cfg: Config, summary: dict[str, Any], weights: str, push: str | None) -> str:
    """README.md of a model: its evaluations, rewards, settings that are no defaults, versions, how to load it."""
    base, evals = cfg.model.path, summary.get("eval", {})
    is_hub_id = not Path(base).is_absolute()
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head |= {"base_model": base} if is_hub_id else {}
    head |= {"tags": ["tokenppo", "ppo", "rlhf"]}
    step = evals.get("best", {}).get("step") if weights == "best" else summary.get("steps")
    stopped = f", stopped by run.{summary['stopped']} = {summary['limit']:g}" if "stopped" in summary else ""
    chosen = f" (the best evaluation by `{cfg.run.best_metric}`)" if weights == "best" else ""
    name = push or cfg.run.name
    settings = _settings(cfg)
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        "",
        f"# {name}",
        "",
        f"`{_short(base)}` trained with token-level PPO by tokenppo on the rewards below. Weights after step"
        f" {step}{chosen} of {summary.get('steps')}{stopped}; each step is {cfg.rollout.batch_size} responses.",
        "",
        "## Evaluation",
        "",
        *(_evaluations(evals) or ["The run had no held-out prompts."]),
        "",
        "## Rewards",
        "",
        "| component | function | weight | other settings |",
        "|---|---|---|---|",
        *_rewards(cfg),
        "",
        f"The penalty on the KL divergence from `{_short(base)}` began with the coefficient {cfg.ppo.kl_coef:g}.",
        "",
        "## Settings",
        "",
        "All that differ from the defaults of tokenppo:",
        "",
        "| key | value |",
        "|---|---|",
        *(f"| `{key}` | {_cell(value)} |" for key, value in settings.items() if not key.startswith("rewards.")),
        "",
        f"Versions: {', '.join(f'{k} {v}' for k, v in summary.get('versions', {}).items()) or 'not recorded'}.",
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'name = "{push or "path/of/this/folder"}"',
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)",
        "```",
        "",
        f"`{checkpoint.VALUE_HEAD_FILE}`, where it is there, is what PPO's critic learnt besides: transformers leaves"
        " it alone, `safetensors.torch.load_file` reads it.",
    ]
    return "\n".join(lines) + "\n"


def _evaluations(evals: dict[str, dict[str, float]]) -> list[str]:
    when = [w for w in ("before", "best", "after") if w in evals]
    names = [name for name in evals[when[-1]] if name != "step"] if when else []
    if not names:
        return []

    def figure(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    head = "".join(f" {w} (step {evals[w]['step']}) |" for w in when)
    rows = [f"| `{name}` |" + "".join(f" {figure(evals[w].get(name))} |" for w in when) for name in names]
    return [f"| mean over held-out prompts |{head}", "|---|" + "---|" * len(when), *rows]


def _rewards(cfg: Config) -> list[str]:
    settings, rows = _settings(cfg), []
    for name, spec in cfg.rewards.items():
        mine = {k.removeprefix(f"rewards.{name}."): v for k, v in settings.items() if k.startswith(f"rewards.{name}.")}
        others = ", ".join(f"{k} = {json.dumps(v)}" for k, v in mine.items() if k not in ("fn", "weight"))
        weight = f"{spec.weight:g}" if isinstance(spec.weight, float | int) else json.dumps(spec.weight)
        rows.append(f"| `{name}` | {_cell(mine['fn'])} | {weight} | {_cell(others) if others else ''} |")
    return rows


def _settings(cfg: Config) -> dict[str, Any]:
    """Flat key -> value of all that is not as it is by default; no secret, and of a path its last part."""
    from launch.shown import shown  # seconds of imports

    defaults = {key: json.dumps(default, default=str) for key, (_, default, _) in leaf_keys().items()}
    for name in cfg.rewards:
        defaults |= {k.replace(".NAME.", f".{name}."): v for k, v in defaults.items() if ".NAME." in k}
    return {
        key: _short(value)
        for key, value in shown(cfg).items()
        if key not in UNSAID and json.dumps(value, default=str) != defaults.get(key)
    }


def _short(value: Any) -> Any:
    """Without the folders of this machine: `/home/me/rewards.py:polite` -> `rewards.py:polite`."""
    if isinstance(value, str):
        return re.sub(r"(?<![\w:/.])/(?:[^/\s:]+/)*(?=[^/\s])", "", value)
    if isinstance(value, list):
        return [_short(item) for item in value]
    return {key: _short(item) for key, item in value.items()} if isinstance(value, dict) else value


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`".replace("|", "\\|").replace("\n", " ")


def _refuse_push(repository: str) -> None:
    """Raise UserError before anything is written where the upload cannot work."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"--push {repository}: wants owner/name, e.g. --push me/polite")
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(f"--push {repository}: no login for the hub; set HF_TOKEN, or log in with `hf auth login`")


def _push(folder: Path, repository: str) -> str:
    """Upload; a repository that is not there yet is made, as a private one."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    remedy = f"{folder} is whole; when that is mended: hf upload {repository} {folder}"
    api = HfApi(library_name="tokenppo")
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of tokenppo")
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise UserError(
                f"--push {repository}: the hub refuses this login ({status}); it wants a token that may write there."
                f" {remedy}"
            ) from None
        raise ProcessFault(f"--push {repository}: the hub answered {status or _words(error)}. {remedy}") from None
    except Exception as error:  # of the client below it, whose name and classes differ with its version
        raise ProcessFault(f"--push {repository}: no answer from the hub ({_words(error)}). {remedy}") from None
    return str(commit.commit_url)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
