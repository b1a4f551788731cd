"""The algorithm on one page: token-level PPO as DESIGN.md section 7 and arXiv 1707.06347 have it.

    rollout -> reward -> annotate -> shape -> GAE -> whiten -> update -> sync -> log

What runs at the same time: workers write chunks while the reward server scores the chunks that are finished. The loop
waits in `submit` for the last response and in `collect` for the last score; each wait has a deadline of its own below.
Every learner rank runs this loop on its share of each batch. Where it works alone, `ranks.together` makes a fault of
one rank a fault of all; what is logged is summed over all.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from core.combine import Combined, RunningMoments, attribution, combine, next_multipliers, total_std, weights_at
from core.faults import InvariantFault
from core.metrics import Sums
from core.schema import Config
from core.trajectory import PromptRequest, Trajectory
from core.weights import Probe
from trainer import estimators, ppo, value_heads
from trainer.ahead import Ahead
from trainer.backlog import Backlog
from trainer.batch import TrainBatch
from trainer.evaluate import evaluation_rows, evaluation_sums
from trainer.learner import Learner
from trainer.ranks import Ranks
from trainer.run_log import RunLog


class Prompts(Protocol):
    position: int  # prompts taken so far

    @property
    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint, `position` among them: prompts taken so far."""
        ...

    def take(self, n_prompts: int, n_samples_per_prompt: int = 1) -> list[PromptRequest]: ...

    def first(self, n_prompts: int) -> list[PromptRequest]: ...

    def observe(
        self, totals: list[tuple[int, float]], *, trained: int | None = None, oldest: int | None = None
    ) -> dict[str, float]:
        """(ordinal, total reward) of each sample of all ranks -> metrics. `trained`: prompts so far, these included;
        `oldest`: the first prompt that is still under way."""
        ...


class Rollouts(Protocol):
    counters: Counter[str]

    def share(self, requests: list[PromptRequest]) -> list[PromptRequest]:
        """Those whose responses come to this rank."""
        ...

    def start(self, requests: list[PromptRequest], submit: Callable[[Iterable[Any]], list[Any]]) -> Future:
        """Have `requests`, of all ranks, written; `submit` gets references of finished chunks of this rank, in any
        order. The Future of what it gives, and of the seconds that it took."""
        ...

    def start_batch(self, requests: list[PromptRequest], submit: Callable[[Iterable[Any]], list[Any]]) -> Future:
        """The same for a batch to train on, which may be of other prompts: the Future of a Written."""
        ...

    def finish(self) -> None:
        """Wait for all that was asked for, the last weights too. Raises what one of these raised."""
        ...


class Rewards(Protocol):
    counters: Counter[str]
    dropped: set[str]  # uids of samples that no score could be had for, in this process

    def submit(self, chunks: Iterable[Any]) -> list[Any]:
        """Have each chunk scored the moment it is finished; returns after the last response."""
        ...

    def collect(self, pending: list[Any], at_least: int = 0) -> list[Trajectory]:
        """The scored trajectories, sorted by ordinal. `at_least`: samples that the bound of lost ones is a share of."""
        ...


class Recorder(Protocol):
    counters: Counter[str]

    def record(
        self,
        step: int,
        batch: TrainBatch,
        trajectories: list[Trajectory],
        combined: Combined,
        new_logprobs: Tensor | None,
        weights: dict[str, float],
        before: dict[str, Any],
        credit: dict[str, float],
        policy_digest: str | None = None,
    ) -> None:
        """Keep what a step was, token by token; waits for nothing."""
        ...


class Looks(Protocol):
    def record(
        self,
        step: int,
        batch: TrainBatch,
        trajectories: list[Trajectory],
        combined: Combined,
        new_logprobs: Tensor | None,
    ) -> None:
        """Hand over what people look at, where the step is one of those; waits for the other ranks alone."""
        ...


class Publisher(Protocol):
    digest: str | None  # of the weights that were published last, where this rank knows it

    def publish(self, version: int) -> None: ...


@dataclass
class TrainState:
    """What the next step depends on besides the learner and the position of the prompts."""

    kl: ppo.KLController
    running: dict[str, RunningMoments] = field(default_factory=dict)
    multipliers: dict[str, float] = field(default_factory=dict)  # of components with `at_least`
    backlog: Backlog = field(default_factory=Backlog)  # of this rank, in a file of its own in a checkpoint
    faults: Counter[str] = field(default_factory=Counter)  # of all ranks, before the processes of this launch started

    def to_json(self) -> dict[str, Any]:
        """Plain values; floats come back from JSON bit for bit."""
        running = {name: asdict(moments) for name, moments in self.running.items()}
        return {"kl_coef": self.kl.coef, "running": running, "multipliers": self.multipliers}

    def restore(self, saved: dict[str, Any]) -> None:
        self.kl.coef = saved["kl_coef"]
        self.running = {name: RunningMoments(**moments) for name, moments in saved["running"].items()}
        self.multipliers = dict(saved["multipliers"])

    @classmethod
    def fresh(cls, cfg: Config) -> "TrainState":
        kl = ppo.KLController(cfg.ppo.kl_coef, target_kl=cfg.ppo.target_kl, horizon=cfg.ppo.kl_horizon)
        return cls(kl=kl, backlog=Backlog(in_rounds=cfg.rollout.in_rounds))


def train(
    cfg: Config,
    *,
    learner: Learner,
    prompts: Prompts,
    held_out: Prompts | None,
    rollouts: Rollouts,
    rewards: Rewards,
    publisher: Publisher,
    log: RunLog,
    state: TrainState,
    ledger: Recorder,
    gallery: Looks,
    on_eval: Callable[[int, dict[str, float]], None],
    on_step: Callable[[int, dict[str, float], list[str], dict[str, Any]], bool],
) -> None:
    """Train from where `learner`, `prompts` and `state` stand up to `run.steps` updates, or until `on_step` ends it.

    `on_eval(step, means)` is told of each evaluation, of the first policy as step 0; it keeps the best weights.
    `on_step(step, means, uids, prompts_state)` comes at the end of each step, when all that the next one depends on is
    in place, with the uids of the samples that this rank trained on, and where the prompts stand. It says whether to go
    on, the same on every rank.
    """
    ranks, ahead = learner.ranks, Ahead(cfg, prompts, rollouts, rewards.submit)
    publisher.publish(learner.step)
    if held_out is not None and learner.step == 0:
        with log.time("evaluate"):
            before = evaluate(cfg, held_out, rollouts, rewards, ranks, version=0)
        on_eval(0, before)
        log.baseline(before)

    for step in range(learner.step + 1, cfg.run.steps + 1):
        with ranks.together():
            with log.time("rollout"):
                written, version = ahead.take(step)
            with log.time("reward"):
                scored = rewards.collect(written.pending, at_least=len(written.requests))
                trajectories = state.backlog.batch(written, scored)
                older = cfg.rollout.in_rounds
                account(cfg, written.requests, trajectories, rewards.dropped, version=version, older=older)

        with log.time("annotate"):
            batch = TrainBatch.collate(trajectories, cfg.rewards)
            batch, policy_means = learner.annotate(batch)
        weights, before = weights_at(step, cfg.rewards, state.multipliers), state.to_json()
        combined = combine(
            batch.component_rewards,
            batch.component_mask,
            batch.response_mask,
            cfg.rewards,
            state.running,
            weights=weights,
            all_reduce=ranks.sum,
        )
        credit_means: dict[str, float] = {}
        batch = credit(
            cfg,
            batch.fill(token_rewards=combined.token_rewards, normalized_rewards=combined.normalized),
            state.kl.coef,
            ranks.sum,
            weights=weights,
            gather=ranks.gather,
            running=state.running,
            report=credit_means,
        )

        with log.time("update"):
            update_means = learner.update(batch)
        with log.time("sync"):
            publisher.publish(step)
        with log.time("log"):
            new, digest = learner.new_logprobs, publisher.digest
            ledger.record(step, batch, trajectories, combined, new, weights, before, credit_means, digest)
            gallery.record(step, batch, trajectories, combined, new)

        means = rollout_sums(batch, combined, trajectories, version=step - 1).merge(ranks.sum_list).means()
        means |= policy_means | credit_means | update_means | {"objective/kl_coef": state.kl.coef}
        means |= {f"reward/{name}/weight": weight for name, weight in weights.items()}
        for what, values in attribution(combined, batch.response_mask.sum(dim=1), all_reduce=ranks.sum).items():
            means |= {f"reward/{name}/{what}": value for name, value in values.items()}
        means["response/reward_std"] = total_std(combined, all_reduce=ranks.sum)
        samples, tokens = map(int, ranks.sum_list([len(batch), int(batch.response_mask.sum())]))
        means |= state.backlog.means(trajectories, ranks.sum_list)
        oldest = state.backlog.oldest(ranks.gather)
        means |= prompts.observe(totals(batch, ranks), trained=step * cfg.prompts_per_step, oldest=oldest)
        state.kl.update(means["objective/kl"], samples)
        raw = {name: means[f"reward/{name}/raw"] for name in cfg.rewards if f"reward/{name}/raw" in means}
        state.multipliers = next_multipliers(raw, cfg.rewards, state.multipliers)
        if held_out is not None and (step % cfg.run.eval_every == 0 or step == cfg.run.steps):
            with log.time("evaluate"):
                held_out_means = evaluate(cfg, held_out, rollouts, rewards, ranks, version=step)
                on_eval(step, held_out_means)
                means |= held_out_means
        means |= faults([rollouts.counters, rewards.counters, ledger.counters], ranks, state.faults)
        means["perf/rollout_tokens_per_s"] = tokens / written.seconds
        log.step(step, means, samples=samples, learner_tokens=tokens * means["ppo/epochs"])
        if not on_step(step, means, [t.request.sample_uid for t in trajectories], ahead.prompts_state):
            return
    with ranks.together():
        rollouts.finish()


def credit(
    cfg: Config,
    batch: TrainBatch,
    kl_coef: float,
    all_reduce: Callable[[Tensor], Tensor],
    *,
    weights: dict[str, float] | None = None,
    gather: Callable[[Any], list[Any]] | None = None,
    running: dict[str, RunningMoments] | None = None,
    report: dict[str, float] | None = None,
) -> TrainBatch:
    """Token rewards -> rewards, advantages, returns (DESIGN.md section 7, in its order).

    `weights`: of the components in this step, where they have value heads of their own. `gather`: as `Ranks.gather`;
    None for one process. `running`: of TrainState, updated in place. `report`: is given the means of this step under
    names of core/metrics.py, the same on every rank.
    """
    p, mask = cfg.ppo, batch.response_mask
    running, report = {} if running is None else running, {} if report is None else report
    token_rewards, reward_scale = estimators.scale_rewards(
        batch.token_rewards, mask, p.scale_rewards, all_reduce=all_reduce
    )
    written_by = batch.writers_logprobs(cfg.rollout.off_policy)
    rewards = ppo.shape_rewards(token_rewards, written_by, batch.ref_logprobs, mask, kl_coef=kl_coef)
    heads: value_heads.Heads | None = None
    if batch.head_values is None:
        unit = estimators.value_scale(running)  # of what the critic predicts: 1 unless `scale_values`
        values, bootstrap = batch.values * unit, batch.bootstrap_values * unit
    else:
        heads = value_heads.heads_of(
            batch.head_values,
            batch.head_bootstraps,
            batch.normalized_rewards,
            written_by,
            batch.ref_logprobs,
            mask,
            weights={name: weight / reward_scale for name, weight in weights.items()},
            kl_coef=kl_coef,
            running=running,
        )
        values, bootstrap = heads.baseline()
        batch = batch.fill(values=values, bootstrap_values=bootstrap)
    estimate = estimators.estimate(
        p,
        rewards,
        values,
        mask,
        bootstrap_values=bootstrap,
        groups=torch.from_numpy(batch.order[:, 0]),
        all_reduce=all_reduce,
        gather=gather,
    )
    advantages, returns = estimate.advantages, estimate.returns
    if p.whitens:
        mean, factor = by = ppo.whitening(advantages, mask, all_reduce=all_reduce)
        report |= {"credit/advantage_mean": float(mean), "credit/advantage_std": 1 / float(factor)}
        advantages = ppo.whiten(advantages, mask, by)
    if p.scale_rewards != "none":
        report["credit/reward_scale"] = reward_scale
    if p.scale_values != "none":
        report["value/explained_variance"] = ppo.explained_variance(values, returns, mask, all_reduce=all_reduce)
    if heads is not None:
        learnt = value_heads.returns_of(p, heads, mask, running, report, all_reduce=all_reduce)
        batch = batch.fill(head_returns=learnt)
    elif p.scale_values != "none":
        returns, report["value/scale"] = estimators.scale_returns(returns, mask, running, all_reduce=all_reduce)
    if p.compares_samples:
        report["credit/lone_frac"] = estimate.lone_frac
    return batch.fill(rewards=rewards, returns=returns, advantages=advantages)


def account(
    cfg: Config,
    requests: list[PromptRequest],
    trajectories: list[Trajectory],
    dropped: set[str],
    *,
    version: int | None,
    older: bool = False,
) -> None:
    """Raise InvariantFault unless what came back is what was asked for, each once, written by `version` of the weights.

    `dropped`: uids of those that may be missing, because `rewards` dropped them, within `run.max_dropped_frac`.
    `older`: tokens may be of versions before it too, never of a later one.
    """
    asked = {request.sample_uid for request in requests}
    got = [t.request.sample_uid for t in trajectories]
    if len(set(got)) != len(got) or not asked.issuperset(got) or (asked and not got):
        raise InvariantFault(
            f"{len(asked)} samples were asked for; {len(got)} came back, {len(asked & {*got})} of them"
        )
    if lost := sorted(asked.difference(got, dropped)):
        raise InvariantFault(
            f"{len(lost)} of {len(asked)} samples were lost: neither scored nor dropped; the first: {lost[0]}"
        )
    if not cfg.run.checks or version is None:
        return
    other = {int(v) for t in trajectories for v in t.policy_version} - {*(range(version) if older else ()), version}
    if other:
        upto = "at most " if older else ""
        raise InvariantFault(f"tokens were written by weights of version {sorted(other)}, not {upto}{version}")


def evaluate(
    cfg: Config, held_out: Prompts, rollouts: Rollouts, rewards: Rewards, ranks: Ranks, *, version: int | None
) -> dict[str, float]:
    """Means over held-out prompts, one sample each, on the workers at `version` (None: as they loaded from disk)."""
    with ranks.together():
        requests = held_out.first(cfg.data.eval_prompts)
        trajectories = answers(cfg, requests, rollouts, rewards, version=version)
    rows = evaluation_rows(trajectories, cfg.rewards)
    return evaluation_sums(rows, cfg.rewards).merge(ranks.sum_list).means()


def answers(
    cfg: Config, requests: list[PromptRequest], rollouts: Rollouts, rewards: Rewards, *, version: int | None
) -> list[Trajectory]:
    """The scored responses of this rank to held-out prompts, by (ordinal, k). Waits and raises as `rollouts` and
    `rewards` do, and as `account`."""
    pending, _ = rollouts.start(requests, rewards.submit).result()
    trajectories = rewards.collect(pending)
    account(cfg, rollouts.share(requests), trajectories, rewards.dropped, version=version)
    return trajectories


def totals(batch: TrainBatch, ranks: Ranks) -> list[tuple[int, float]]:
    """Ordinal and total reward before the KL penalty of each sample, of all ranks, sorted."""
    mine = zip(batch.order[:, 0].tolist(), batch.token_rewards.double().sum(dim=1).tolist(), strict=True)
    return sorted(sample for of_rank in ranks.gather(list(mine)) for sample in of_rank)


def faults(parts: list[Counter[str]], ranks: Ranks, before: Counter[str]) -> dict[str, float]:
    """Counters of all ranks, added to those of earlier launches of the run, as metrics."""
    total = Counter(before)
    # Copied at once: where batches are written ahead, another thread counts too.
    mine = sum((Counter(dict(counters)) for counters in parts), Counter())
    for counters in ranks.gather(mine):
        total.update(counters)
    return {f"faults/{name}": count for name, count in total.items()}


def rollout_sums(batch: TrainBatch, combined: Combined, trajectories: list[Trajectory], *, version: int) -> Sums:
    """Sums of what the responses of one step were worth and how they looked. `version`: of the policy before it."""
    sums, mask, n = Sums(), batch.response_mask, len(batch)
    sums.add("reward/total", float(torch.where(mask, combined.token_rewards, 0.0).double().sum()), n)
    for name, weighted in combined.weighted.items():
        valid = mask & batch.component_mask[name]
        applied = float(valid.any(dim=1).sum())
        sums.add(f"reward/{name}/raw", float(torch.where(valid, batch.component_rewards[name], 0.0).sum()), applied)
        sums.add(f"reward/{name}/normalized", float(combined.normalized[name].double().sum()), applied)
        sums.add(f"reward/{name}/weighted", float(weighted.double().sum()), n)
    sums.add("response/length_mean", float(mask.sum()), n)
    sums.add("response/turns_mean", float(turns_of(mask)), n)
    sums.add("response/truncated_frac", float(batch.cut.sum()), n)
    sums.add("staleness/mean", float((version - batch.policy_version)[mask].sum()), float(mask.sum()))
    last = max((t.finished_at for t in trajectories), default=0.0)
    sums.add("perf/scored_early_frac", sum(t.scored_at < last for t in trajectories), n)
    return sums


def turns_of(response_mask: Tensor) -> int:
    """Number of runs of the policy's own tokens in all rows of a mask [B, T]: what tokens of others lie between."""
    return int(response_mask[:, :1].sum() + (response_mask[:, 1:] & ~response_mask[:, :-1]).sum())


def make_probe(prompts: Prompts, n_response: int) -> Probe:
    """The fixed prompt of the weight check: the first held-out or training prompt, answered by its own ids."""
    prompt = prompts.first(1)[0].prompt_ids
    return Probe(prompt_ids=prompt[None, :], response_ids=prompt[None, :n_response])
