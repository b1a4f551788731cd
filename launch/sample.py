"""`tokenppo sample RUN [TEXT]`: what a trained model answers, and which token of it earns what.

No Ray and no workers: one engine and the rewards of the run in this process, one model after the other. Rewards are raw
values times the last weights, without normalisers, as in an evaluation.
"""

import functools
import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from core.config import load
from core.faults import RewardFault, UserError
from core.plain_text import one_line
from core.pretrained import load_tokenizer
from core.schema import Config, RewardConfig
from core.trajectory import PromptRequest, Trajectory
from launch import build, early, environment, run_folder
from launch.heat_map import heat_map
from reward_server.components import load_component, missing_arguments
from reward_server.server import RewardServer, ScoreFailure
from reward_server.texts import text_of
from rollout.engines.transformers_engine import TransformersEngine, stop_ids
from rollout.prompts import PromptStream
from rollout.turns import Turns


@dataclass(frozen=True)
class Sample:
    """A response of one model, scored or not."""

    weights: str
    trajectory: Trajectory
    text: str
    base_logprobs: np.ndarray | None  # [T] float32 of the same tokens under the model that the run began with
    failures: dict[str, str]  # component -> why there is no score of it


def sample_run(
    run: Path,
    text: str | None = None,
    *,
    row: int | None = None,
    weights: str = "final",
    compare: str | None = None,
    n: int = 1,
    seed: int = 0,
    max_new_tokens: int | None = None,
    component: str | None = None,
    device: str = "auto",
    as_json: bool = False,
    console: Console | None = None,
) -> int:
    """Write and print; returns 0, or RewardFault's code where a response could not be scored. Raises UserError.

    Args:
        text: the prompt. One that is a row of the run's data brings the columns of that row with it.
        row: number of a held-out prompt, or of a training prompt where there are none; 0 without `text`.
        component: whose raw rewards colour the tokens; the weighted sum of all if None.
    """
    cfg, device = _configuration(run, weights, max_new_tokens), _device(device)
    tokenizer = load_tokenizer(cfg.model.path)
    chosen = _row(cfg, tokenizer, text, row)
    components, unscored = _components(cfg, chosen)
    if component is not None and component not in components:
        why = unscored.get(component, f"the run has {', '.join(cfg.rewards)}")
        raise UserError(f"--component {component}: {why}")
    stream = PromptStream(
        [chosen],
        tokenizer,
        cfg.data,
        run_id="sample",
        seed=seed,
        window=build.response_room(cfg),
        stop=stop_ids(cfg.model.path, tokenizer.eos_token_id),
        source="TEXT" if text is not None else "--row",
    )
    requests = stream.take(1, n)
    models = list(dict.fromkeys(filter(None, [weights, compare])))
    written = {which: _write(run, cfg, tokenizer, which, device, requests) for which in models}
    base = None
    if "base" in models and not cfg.rollout.filters:  # with filters the two would be over other ids
        of_trained = written[weights] if weights != "base" else []
        base = _logprobs_under(run, cfg, tokenizer, device, of_trained)
    samples = []
    with closing(RewardServer(components, functools.partial(load_tokenizer, cfg.model.path))) as server:
        for which, trajectories in written.items():
            scored, failures = server.score(trajectories)
            samples += _joined(which, trajectories, scored, failures, tokenizer, base if which == weights else None)
    if as_json:
        print(json.dumps(_to_json(chosen, cfg, components, unscored, samples)))
    else:
        _show(chosen, cfg, components, unscored, samples, component, console or Console())
    return RewardFault.exit_code if any(s.failures for s in samples) else 0


def _device(asked: str) -> str:
    """cpu or cuda, whatever the run was made on."""
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use cpu or auto")
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"


def _configuration(run: Path, weights: str, max_new_tokens: int | None) -> Config:
    run_folder.refuse_no_run(run)
    overrides: dict[str, object] = {"rollout.round_tokens": None, "rollout.extra_prompts": 0}  # written whole
    if weights != "base":
        overrides["model.path"] = str(_folder(run, weights))
    if max_new_tokens is not None:
        overrides["rollout.max_new_tokens"] = max_new_tokens
    cfg = load(run / "config.yaml", overrides)
    early.check_rewards(cfg)
    environment.check(cfg)
    return cfg


def _folder(run: Path, weights: str) -> Path:
    folder = (run / weights).absolute()
    if not folder.is_dir():
        raise UserError(f"--weights {weights}: {run / weights} does not exist")
    return folder


def _row(cfg: Config, tokenizer: Any, text: str | None, row: int | None) -> dict[str, Any]:
    """The row of the dataset to answer; of a prompt that nobody wrote down there, a row of it alone."""
    column = cfg.data.prompt_column
    if text is not None and row is not None:
        raise UserError(f"--row {row}: TEXT is given too; one of the two says which prompt")
    if text is not None and not any(Path(path).exists() for path in (cfg.data.eval_path, *cfg.data.sources) if path):
        return {column: text}
    training, held_out = build.prompt_streams(cfg, tokenizer)
    if text is not None:
        rows = [*(held_out.rows if held_out else []), *training.rows]
        return next((r for r in rows if text_of(r[column]) == text), {column: text})
    rows = (held_out or training).rows
    row = row or 0
    if not 0 <= row < len(rows):
        raise UserError(f"--row {row}: there are {len(rows)} prompts, from 0 on")
    return rows[row]


def _components(cfg: Config, row: dict[str, Any]) -> tuple[dict[str, RewardConfig], dict[str, str]]:
    """Those that can score an answer to this row, and why the others cannot."""
    can, cannot = {}, {}
    columns = {name for name in row if name != cfg.data.prompt_column} | {"prompt"}
    for name, spec in cfg.rewards.items():
        if missing := missing_arguments(load_component(spec.fn), [*columns, *spec.options]):
            cannot[name] = (
                f"it wants {', '.join(missing)}, which this prompt has not: take a row of the data with --row"
            )
        else:
            can[name] = spec
    if not can:
        raise UserError(
            f"no reward of the run can score an answer: {'; '.join(f'{k}: {v}' for k, v in cannot.items())}"
        )
    return can, cannot


def _engine(run: Path, cfg: Config, tokenizer: Any, weights: str, device: str) -> TransformersEngine:
    """The embedded one, whatever the run wrote with: one model fits where the learner's did."""
    path = load(run / "config.yaml").model.path if weights == "base" else str(_folder(run, weights))
    embedded = cfg.rollout.model_copy(update={"engine": "transformers", "python": None, "emit_values": False})
    of_weights = cfg.model_copy(
        update={"rollout": embedded, "model": cfg.model.model_copy(update={"path": path})},
    )
    stop = stop_ids(cfg.model.path, tokenizer.eos_token_id)
    return build.engine_loader(of_weights, stop, device)()


def _write(
    run: Path, cfg: Config, tokenizer: Any, weights: str, device: str, requests: list[PromptRequest]
) -> list[Trajectory]:
    """The responses of one model, whose memory is free again afterwards."""
    turns = Turns(_engine(run, cfg, tokenizer, weights, device), tokenizer, build.environment_spec(cfg))
    return [
        Trajectory(
            request=request,
            response_ids=w.response_ids,
            rollout_logprobs=w.logprobs,
            action_mask=w.action_mask,
            token_offsets=w.token_offsets,
            policy_version=np.zeros(len(w.response_ids), dtype=np.int64),
            finish_reason=w.finish_reason,
            finished_at=0.0,
            kept=w.kept,
        )
        for request, w in zip(requests, turns.write(requests), strict=True)
    ]


def _logprobs_under(
    run: Path, cfg: Config, tokenizer: Any, device: str, trajectories: list[Trajectory]
) -> dict[str, np.ndarray]:
    """uid -> [T] float32 of the base model."""
    engine = _engine(run, cfg, tokenizer, "base", device)
    return {
        t.request.sample_uid: engine.logprobs(t.request.prompt_ids[None], t.response_ids[None])[0] for t in trajectories
    }


def _joined(
    weights: str,
    written: list[Trajectory],
    scored: list[Trajectory],
    failures: list[ScoreFailure],
    tokenizer: Any,
    base: dict[str, np.ndarray] | None,
) -> list[Sample]:
    by_uid = {t.request.sample_uid: t for t in scored}
    out = []
    for t in written:
        uid = t.request.sample_uid
        text = tokenizer.decode(t.response_ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        failed = {f.component: f.reason for f in failures if f.trajectory.request.sample_uid == uid}
        out.append(Sample(weights, by_uid.get(uid, t), text, (base or {}).get(uid), failed))
    return out


def weighted(sample: Sample, components: dict[str, RewardConfig]) -> dict[str, np.ndarray]:
    """Component -> [T] float64: what each token earns by it; nothing of a response that was not scored."""
    raw = sample.trajectory.component_rewards
    return {name: spec.last_weight * raw[name] for name, spec in components.items() if name in raw}


def _to_json(
    row: dict[str, Any],
    cfg: Config,
    components: dict[str, RewardConfig],
    unscored: dict[str, str],
    samples: list[Sample],
) -> dict[str, Any]:
    def one(s: Sample) -> dict[str, Any]:
        t, earned = s.trajectory, weighted(s, components)
        total = sum(earned.values()) if earned else None
        tokens = []
        for i, token in enumerate(t.response_ids.tolist()):
            start, end = t.token_offsets[i].tolist()
            tokens.append(
                {
                    "id": token,
                    "text": s.text[start:end],
                    "start": start,
                    "end": end,
                    "written_by": "policy" if t.action_mask[i] else "environment",
                    "logprob": float(t.rollout_logprobs[i]),
                    "base_logprob": None if s.base_logprobs is None else float(s.base_logprobs[i]),
                    "reward": None if total is None else float(total[i]),
                    "components": {name: float(x[i]) for name, x in t.component_rewards.items()},
                }
            )
        return {
            "weights": s.weights,
            "k": t.request.k,
            "text": s.text,
            "finish_reason": t.finish_reason,
            "reward": None if total is None else float(total.sum()),
            "components": {name: float(x.sum()) for name, x in t.component_rewards.items()},
            "failures": s.failures,
            "tokens": tokens,
        }

    return {
        "prompt": text_of(row[cfg.data.prompt_column]),
        "component_weights": {name: spec.last_weight for name, spec in components.items()},
        "not_scored": unscored,
        "samples": [one(s) for s in samples],
    }


def _show(
    row: dict[str, Any],
    cfg: Config,
    components: dict[str, RewardConfig],
    unscored: dict[str, str],
    samples: list[Sample],
    component: str | None,
    console: Console,
) -> None:
    plain = {"markup": False, "highlight": False, "soft_wrap": True}
    console.print(one_line(text_of(row[cfg.data.prompt_column])), style="dim", **plain)
    for name, why in unscored.items():
        console.print(f"  {name} does not count here: {one_line(why)}", style="yellow", **plain)
    colours = [
        s.trajectory.component_rewards.get(component) if component else sum(weighted(s, components).values())
        for s in samples
    ]
    largest = max((float(np.abs(c).max()) for c in colours if isinstance(c, np.ndarray) and len(c)), default=0.0)
    for s, colour in zip(samples, colours, strict=True):
        t, earned = s.trajectory, weighted(s, components)
        head = f"\n{s.weights} #{t.request.k}  {int(t.action_mask.sum())} tokens, {t.finish_reason}"
        if earned:
            parts = "  ".join(f"{name} {x.sum():+.3g}" for name, x in earned.items())
            head += f"  reward {sum(x.sum() for x in earned.values()):+.3g}  ({parts})"
        if s.base_logprobs is not None:
            head += f"  KL to base {float((t.rollout_logprobs - s.base_logprobs)[t.action_mask].sum()):.3g} nats"
        console.print(head, style="bold", **plain)
        for name, reason in s.failures.items():
            console.print(f"  not scored: {name}: {one_line(reason)}", style="red", **plain)
        shown = colour if isinstance(colour, np.ndarray) else np.zeros(len(t))
        console.print("  ", heat_map(s.text, t.token_offsets, shown, largest), sep="")


def main(args: Any) -> int:
    """The verb, from its parsed arguments."""
    return sample_run(
        Path(args.run),
        args.text,
        row=args.row,
        weights=args.weights,
        compare=args.compare,
        n=args.n,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        component=args.component,
        device=args.device,
        as_json=args.json,
    )
