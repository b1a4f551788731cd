"""`tokenppo eval RUN|MODEL`: is one policy better than another? Both answer the same held-out prompts with the same
random numbers, on rollout workers and reward servers as in training (trainer/loop.py: answers), one after the other.

    POLICY --+                    +--> workers of POLICY  --> rewards --+
             +--> task, prompts --|                                     |--> KL to the base --> comparison --> gate
    AGAINST -+                    +--> workers of AGAINST --> rewards --+

The task (prompts, rewards, how answers are written) is that of the run, or of `--config`. Every wait is one of
training, with its deadline (docs/architecture.md).
"""

import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.config import load
from core.faults import UnmetRequirement, UserError
from core.pretrained import load_tokenizer
from core.schema import Config
from core.trajectory import PromptRequest, Trajectory
from launch import build, cluster, comparison, early, environment, interpreter, requirement
from launch.comparison import Answer, Report
from launch.evaluation_text import to_json, to_text
from launch.requirement import Requirement
from launch.reservation import reserve
from reward_server.components import ScoreRequest
from reward_server.reference import Reference, ReferenceSpec
from reward_server.texts import text_of
from trainer.evaluate import evaluation_rows
from trainer.loop import answers as answers_of

# Where a run had GPUs and there are none now.
WITHOUT_GPUS = {
    "rollout.placement": "colocated",
    "rollout.gpus_per_worker": None,
    "rollout.gpu_memory": None,
    "rollout.sleep": False,
    "resources.reward_gpus": 0,
    "resources.reward_placement": "colocated",
}
OF_BASE = ("objective/kl", "objective/kl_k3")
OF_BOTH = ("win_rate", "length_controlled")
WEIGHTS = ("final", "best", "base")


@dataclass(frozen=True)
class Policy:
    label: str
    path: str  # a folder that from_pretrained loads, or a hub id
    config: Path | None = None  # of the run it comes from
    run: Path | None = None


def evaluate(
    policy: str,
    *,
    weights: str = "final",
    against: str | None = None,
    config: str | None = None,
    data: str | None = None,
    prompts: int | None = None,
    samples: int = 1,
    metric: str | None = None,
    by: str | None = None,
    require: Sequence[str] = (),
) -> tuple[Report, list[tuple[Requirement, bool, str]]]:
    """The report, and each requirement with whether it is met and why. Arguments as the verb's.

    Raises UserError for what cannot work, before anything is started; other Faults as training does.
    """
    first = _policy(policy, weights, "POLICY")
    named = None if against is None or against in WEIGHTS else _policy(against, "final", "--against")
    file = Path(config) if config is not None else first.config or (named.config if named else None)
    if file is None:
        raise UserError(
            f"POLICY = {policy}: a model has neither prompts nor rewards; say which with --config (a file as for"
            " `tokenppo train`, or config.yaml of a run)"
        )
    cfg = _task(file, data, prompts)
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
    early.check_rewards(cfg)
    environment.check(cfg)
    interpreter.refuse(cfg, None)
    tokenizer = load_tokenizer(base.path)
    asked = [_requests(cfg, p, tokenizer, samples) for p in policies]
    _refuse_other_prompts(asked, policies)
    requests = asked[0]
    values = None if by is None else comparison.slices_of({r.ordinal: r.columns for r in requests}, by)
    written = _written(cfg, policies, requests)
    answers = [_answers(cfg, base, trajectories, tokenizer) for trajectories in written]
    labels = [p.label for p in policies]
    made = comparison.report(
        labels[0],
        answers[0],
        *((labels[1], answers[1]) if len(labels) > 1 else ()),
        asked=len(requests),
        decides=decides,
        by=None if by is None else (by, values),
    )
    return made, [(r, *r.judge(_asked_for(made, r))) for r in wanted]


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


def _task(file: Path, data: str | None, prompts: int | None) -> Config:
    """The configuration, whose `model.path` is the base. Raises UserError."""
    overrides: dict[str, object] = {"model.reference": "auto"}  # a reward server's reference would be asked for nothing
    overrides |= {} if data is None else {"data.eval_path": data, "data.eval_frac": 0}
    overrides |= {} if prompts is None else {"data.eval_prompts": prompts}
    if not torch.cuda.is_available() and load(file, overrides).resources.ray_address is None:
        overrides |= WITHOUT_GPUS
    cfg = load(file, overrides)
    if not cfg.data.has_held_out:
        raise UserError("data.eval_path = null: this task has no held-out prompts; name some with --data")
    return cfg


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


def _of(cfg: Config, policy: Policy) -> Config:
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": policy.path})})


def _requests(cfg: Config, policy: Policy, base: Any, samples: int) -> list[PromptRequest]:
    """The held-out prompts as this policy reads them. Raises UserError where it cannot, or has another tokenizer."""
    tokenizer = load_tokenizer(policy.path)
    if tokenizer.get_vocab() != base.get_vocab():
        raise UserError(
            f"{policy.label}: has another vocabulary than {cfg.model.path}, the base of this task; between policies of"
            " different tokens there is no KL, and no seed is the same"
        )
    _, held_out = build.prompt_streams(_of(cfg, policy), tokenizer)
    return held_out.first(cfg.data.eval_prompts, samples)


def _refuse_other_prompts(asked: list[list[PromptRequest]], policies: list[Policy]) -> None:
    for requests, policy in zip(asked[1:], policies[1:], strict=True):
        for one, other in zip(asked[0], requests, strict=True):
            if one.prompt_ids.tolist() != other.prompt_ids.tolist():
                raise UserError(
                    f"{policy.label}: its tokenizer or chat template reads prompt {one.ordinal + 1} otherwise than that"
                    f" of {policies[0].label}; give both the same"
                )


def _written(cfg: Config, policies: list[Policy], requests: list[PromptRequest]) -> list[list[Trajectory]]:
    """The scored answers of each policy. One Ray for all, and the same reward servers; one policy after the other."""
    with ExitStack() as stack:
        stack.enter_context(cluster.ray_session(cfg))
        device = cluster.device(cfg)
        seats = reserve(cfg, device, [], 1)
        rewards = build.reward_client(cfg, None, _note, seats=seats)
        stack.callback(rewards.close)
        rewards.wait_ready()
        written = []
        for policy in policies:
            _note(f"{policy.label}: {len(requests)} answers")
            of_policy = _of(cfg, policy)
            tokenizer = load_tokenizer(policy.path)
            with closing(build.rollouts(of_policy, tokenizer, device, _note, seats=seats)) as workers:
                workers.wait_ready()
                written.append(answers_of(of_policy, requests, workers, rewards, version=None))
        return written


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _answers(cfg: Config, base: Policy, trajectories: list[Trajectory], tokenizer: Any) -> list[Answer]:
    texts = [
        tokenizer.decode(t.response_ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for t in trajectories
    ]
    kls = _kl_to(cfg, base, trajectories, texts)
    rows = evaluation_rows(trajectories, cfg.rewards)
    return [
        Answer(
            row=replace(row, values=row.values | kl),
            prompt=text_of(t.request.columns["prompt"]),
            text=text,
            ids=t.response_ids[t.action_mask & (t.token_offsets[:, 1] > t.token_offsets[:, 0])].tolist(),
        )
        for t, text, row, kl in zip(trajectories, texts, rows, kls, strict=True)
    ]


def _kl_to(cfg: Config, base: Policy, trajectories: list[Trajectory], texts: list[str]) -> list[dict[str, float]]:
    """KL(policy || base) of each response, in nats, from its own tokens: their sum of

        k1 = log p - log q          k3 = q / p - 1 - (log q - log p)          p: policy, q: base

    Both have the KL as their mean; k3 is never below 0 and varies less (Schulman, joschu.net/blog/kl-approx.html).
    By the code of `model.reference: reward_server`, in this process: the workers are gone, and their GPU is free.
    """
    spec = ReferenceSpec(
        model=base.path,
        dtype=cfg.model.dtype,
        temperature=cfg.rollout.temperature,
        batch_size=cfg.rollout.chunk_size,
    )
    reference = Reference(spec)
    reference.setup("cuda" if cfg.resources.device != "cpu" and torch.cuda.is_available() else "cpu", [])
    with closing(reference):
        reference.begin(trajectories)
        found = reference.of(ScoreRequest.from_trajectories(trajectories, texts))
    kls = []
    for t, logprobs in zip(trajectories, found, strict=True):
        if isinstance(logprobs, Exception):
            raise logprobs
        log_ratio = (logprobs.astype(np.float64) - t.rollout_logprobs)[t.action_mask]
        k3 = np.expm1(log_ratio) - log_ratio
        kls.append({"objective/kl": float(-log_ratio.sum()), "objective/kl_k3": float(k3.sum())})
    return kls


def _asked_for(made: Report, r: Requirement) -> Any:
    """The Estimate that a requirement is about; None where there is none."""
    whole = made.whole
    if r.name == "win_rate":
        return whole.win_rate.rate if whole.win_rate else None
    if r.name == "length_controlled":
        return whole.length_controlled.difference if whole.length_controlled else None
    metric = whole.metrics.get(r.name)
    return None if metric is None else metric.difference if isinstance(r.bound, str) else metric.policy


def main(args: Any) -> int:
    """The verb, from its parsed arguments. Raises UnmetRequirement after everything is printed."""
    made, judged = evaluate(
        args.policy,
        weights=args.weights,
        against=args.against,
        config=args.config,
        data=args.data,
        prompts=args.prompts,
        samples=args.samples,
        metric=args.metric,
        by=args.by,
        require=args.require,
    )
    print(to_json(made, judged) if args.json else to_text(made, judged), flush=True)
    if unmet := [f"--require {r.text!r} is not met: {why}" for r, met, why in judged if not met]:
        raise UnmetRequirement("\n".join(unmet))
    return 0
