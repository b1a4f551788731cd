"""Replay: the stages of a step computed again and compared with what its ledger has of them.

    rewards -> weighted rewards -> log-probs and values -> rewards after KL -> advantages and returns
            -> losses and gradients -> weights

Each stage begins with what the ledger has of the stages before it, not with what was computed again: so a difference is
named where it arose, and those behind it are judged by themselves. Of several value heads the ledger has only what they
say together; there those behind go on with the replayed ones.

Legend: B samples, T response tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from core.combine import RunningMoments, combine, weights_at
from core.faults import InvariantFault
from core.schema import Config
from core.trajectory import Trajectory
from trainer.batch import TrainBatch
from trainer.learner import TOLERANCES, VALUE_TOLERANCES, Learner
from trainer.ledger import numbers_of
from trainer.loop import credit
from trainer.recorded import RecordedStep

Verdict = Literal["equal", "within tolerance", "differs", "out of reach"]
Value = float | str | None


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """By how much a number may differ and still be the same: for |x| <= 1 as it stands, else as a share of x.

    All 0 where the same bits are promised (`run.deterministic`, one process, the same device, threads and torch).
    """

    scores: float = 0.0  # of components: a model among them reads other responses beside each
    arithmetic: float = 0.0  # sums over a batch in another order, float32
    forward: float = 0.0  # log-probs and values, other rows beside each other or other threads
    workers: float = 0.0  # log-probs of the step where they are the workers' (`rollout.emit_values`); 0: they are not
    worker_values: float = 0.0  # likewise, values and bootstraps, as a share of the root mean square of the values
    update: float = 0.0  # of tokens after some optimizer steps, each of which starts from the last one's rounding
    means: float = 0.0  # of what is logged of these steps

    @classmethod
    def of(cls, dtype: str) -> "Tolerances":
        """Where bits may differ.

        Log-probs may by what a run itself bears between two passes of the learner (the first ratio off 1), after
        optimizer steps by what it bears on one token between worker and learner; so they may before them where they are
        the workers'. Measured between two learner processes and one, on cards: fp32 1.4e-6, 2.8e-5 and means 5e-8; bf16
        4e-5, 0.13 and means 0.02.
        """
        limits = TOLERANCES[dtype]
        means = {"float32": 1e-3, "bfloat16": 0.05}[dtype]
        forward, update = limits["ratio"], limits["logprob_max"]
        return cls(scores=forward, arithmetic=1e-5, forward=forward, update=update, means=means)

    def by_workers(self, dtype: str) -> "Tolerances":
        """The same where log-probs and values of the step are the workers'."""
        workers, values = TOLERANCES[dtype]["logprob_max"], VALUE_TOLERANCES[dtype]["value_max"]
        return replace(self, workers=workers, worker_values=values)


@dataclass(frozen=True, kw_only=True)
class First:
    """The first number, in the order of the table, that differs by more than it may."""

    what: str  # column, component, key or metric
    uid: str | None = None
    token: int | None = None
    recorded: Value = None
    replayed: Value = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    verdict: Verdict
    compared: int = 0
    differing: int = 0  # by more than they may
    largest: float = 0.0  # distance of two numbers; inf where one of them is none
    tolerance: float = 0.0
    first: First | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def out_of_reach(cls, name: str, why: str) -> "Stage":
        return cls(name=name, verdict="out of reach", notes=(why,))

    def to_json(self) -> dict[str, Any]:
        """Plain values; null for a number that is not finite."""

        def plain(x: Any) -> Any:
            if isinstance(x, Mapping):
                return {key: plain(value) for key, value in x.items()}
            return None if isinstance(x, float) and not math.isfinite(x) else x

        return plain(asdict(self))


class Comparison:
    """Collects what one stage compares."""

    def __init__(self, name: str, tolerance: float = 0.0, uids: list[str] | None = None) -> None:
        self.name, self.tolerance, self._uids = name, tolerance, uids or []
        self._compared = self._differing = 0
        self._largest, self._first = 0.0, None
        self._notes: list[str] = []

    def tokens(
        self, what: str, recorded: Tensor, replayed: Tensor, mask: Tensor, tolerance: float | None = None
    ) -> None:
        """[B, T] each, where `mask` is True. `tolerance`: another than that of the stage."""
        self._compare(what, recorded, replayed, mask, tolerance=tolerance)

    def responses(self, what: str, recorded: Tensor, replayed: Tensor, tolerance: float | None = None) -> None:
        """[B] each."""
        every = torch.ones(recorded.shape, dtype=torch.bool)
        self._compare(what, recorded, replayed, every, tolerance=tolerance)

    def number(self, what: str, recorded: float | None, replayed: float, tolerance: float | None = None) -> None:
        """None is NaN: as metrics.jsonl has it. `tolerance`: another than that of the stage."""
        pair = [torch.tensor([math.nan if x is None else x], dtype=torch.float64) for x in (recorded, replayed)]
        self._compare(what, *pair, torch.ones(1, dtype=torch.bool), tolerance=tolerance, of_responses=False)

    def same(self, what: str, recorded: Any, now: Any, uid: str | None = None) -> None:
        """Any two values, which are equal or not."""
        self._compared += 1
        if recorded != now:
            self._differing += 1
            self._first = self._first or First(what=what, uid=uid, recorded=_shown(recorded), replayed=_shown(now))

    def note(self, text: str) -> None:
        self._notes.append(text)

    def stage(self) -> Stage:
        verdict: Verdict = "differs" if self._differing else "within tolerance" if self._largest else "equal"
        return Stage(
            name=self.name,
            verdict=verdict,
            compared=self._compared,
            differing=self._differing,
            largest=self._largest,
            tolerance=self.tolerance,
            first=self._first,
            notes=tuple(self._notes),
        )

    def _compare(
        self,
        what: str,
        recorded: Tensor,
        replayed: Tensor,
        mask: Tensor,
        *,
        tolerance: float | None = None,
        of_responses: bool = True,
    ) -> None:
        recorded, replayed = recorded.detach().double().cpu(), replayed.detach().double().cpu()
        same = (recorded == replayed) | (recorded.isnan() & replayed.isnan()) | ~mask
        distance = torch.where(same, 0.0, (recorded - replayed).abs()).nan_to_num(nan=math.inf)
        tolerance = self.tolerance if tolerance is None else tolerance
        beyond = ~same & ~(distance <= tolerance * recorded.abs().clamp(min=1.0))
        self._compared += int(mask.sum())
        self._differing += int(beyond.sum())
        self._largest = max(self._largest, float(distance.max()) if distance.numel() else 0.0)
        if self._first is None and beyond.any():
            at = tuple(beyond.nonzero()[0].tolist())
            self._first = First(
                what=what,
                uid=self._uids[at[0]] if of_responses else None,
                token=at[1] if len(at) > 1 else None,
                recorded=float(recorded[at]),
                replayed=float(replayed[at]),
            )


def _shown(value: Any) -> Value:
    return value if value is None or isinstance(value, (int, float, str)) else str(value)


def compare_rewards(recorded: RecordedStep, scored: Mapping[str, Trajectory | str], tolerances: Tolerances) -> Stage:
    """`scored`: by uid the response with its rewards of now, or why it has none."""
    c, mask = Comparison("rewards", tolerances.scores, recorded.uids), recorded.batch.response_mask
    failed = {uid: t for uid, t in scored.items() if isinstance(t, str)}
    for uid, why in failed.items():
        c.same("a score", "there was one", why, uid)
    rows = [t if uid in failed else scored[uid] for uid, t in zip(recorded.uids, recorded.trajectories, strict=True)]
    of_both = [n for n in recorded.batch.component_rewards if all(n in t.component_rewards for t in rows)]
    now, lost = TrainBatch.collate(rows, of_both), torch.tensor([uid in failed for uid in recorded.uids])
    there = mask & ~lost[:, None]
    for name in of_both:
        was, applies = recorded.batch.component_rewards[name], recorded.batch.component_mask[name]
        c.tokens(f"{name} applies", applies, now.component_mask[name], there)
        c.tokens(name, was, now.component_rewards[name], there & applies & now.component_mask[name])
    if recorded.batch.ref_logprobs is not None:
        c.tokens("ref_logprobs", recorded.batch.ref_logprobs, now.ref_logprobs, there)
    return c.stage()


def weigh(recorded: RecordedStep, cfg: Config, running: dict[str, RunningMoments], tolerances: Tolerances) -> Stage:
    """Normalise, clip, weigh and add up the recorded raw rewards. `running`: updated in place."""
    c = Comparison("weighted rewards", tolerances.arithmetic, recorded.uids)
    batch, mask, said = recorded.batch, recorded.batch.response_mask, recorded.said
    if cfg.rewards.keys() != batch.component_rewards.keys():
        c.same("components", sorted(batch.component_rewards), sorted(cfg.rewards))
        return c.stage()
    weights = weights_at(recorded.step, cfg.rewards, said["before"]["multipliers"])
    for name, weight in said["weights"].items():
        c.number(f"weight of {name}", weight, weights[name])
    combined = combine(batch.component_rewards, batch.component_mask, mask, cfg.rewards, running, weights=weights)
    for name in recorded.normalized:
        c.tokens(f"normalized {name}", recorded.normalized[name], combined.normalized[name], mask)
        c.tokens(f"weighted {name}", recorded.weighted[name], combined.weighted[name], mask)
    c.tokens("token_rewards", recorded.numbers["token_rewards"], combined.token_rewards, mask)
    return c.stage()


def annotate(recorded: RecordedStep, learner: Learner, tolerances: Tolerances) -> tuple[Stage, TrainBatch]:
    """Log-probs and values under the policy before the step. Returns the batch as the learner fills it, by a forward of
    its own also where the step took what workers said."""
    c = Comparison("log-probs and values", tolerances.workers or tolerances.forward, recorded.uids)
    batch, _ = learner.annotate(recorded.batch, own=True)
    mask, numbers = batch.response_mask, recorded.numbers
    c.tokens("old_logprobs", numbers["old_logprobs"], batch.old_logprobs, mask)
    c.tokens("ref_logprobs", numbers["ref_logprobs"], batch.ref_logprobs, mask, tolerances.forward)
    if batch.values is not None:
        rms = float(batch.values[mask].double().square().mean().sqrt())
        of_values = min(1.0, rms) * tolerances.worker_values if tolerances.workers else tolerances.forward
        c.tokens("values", numbers["values"], batch.values, mask, of_values)
        c.responses("bootstrap_value", recorded.bootstrap_values, batch.bootstrap_values, of_values)
    return c.stage(), batch


def reward_and_credit(
    recorded: RecordedStep,
    cfg: Config,
    running: dict[str, RunningMoments],
    annotated: TrainBatch | None,
    row: Mapping[str, float | None],
    tolerances: Tolerances,
) -> tuple[Stage, Stage, TrainBatch]:
    """Rewards after KL, then advantages and returns. `running`: updated in place; `row`: of metrics.jsonl.

    `annotated`: as `annotate` gives it, for what several value heads said; None where one head says all.
    """
    numbers, mask, said, report = recorded.numbers, recorded.batch.response_mask, recorded.said, {}
    if annotated is None or annotated.head_values is None:
        predicted = {"values": numbers["values"], "bootstrap_values": recorded.bootstrap_values}
    else:
        predicted = {"head_values": annotated.head_values, "head_bootstraps": annotated.head_bootstraps}
    batch = replace(recorded.batch, ref_logprobs=numbers["ref_logprobs"]).fill(
        old_logprobs=numbers["old_logprobs"],
        token_rewards=numbers["token_rewards"],
        normalized_rewards=recorded.normalized,
        **predicted,
    )
    made = credit(
        cfg,
        batch,
        said["before"]["kl_coef"],
        lambda sums: sums,
        weights=said["weights"],
        gather=lambda item: [item],
        running=running,
        report=report,
    )
    rewards = Comparison("rewards after KL", tolerances.arithmetic, recorded.uids)
    rewards.tokens("kl", numbers["kl"], made.writers_logprobs(cfg.rollout.off_policy) - made.ref_logprobs, mask)
    rewards.tokens("rewards", numbers["rewards"], made.rewards, mask)
    credited = Comparison("advantages and returns", tolerances.arithmetic, recorded.uids)
    if made.head_values is not None:
        credited.tolerance = tolerances.forward
        credited.tokens("values", numbers["values"], made.values, mask)
    credited.tokens("advantages", numbers["advantages"], made.advantages, mask)
    credited.tokens("returns", numbers["returns"], made.returns, mask)
    for name, value in report.items():
        credited.number(name, row.get(name), value)
    return rewards.stage(), credited.stage(), made


def update(
    recorded: RecordedStep,
    learner: Learner,
    credited: TrainBatch,
    row: Mapping[str, float | None],
    tolerances: Tolerances,
) -> Stage:
    """The optimizer steps, on recorded advantages and returns; `learner` is then behind the step.

    The mean norm of the gradients (optim/grad_norm) and the log-probs of the last pass stand for the gradients.
    `credited`: as `reward_and_credit` gives it, for what the ledger has not.
    """
    c = Comparison("losses and gradients", tolerances.update, recorded.uids)
    of_ledger = {name: recorded.numbers[name] for name in ("values", "advantages", "returns")}
    batch = replace(credited, **of_ledger)
    try:
        means = learner.update(batch)
    except InvariantFault as error:
        c.same("the update", "it was made", str(error))
        return c.stage()
    for name, value in means.items():
        c.number(name, row.get(name), value, tolerances.means)
    new = learner.new_logprobs.float().cpu()
    now, mask = numbers_of(batch, new, learner.cfg), batch.response_mask
    for name in ("new_logprobs", "ratio", "importance"):
        c.tokens(name, recorded.numbers[name], now[name], mask)
    if not tolerances.update:  # a token at the edge may fall on either side
        c.tokens("clipped", recorded.numbers["clipped"], now["clipped"], mask)
    return c.stage()


def compare_weights(recorded: RecordedStep, digest: str, saved: Mapping[str, Tensor] | None, learner: Learner) -> Stage:
    """Behind the step. `digest`: of what would be sent to workers now; `saved`: of the checkpoint of this step,
    which has the value function too; None without one."""
    c = Comparison("weights")
    c.same("policy_digest", recorded.said["policy_digest"], digest)
    if saved is None:
        if not learner.cfg.rollout.emit_values:  # then the workers get its head too
            c.note("of the policy, not of the value function: that is in the checkpoint of this step alone")
        return c.stage()
    for name, parameter in learner.policy.named_parameters():
        if name in saved:  # of tied ones one is
            others = int((parameter.detach().cpu() != saved[name]).sum())
            c.same(name, "as saved", f"{others} of {parameter.numel()} elements are others" if others else "as saved")
    return c.stage()
