"""`tokenppo eval RUN|MODEL`: is one policy better than another? Both answer the same held-out prompts with the same
random numbers, on rollout workers and reward servers as in training (trainer/loop.py: answers), one after the other.

    POLICY --+                    +--> workers of POLICY  --> rewards --+
             +--> task, prompts --|                                     |--> KL to the base --> comparison --> gate
    AGAINST -+                    +--> workers of AGAINST --> rewards --+

The task (prompts, rewards, how answers are written) is that of the run, or of `--config`. Every wait is one of
training, with its deadline (docs/architecture.md).
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from core.config import load
from core.faults import UnmetRequirement, UserError
from core.pretrained import load_tokenizer
from core.schema import Config
from core.trajectory import PromptRequest, Trajectory
from launch import build, cluster, comparison, early, environment, evaluation_task, interpreter
from launch.comparison import Answer, Report
from launch.evaluation_task import Policy
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
    asked = evaluation_task.read(
        policy,
        weights=weights,
        against=against,
        config=config,
        data=data,
        prompts=prompts,
        samples=samples,
        metric=metric,
        require=require,
    )
    cfg, policies = asked.cfg, asked.policies
    if not torch.cuda.is_available() and cfg.resources.ray_address is None:
        cfg = load(asked.file, asked.overrides | WITHOUT_GPUS)
    base = Policy("base", cfg.model.path)
    early.check_rewards(cfg)
    environment.check(cfg)
    interpreter.refuse(cfg, None)
    tokenizer = load_tokenizer(base.path)
    of_each = [_requests(cfg, p, tokenizer, samples) for p in policies]
    _refuse_other_prompts(of_each, policies)
    requests = of_each[0]
    values = None if by is None else comparison.slices_of({r.ordinal: r.columns for r in requests}, by)
    written = _written(cfg, policies, requests)
    answers = [_answers(cfg, base, trajectories, tokenizer) for trajectories in written]
    labels = [p.label for p in policies]
    made = comparison.report(
        labels[0],
        answers[0],
        *((labels[1], answers[1]) if len(labels) > 1 else ()),
        asked=len(requests),
        decides=asked.decides,
        by=None if by is None else (by, values),
    )
    return made, [(r, *r.judge(_asked_for(made, r))) for r in asked.wanted]


def _of(cfg: Config, policy: Policy) -> Config:
    written_alone = cfg.rollout.model_copy(update={"emit_values": False})  # nobody reads values, or has a head for them
    return cfg.model_copy(
        update={"model": cfg.model.model_copy(update={"path": policy.path}), "rollout": written_alone}
    )


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
