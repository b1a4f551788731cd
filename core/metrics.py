"""Metrics: the one table of their names, and averages that carry their denominator until the last moment.

A name that is not in the table cannot be logged. No name is a path prefix of another (`a/b` beside `a/b/c` breaks
MLflow's file store). `docs/metrics.md` is this table:

    python -m core.metrics > docs/metrics.md
"""

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from core.faults import InvariantFault

AllReduce = Callable[[list[float]], list[float]]  # sums a 1-D float64 vector over all ranks, element by element

SHARE = "share"  # unit of fractions of 1; people read them as per cent
OWN_UNIT = "the component's own"
RUN_COUNT = "none: a count since the run began, less what happened after a checkpoint that it went back to"


@dataclass(frozen=True)
class Metric:
    """One row: what a number means, in which unit, what it was divided by, and which values are no cause for worry."""

    name: str  # `<component>`, `<phase>` and `<counter>` stand for one path segment
    meaning: str
    unit: str
    denominator: str
    healthy: str


# Each ends where the next begins: their seconds never overlap, so that they add up to time/total.
PHASES: dict[str, str] = {
    "rollout": "Waiting for the responses of this step.",
    "reward": "Waiting for scores after the last response came in.",
    "annotate": "Forward passes for old_logprobs, ref_logprobs and values.",
    "update": "PPO epochs: forward, backward, optimizer.",
    "sync": "Sending the new weights until every worker has committed them.",
    "evaluate": "Evaluation, where one was due.",
    "checkpoint": "Writing a checkpoint, where one was due; charged to the next step.",
    "log": "Writing metrics, panel and trackers; what the line of a step costs is charged to the next step.",
    "other": "time/total minus all phases above.",
    "total": "From the end of the previous step (or the start of the loop) to the end of this one.",
}

COUNTERS: dict[str, str] = {
    "worker_lost": "Rollout workers or reward servers that died or missed a deadline.",
    "prompts_redispatched": "Samples sent to another worker because theirs was lost.",
    "duplicates_dropped": "Responses that arrived a second time, or from before a restart, and were dropped.",
    "scores_retried": "Samples whose score failed and was asked for again.",
    "samples_dropped": "Samples that were left out of training because no score could be had.",
    "weights_resent": "Weight transfers repeated because the digest or an acknowledgement did not fit.",
    "checkpoints_damaged": "Checkpoints that were found damaged when the run went on; each was set aside and named.",
    "ledger_missed": "Steps of which the ledger of a learner process was not written; training has them all.",
    "tracker_errors": "Steps that a tracker (TensorBoard, W&B) failed to take; metrics.jsonl holds them.",
}

# `reward/total` and `reward/total/raw`, or `eval/reward` and `eval/reward/total`: prefixes of one another.
RESERVED_COMPONENTS: frozenset[str] = frozenset({"total", "reward", "response"})

_REWARD = (
    Metric(
        "reward/total",
        "Sum over the tokens of a response of the very tensor that GAE reads, before ppo.scale_rewards and KL.",
        "reward",
        "responses",
        "rises; then flat",
    ),
    Metric(
        "reward/<component>/raw",
        "Sum over the tokens of a response of what `<component>` returned, before normalisation, clip and weight.",
        OWN_UNIT,
        "responses to which it applies",
        "rises, or holds while another rises",
    ),
    Metric(
        "reward/<component>/normalized",
        "The same after normalisation and clip, before the weight.",
        "1, or the component's own where nothing normalises",
        "responses to which it applies",
        "of the same size as those of the other components",
    ),
    Metric(
        "reward/<component>/weight",
        "The weight of this step: fixed, of a schedule, or the multiplier of `at_least`.",
        "1",
        "none",
        "of a multiplier: settles; without end upwards, the constraint cannot be met",
    ),
    Metric(
        "reward/<component>/variance_share",
        "cov(what `<component>` adds, reward/total) / var(reward/total) over the responses; these sum up to 1.",
        SHARE,
        "responses of all ranks",
        "none is nearly 1: that component alone decides what is learnt",
    ),
    Metric(
        "reward/<component>/length_corr",
        "Pearson correlation of what `<component>` adds to a response with the number of its tokens.",
        "1",
        "responses of all ranks",
        "near 0; near 1 or -1 it pays for length",
    ),
    Metric(
        "reward/<component>/explained_variance",
        "value/explained_variance of the value head of `<component>`, with model.value_heads: components.",
        "1",
        "tokens (both variances)",
        "rises from 0 towards 1; near 0, its rewards cannot be foreseen or its head gets too little of vf_coef",
    ),
    Metric(
        "reward/<component>/weighted",
        "What `<component>` adds to reward/total: after normalisation, clip and weight. These sum up to reward/total.",
        "reward",
        "responses",
        "no single one is nearly all of reward/total",
    ),
)
_RESPONSE = (
    Metric(
        "response/length_mean",
        "Tokens that the policy produced, the end-of-sequence token included.",
        "tokens",
        "responses",
        "steady; growth together with reward is paid length, shrinking to nothing is a hack",
    ),
    Metric(
        "response/turns_mean",
        "Turns of the policy, parted by what `rollout.environment` wrote; 1 without one.",
        "turns",
        "responses",
        "what the task takes; 1 where there is a tool means that it is not called",
    ),
    Metric(
        "response/truncated_frac",
        "Responses cut at max_new_tokens instead of ending by themselves.",
        SHARE,
        "responses",
        "below 5 %; above it raise max_new_tokens or fine being cut",
    ),
)

SECTIONS: dict[str, tuple[Metric, ...]] = {
    "Is it learning?": (
        *_REWARD,
        replace(
            _REWARD[0],
            name="eval/reward/total",
            meaning="Held-out prompts. Raw values times configured weights, no normalisers: one yardstick for a run.",
        ),
        *(
            replace(row, name=f"eval/{row.name}", meaning=f"Held-out prompts. {row.meaning}")
            for row in (_REWARD[1], *_RESPONSE)
        ),
        Metric(
            "eval/<component>",
            "Held-out prompts. A component of weight 0, which no reward sees: a plain metric such as eval/slot_error.",
            OWN_UNIT,
            "responses to which it applies",
            "improves with reward/total; if it does not, the reward is being gamed",
        ),
    ),
    "Is it stable?": (
        Metric(
            "objective/kl",
            "KL of the policy to the reference, summed over the tokens of a response: k1 under old_logprobs.",
            "nats",
            "responses",
            "0 at step 1; rises slowly, or stays near target_kl; a leap together with reward is a hack",
        ),
        Metric(
            "objective/entropy",
            "Entropy of the distribution that tokens are sampled from (after temperature). With rollout.emit_values an"
            " estimate: the mean of -log p over the tokens drawn.",
            "nats",
            "tokens",
            "falls slowly; near 0 the policy has collapsed, a rise means it is falling apart",
        ),
        Metric(
            "objective/kl_explained_variance",
            "value/explained_variance of the value head of the KL penalty, with model.value_heads: components.",
            "1",
            "tokens (both variances)",
            "rises from 0 towards 1 once there is a KL to foresee",
        ),
        Metric(
            "objective/kl_coef",
            "Coefficient of the KL penalty that this step used.",
            "reward per nat",
            "none: one value per step",
            "constant, or moving by less than 20 % per step",
        ),
        Metric(
            "loss/policy",
            "Clipped surrogate of PPO.",
            "1",
            "tokens of all optimizer steps",
            "near 0 and noisy: it says little, look at reward/total",
        ),
        Metric(
            "loss/value",
            "Half the (clipped) squared error of the value head; in units of value/scale with ppo.scale_values.",
            "reward squared",
            "tokens of all optimizer steps",
            "falls, then follows the reward",
        ),
        Metric(
            "loss/kl",
            "KL of the policy to the reference in the loss (ppo.kl_loss_coef), before its weight.",
            "nats",
            "tokens of all optimizer steps",
            "rises slowly, then holds; the smaller, the larger its weight",
        ),
        Metric(
            "loss/entropy",
            "Entropy of the policy being updated, before its weight (ppo.entropy_coef).",
            "nats",
            "tokens of all optimizer steps",
            "as objective/entropy",
        ),
        Metric(
            "loss/ptx",
            "Language-modelling loss on data.ptx_path (ppo.ptx_coef), before its weight.",
            "nats",
            "tokens of those texts",
            "flat; growth means that the policy forgets",
        ),
        Metric(
            "credit/reward_scale",
            "What ppo.scale_rewards divided the rewards of tokens by: their deviation over the batch.",
            "reward",
            "none: one value per step",
            "steady; where it shrinks, what is left to learn is magnified",
        ),
        Metric(
            "credit/advantage_mean",
            "Mean of the advantages before they were whitened: what the critic did not expect.",
            "reward",
            "tokens",
            "near 0, either sign",
        ),
        Metric(
            "credit/advantage_std",
            "Deviation of the advantages before they were whitened: what whitening divided by.",
            "reward",
            "none: one value per step",
            "above 0; near 0 there is nothing to learn, and whitening magnifies noise",
        ),
        Metric(
            "credit/lone_frac",
            "Responses without another of the same prompt to compare with (ppo.estimator rloo, grpo): advantage 0.",
            SHARE,
            "responses of all ranks",
            "0; above it rewards fail and samples are dropped, see faults/samples_dropped",
        ),
        Metric(
            "ppo/epochs",
            "Passes over the batch that were made.",
            "passes",
            "none: one value per step",
            "ppo_epochs; less where ppo.stop_kl ended them: lower the learning rate if it does so always",
        ),
        Metric(
            "ppo/importance_mean",
            "exp(old_logprobs - rollout_logprobs), at most ppo.importance_cap: the token's weight in the loss.",
            "1",
            "tokens of all optimizer steps",
            "0.99 to 1.01; far from it workers and learner do not run the same model",
        ),
        Metric(
            "ppo/importance_capped_frac",
            "Tokens whose weight is held at ppo.importance_cap.",
            SHARE,
            "tokens of all optimizer steps",
            "near 0",
        ),
        Metric(
            "ppo/approx_kl",
            "KL of the policy before the update to the one being updated: mean of old_logprobs - logprobs.",
            "nats",
            "tokens of all optimizer steps",
            "0 in the first mini-batch; below 0.05; above it lower the learning rate or ppo_epochs",
        ),
        Metric(
            "ppo/pg_clipfrac",
            "Tokens whose clipped surrogate is the one that counts.",
            SHARE,
            "tokens of all optimizer steps",
            "1 to 20 %; 0 means steps are too small, above 30 % too large",
        ),
        Metric(
            "ppo/first_ratio_error",
            "Largest distance of a ratio from 1 in the first mini-batch, where ratios are against the policy before."
            " With rollout.emit_values the old log-probs are the workers'.",
            "1",
            "none: a maximum over tokens",
            "below 1e-4 in fp32; larger means that old and new log-probs are not computed alike",
        ),
        Metric(
            "ppo/vf_clipfrac",
            "Tokens whose value moved further than cliprange_value.",
            SHARE,
            "tokens of all optimizer steps",
            "below 20 %; above it cliprange_value is too narrow for the size of the returns",
        ),
        Metric(
            "ppo/ratio_mean",
            "exp(logprobs - old_logprobs).",
            "1",
            "tokens of all optimizer steps",
            "exactly 1 in the first mini-batch; 0.95 to 1.05",
        ),
        Metric(
            "value/diff_mean",
            "With rollout.emit_values: distance between the workers' values and the learner's in the first mini-batch"
            " of the step, as a share of the root mean square of the learner's.",
            "1",
            "states",
            "below 1e-3 in fp32, 0.05 in bf16; larger means that the workers' value head is an old one",
        ),
        Metric(
            "value/diff_max",
            "The largest of the distances of value/diff_mean.",
            "1",
            "none: a maximum over states",
            "below 1e-2 in fp32, 0.5 in bf16",
        ),
        Metric(
            "value/explained_variance",
            "1 - Var(returns - values) / Var(returns), values from before the update.",
            "1",
            "tokens (both variances)",
            "rises from 0 towards 1; below 0 the critic is worse than a constant",
        ),
        Metric(
            "value/scale",
            "What ppo.scale_values divides returns by: their root mean square so far.",
            "reward",
            "none: one value per step",
            "settles; the critic lags where it still moves by more than a few per cent a step",
        ),
        Metric(
            "optim/lr", "Learning rate of the last optimizer step.", "1", "none: one value per step", "as configured"
        ),
        Metric(
            "optim/grad_norm",
            "Euclidean norm of the whole gradient before it is clipped.",
            "1",
            "optimizer steps",
            "steady; growth over many steps comes before a collapse",
        ),
    ),
    "Is it cheating?": _RESPONSE,
    "Is there something to learn from?": (
        Metric(
            "data/epochs",
            "Prompts that were trained on since the run began, for each row of the data.",
            "1",
            "rows to train on",
            "below 10; beyond that look whether eval/reward/total still follows reward/total",
        ),
        Metric(
            "response/reward_std",
            "Standard deviation of reward/total between the responses of the step.",
            "reward",
            "responses of all ranks",
            "above 0; at 0 no response is better than another and nothing is learnt",
        ),
        Metric(
            "data/no_signal_frac",
            "Prompts whose samples all got one and the same total reward. Logged with several samples a prompt.",
            SHARE,
            "prompts of all ranks with at least two samples",
            "below 50 %; above it the prompts are too easy or too hard: see data.skip_solved",
        ),
        Metric(
            "data/rows_left_out",
            "Rows that data.skip_solved leaves out of the epochs to come. Logged with it.",
            "rows",
            "none: one value per step",
            "rises slowly; near all rows the data is used up",
        ),
    ),
    "Is it fresh?": (
        Metric(
            "staleness/mean",
            "Weight versions between the policy that wrote a token and the one that learns from it.",
            "versions",
            "tokens",
            "0 in the synchronous loop, at most the configured bound in the asynchronous one",
        ),
        Metric(
            "logprob_diff/mean",
            "Distance between rollout_logprobs and old_logprobs, both under the same weights: tokens of an older policy"
            " are left out, and steps that have no others. With rollout.emit_values of the first mini-batch.",
            "nats",
            "tokens",
            "below 1e-5 in fp32; larger means that workers and learner do not run the same model",
        ),
        Metric(
            "logprob_diff/max",
            "The largest distance between rollout_logprobs and old_logprobs of the step, or of its first mini-batch.",
            "nats",
            "none: a maximum over tokens",
            "below 1e-3 in fp32",
        ),
        Metric(
            "partial/waiting",
            "Responses under way after the step: not over, or over and in no batch yet. With rollout.round_tokens.",
            "responses",
            "none: of all ranks",
            "rollout.extra_prompts times rollout.n_samples_per_prompt, until the last steps use it up",
        ),
        Metric(
            "partial/length_ratio",
            "Mean length of the responses of the step, by the mean length so far of these and of those still under way."
            " With rollout.round_tokens.",
            "1",
            "mean length so far of all responses that were not trained on before the step",
            "settles near 1; far below, short responses are trained on first",
        ),
        Metric(
            "partial/rounds",
            "Rounds that were written for the step. With rollout.round_tokens.",
            "rounds",
            "learner processes",
            "1; more where too few prompts were ready, which more of rollout.extra_prompts helps",
        ),
    ),
    "Is it fast?": (
        Metric(
            "time/<phase>",
            "Seconds that the learner spent in a phase of the step.",
            "s",
            "none: a sum over the step on rank 0",
            "rollout and update dominate",
        ),
        Metric(
            "perf/rollout_tokens_per_s",
            "Response tokens of the step, by the seconds in which they were written, waited for or not.",
            "tokens/s",
            "seconds of the rollouts of rank 0",
            "steady",
        ),
        Metric(
            "perf/learner_tokens_per_s",
            "Response tokens learned from (once per PPO epoch), by time/update.",
            "tokens/s",
            "seconds of time/update",
            "steady",
        ),
        Metric(
            "perf/samples_per_s",
            "Responses of the step, by time/total.",
            "responses/s",
            "seconds of time/total",
            "steady",
        ),
        Metric(
            "perf/scored_early_frac",
            "Responses that were scored before the last response of the step was written.",
            SHARE,
            "responses",
            "above 0 with more chunks than workers; else rewards wait for rollouts",
        ),
    ),
    "Is it healthy?": (
        Metric(
            "faults/<counter>",
            "What was lost, repeated or left out.",
            "events",
            RUN_COUNT,
            "0; a few in a long run are survivable and were each printed once",
        ),
    ),
}

# To trackers alone, every log.samples_every steps; over the batch of all ranks. name -> what is counted.
HISTOGRAMS: dict[str, str] = {
    "histogram/reward_total": "reward/total of each response.",
    "histogram/response_length": "Tokens that the policy produced, of each response.",
    "histogram/token_rewards": "Reward of each token: what GAE reads, before ppo.scale_rewards and KL.",
    "histogram/advantages": "Advantage of each token, as the policy loss reads it: after whitening.",
    "histogram/values": "Value of the state before each token, from before the update.",
    "histogram/ratio": "Ratio of each token in the last pass over the batch, when its turn came.",
}

METRICS: dict[str, Metric] = {row.name: row for rows in SECTIONS.values() for row in rows}

_CLOSED = {
    "<phase>": PHASES,
    "<counter>": COUNTERS,
}  # the component is the user's to name; phases and counters are ours


def charts(components: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Section -> row -> the names that it stands for in a run with these components: what belongs into one chart."""
    holes: dict[str, Iterable[str]] = {"<component>": list(components), **_CLOSED}

    def names(row: Metric) -> list[str]:
        hole = next((hole for hole in holes if hole in row.name), None)
        return [row.name.replace(hole, segment) for segment in holes[hole]] if hole else [row.name]

    return {title: {row.name: names(row) for row in rows} for title, rows in SECTIONS.items()}


_SHARES = re.compile(r".*_(error|frac|rate)")


def _fill(row: Metric, segment: str) -> Metric | None:
    """The row for one concrete component, phase or counter; None where the segment cannot stand there."""
    for placeholder, choices in _CLOSED.items():
        if placeholder in row.name:
            if segment not in choices:
                return None
            return replace(row, name=row.name.replace(placeholder, segment), meaning=choices[segment])
    if not segment or segment in RESERVED_COMPONENTS:
        return None
    unit = SHARE if row.unit == OWN_UNIT and _SHARES.fullmatch(segment) else row.unit
    name, meaning = (text.replace("<component>", segment) for text in (row.name, row.meaning))
    return replace(row, name=name, meaning=meaning, unit=unit)


def _candidates(name: str) -> list[Metric]:
    """Every row of the table with each placeholder replaced by what stands in its place in `name`, where it fits."""
    found = []
    given = name.split("/")
    for row in METRICS.values():
        if "<" not in row.name:
            found.append(row)
            continue
        at = next(i for i, part in enumerate(row.name.split("/")) if part.startswith("<"))
        segments = next((list(names) for hole, names in _CLOSED.items() if hole in row.name), given[at : at + 1])
        found.extend(filled for segment in segments if (filled := _fill(row, segment)) is not None)
    return found


def _alike(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


@lru_cache(maxsize=4096)
def lookup(name: str) -> Metric:
    """The row for a concrete name, placeholders filled in: `lookup("eval/slot_error").unit` is "share".

    A component whose name ends in `_error`, `_frac` or `_rate` is taken for a share of 1.

    Raises:
        KeyError: the name is not in the table; the message says the nearest one.
    """
    rows = {row.name: row for row in _candidates(name)}
    if name in rows:
        return rows[name]
    nearest = max(rows, key=lambda row: _alike(row, name) + _alike(row.split("/")[0], name.split("/")[0]))
    raise KeyError(f"metric {name!r} is not in the table of core/metrics.py; the nearest is {nearest!r}")


def markdown() -> str:
    """docs/metrics.md, whole."""
    lines = [
        "# Metrics",
        "",
        "Generated from `core/metrics.py` by `python -m core.metrics > docs/metrics.md`: change it there.",
        "",
        "Every step appends one JSON object with these keys, `step` (from 1) and `timestamp` (seconds since the epoch)",
        "to `metrics.jsonl` in the run folder; trackers get the same names. A mean is a sum over all ranks, divided",
        "once by the number of things in the column *divided by*. `null` means that there was nothing to divide by, or",
        "that the number was not finite. Shares are fractions of 1 in the file and per cent on the screen; a component",
        "whose name ends in `_error`, `_frac` or `_rate` is taken for a share.",
        "",
        "Of two identical runs only `timestamp` and the keys under `time/`, `perf/` and `faults/` may differ. No name",
        f"is a prefix of another, so a component may not be called {_listing(sorted(RESERVED_COMPONENTS))}.",
    ]
    for title, rows in SECTIONS.items():
        lines += ["", f"## {title}", "", "| name | meaning | unit | divided by | healthy |", "|---|---|---|---|---|"]
        lines += [f"| `{r.name}` | {r.meaning} | {r.unit} | {r.denominator} | {r.healthy} |" for r in rows]
        for placeholder, choices in _CLOSED.items():
            if any(placeholder in row.name for row in rows):
                lines += ["", f"| `{placeholder}` | meaning |", "|---|---|"]
                lines += [f"| `{name}` | {meaning} |" for name, meaning in choices.items()]
    lines += ["", "## Look at it", ""]
    lines += [
        "Trackers also get histograms, over the batch of all ranks, and a few responses ([trackers.md](trackers.md))."
    ]
    lines += ["", "| name | counts |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in HISTOGRAMS.items())]
    return "\n".join(lines) + "\n"


def _listing(names: list[str]) -> str:
    *head, last = (f"`{name}`" for name in names)
    return f"{', '.join(head)} or {last}"


class Sums:
    """Sums and counts by metric name: they travel between processes, and the division happens once, in `means`.

        sums = Sums()
        sums.add("reward/total", total=31.5, count=16)      # 16 responses here
        sums = sums.merge(all_reduce)                       # and those of the other ranks
        sums.means()                                        # {"reward/total": 1.97}

    Every rank adds the same names, one without samples with total 0 and count 0.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}  # name -> [total, count]

    def add(self, name: str, total: float, count: float) -> None:
        """Adds to the sum and to the denominator of `name`. KeyError if the name is not in the table."""
        lookup(name)
        assert count >= 0, f"{name}: a denominator of {count}"
        pair = self._sums.setdefault(name, [0.0, 0.0])
        pair[0] += float(total)
        pair[1] += float(count)

    def merge(self, all_reduce: AllReduce) -> "Sums":
        """The sums over all ranks, on every rank. Waits for every rank to call it: two collectives.

        Raises:
            InvariantFault: the ranks hold different names, whose sums would be added to each other.
        """
        names = sorted(self._sums)
        # 20 bits keep the squares exact in float64 up to 8192 ranks. By Cauchy-Schwarz ranks * sum d^2 = (sum d)^2 only
        # where all d are equal. This goes first: vectors of different lengths would hang or corrupt the second one.
        digest = int.from_bytes(hashlib.blake2b("\n".join(names).encode(), digest_size=4).digest(), "big") >> 12
        ranks, total, squares = (int(x) for x in all_reduce([1.0, float(digest), float(digest**2)]))
        if ranks * squares != total**2:
            raise InvariantFault(f"learner ranks hold sums of different metrics; this one has {', '.join(names)}")
        merged = Sums()
        flat = all_reduce([x for name in names for x in self._sums[name]])
        merged._sums = {name: [flat[2 * i], flat[2 * i + 1]] for i, name in enumerate(names)}
        return merged

    def means(self) -> dict[str, float]:
        """name -> total / count; NaN, which is logged as null, where the count is 0: no mean was ever 0 by absence."""
        return {name: total / count if count else float("nan") for name, (total, count) in self._sums.items()}


if __name__ == "__main__":
    print(markdown(), end="")
