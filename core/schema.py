"""The schema of the configuration: every key, its type, its range and what it means. No torch here."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from core.metrics import RESERVED_COMPONENTS

KL_HEAD = "ppo/kl"  # the value head of the KL penalty; no component can be called so
DATA_FILES = (".jsonl", ".json", ".parquet")


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
    value: Literal["shared", "shared_detached", "lora", "separate"] = "shared"
    """Where the value function lives: a head on the policy's trunk; the same without its gradient in the trunk; an
    adapter of its own on a frozen trunk (with `lora_rank`); a trunk of its own, at first a copy of the policy's."""
    value_heads: Literal["one", "components"] = "one"
    """components: a value head for each reward component and one for the KL penalty, which learn the returns of their
    own, without the weight. Their weighted sum is the baseline, so a weight may move and no value is wrong."""
    value_path: str | None = None
    """Of `value: separate`: a model to start from, e.g. a reward model, whose score head becomes the value head (where
    there is one head)."""
    reference: Literal["auto", "copy", "adapter", "offload", "reward_server"] = "auto"
    """Where reference log-probs come from: a frozen copy; the policy without its adapter (auto with `lora_rank`); a
    copy that waits in host memory between its uses; or the reward servers, which compute them beside the rewards."""
    lora_rank: int = Field(0, ge=0, le=4096)
    """Train low-rank adapters of this rank (needs peft) on a frozen model; 0 trains the whole model."""
    lora_alpha: float | None = Field(None, gt=0)
    """The adapter counts alpha / rank times; null is the rank, which makes that 1."""
    lora_targets: list[str] = Field(default_factory=list)
    """Names of the layers that get adapters, e.g. [q_proj, v_proj]; none named: all linear ones but the output."""
    compile: bool = False
    """torch.compile the norms and MLPs of the learner's layers: a minute at the start, fewer kernels on a GPU after."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""


class DataConfig(Section):
    path: str | None = Field(None, min_length=1)
    """Prompts: a JSONL or Parquet file, or a dataset id. Every column but the prompt reaches the rewards. This or
    `data.mixture` is required."""
    mixture: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Several of those instead of `data.path`, each with its share of the prompts of every step, e.g.
    {math.jsonl: 3, chat.jsonl: 1}. A column `dataset` with its name reaches the rewards."""
    split: str = "train"
    """Split of a dataset id; a file is one split."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or a list of messages (the tokenizer's chat template is applied)."""
    eval_path: str | None = None
    """Held-out prompts in the same form; no evaluation without it or `data.eval_frac`."""
    eval_split: str = "test"
    """Split of `data.eval_path` where that is a dataset id."""
    eval_prompts: int = Field(500, ge=1)
    """How many held-out prompts an evaluation answers, one sample each: the first ones of the file."""
    ptx_path: str | None = None
    """Texts for the language-modelling loss of `ppo.ptx_coef`: a JSONL or Parquet file, or a dataset id."""
    eval_frac: float = Field(0.0, ge=0, lt=1)
    """Without `data.eval_path`: hold out this share of the training prompts. A digest of the prompt decides, so that
    equal prompts lie on one side, and stay there when rows are added."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longest prompt in tokens; a longer one is an error that names its row."""
    shuffle: bool = True
    """A new order in each epoch, a function of `run.seed` and the epoch."""
    balance_column: str | None = None
    """Draw the values of this column more evenly than they are frequent; rows without one are a value of their own."""
    balance: float = Field(1.0, ge=0, le=1)
    """How evenly: a value with n rows is drawn in proportion to n^(1 - balance): 1 all equally often, 0 as they are."""
    difficulty_column: str | None = None
    """A column of numbers, low for easy: the first epochs go from easy to hard."""
    measure_difficulty: bool = False
    """From the second epoch on, go from easy to hard by what the policy found: how much less total reward a prompt had
    at its last visit than the other prompts of that step. `difficulty_column` orders the first epoch, or nothing."""
    curriculum_epochs: int = Field(1, ge=1)
    """How many epochs the column, or the measure, orders: the first of them strictly, each later one more loosely."""
    skip_solved: int | None = Field(None, ge=1)
    """Leave a prompt out of later epochs once all its samples got one and the same total reward in so many visits in
    a row: solved or hopeless, it teaches nothing. null: never. Wants `rollout.n_samples_per_prompt` > 1."""
    augment: str | None = Field(None, min_length=1)
    """`file.py:function` or `package.module:function`: called with (row, rng) for each training prompt that is drawn,
    gives the row to use. `rng` is numpy's, seeded by `run.seed` and the number of the prompt."""

    @property
    def sources(self) -> dict[str, float]:
        """Path or id of each dataset to train on -> its weight."""
        return {self.path: 1.0} if self.path is not None else self.mixture

    @property
    def source_names(self) -> dict[str, str]:
        """Path or id of each dataset to train on -> its short name: that of the file, where no other has it."""
        short = {path: Path(path).stem if path.endswith(DATA_FILES) else path for path in self.sources}
        names = list(short.values())
        return {path: name if names.count(name) == 1 else path for path, name in short.items()}

    @property
    def key(self) -> str:
        """The key that names the training prompts, for messages."""
        return "data.path" if self.path is not None else "data.mixture"

    @property
    def label(self) -> str:
        """The training prompts in a few words."""
        return " + ".join(self.sources)

    @property
    def has_held_out(self) -> bool:
        return self.eval_path is not None or self.eval_frac > 0

    @model_validator(mode="after")
    def _fits(self) -> "DataConfig":
        def refuse(leaf: str, value: object, remedy: str) -> None:
            raise PydanticCustomError("within", "{remedy}", {"leaf": leaf, "value": value, "remedy": remedy})

        if self.path is None and not self.mixture:
            refuse("path", "null", "is required, or data.mixture; set one in the config file or with --data.path VALUE")
        if self.path is not None and self.mixture:
            refuse("mixture", dict(self.mixture), f"data.path = {self.path} is given too; take one of the two away")
        if self.eval_path is not None and self.eval_frac:
            refuse("eval_frac", self.eval_frac, f"data.eval_path = {self.eval_path} is given too; take one of the two")
        if self.balance_column is None and self.balance != 1:
            refuse("balance", self.balance, "does nothing without data.balance_column; name the column to balance")
        curriculum = self.difficulty_column is not None or self.measure_difficulty
        if not curriculum and self.curriculum_epochs != 1:
            remedy = "does nothing without data.difficulty_column or data.measure_difficulty; set one"
            refuse("curriculum_epochs", self.curriculum_epochs, remedy)
        if curriculum and not self.shuffle:
            key = "data.measure_difficulty" if self.difficulty_column is None else "data.difficulty_column"
            refuse("shuffle", "false", f"{key} sets an order too; take one of the two away")
        return self


class RolloutConfig(Section):
    engine: Literal["transformers", "vllm"] = "transformers"
    """Who writes: the embedded engine on transformers, whose ids are the same for any number of workers; or vLLM, for
    big models (`docs/rollout.md`)."""
    python: str | None = Field(None, min_length=1)
    """The interpreter of the rollout workers, on every machine of theirs, where their engine wants other packages than
    the learner; null is the learner's own. `bash launch/vllm_venv.sh` makes one with vLLM for a CPU."""
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
    top_k: int | None = None
    """Draw each token from the so many most probable ones, at least 2 (and those that equal the last of them); null:
    from all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Of those, from the fewest whose probabilities reach this. 1: from all. What the filters keep goes with the
    response: the log-probs of policy and reference, entropies and losses are over the same tokens."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Of those, from the ones at least this fraction as probable as the most probable one. 0: from all."""
    stop_strings: list[str] = []
    """A response also ends with the token that completes one of these in its text; the token stays in the response."""
    chunk_size: int = Field(32, ge=1)
    """Responses written together by one worker. Chunks are cut by prompt number, never by worker."""
    stream_size: int | None = Field(None, ge=1)
    """Responses that a worker hands to the rewards as soon as so many of its chunk are over, with all samples of their
    prompts in it, while it writes the others. null: the whole chunk at once."""
    max_staleness: int = Field(0, ge=0)
    """Batches that are written ahead while the learner works: that of step s comes of the policy after step
    s - 1 - max_staleness at the oldest, and PPO's ratio is against that policy. 0: strictly on-policy. With
    1 or more set ppo.stop_kl and halve rollout.batch_size: what one update did is not seen by the next batches."""
    round_tokens: int | None = Field(None, ge=1)
    """Most tokens that a response gets in one round, under one version of the weights. What is not over by then waits
    and goes on in a later round, under newer weights if a step came between; the first prompts whose samples are all
    over make the batch, and PPO's ratio is against the policies that wrote. null: responses are written whole."""
    extra_prompts: int = Field(0, ge=0)
    """Of `round_tokens`: prompts under way besides those of a step, at most as many. Those that are over first are
    trained on first, the others later; none is thrown away."""
    slots: int = Field(64, ge=1)
    """Most responses that a worker writes side by side. No id depends on it; memory for keys and values does."""
    emit_values: bool = False
    """Workers say the value of each state with its token, by a copy of the value head. The learner then takes their
    values and log-probs and leaves its own forward before the update out; the first mini-batch shows whether they agree
    (docs/rollout.md)."""
    environment: str | None = Field(None, min_length=1)
    """`file.py:Class` or `package.module:Class`: what answers the policy between its turns, a tool or a user. Its
    `step` gets what the response holds so far, and gives the text to go on after, or None when the response is over."""
    environment_options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class."""
    environment_timeout_s: float = Field(30, gt=0)
    """Deadline of one call of `step`; a call that misses it ends the run."""
    max_turns: int = Field(8, ge=1)
    """Most turns that the policy takes in a response, where there is an environment; it is not asked after the last."""
    timeout_s: float = Field(600, gt=0)
    """Deadline of one chunk, of a worker's start, and of its replacement."""
    max_worker_losses: int = Field(8, ge=0)
    """Workers of one learner process that may die or hang during the run before it stops; a lost node loses all of
    its own."""
    placement: Literal["colocated", "apart"] = "colocated"
    """Where workers sit. On GPUs: on those of learners, worker i beside learner i mod N, or on others. On CPUs, in a
    cluster that the run joins: on all of its nodes, or on those without a learner (docs/placement.md)."""
    gpus_per_worker: float | None = Field(None, ge=0.01, le=1)
    """Share of a GPU that Ray reserves for each worker; null: for the embedded engine an equal share of the GPU that it
    sits on, for vLLM `tensor_parallel_size`. A share is a count: nothing keeps a worker from using more memory."""
    tensor_parallel_size: int = Field(1, ge=1, le=64)
    """Of vLLM: how many GPUs hold the model of one worker together and are reserved for it; on a CPU, processes."""
    gpu_memory: float | None = Field(None, gt=0, le=1)
    """Of vLLM: share of each of its GPUs for weights, keys and values; null is vLLM's default, which leaves a learner
    on the same GPU no room. On a CPU VLLM_CPU_KVCACHE_SPACE in the environment says it, in GiB; 1 if unset."""
    sleep: bool = False
    """Of vLLM on a GPU: once all chunks of a step are written, free keys, values and weights (these go to the host)
    until the next sync, for a learner on the same GPU."""
    prefix_cache: bool = True
    """Of vLLM: keep keys and values of prompts for other responses that begin alike; dropped at each weight sync."""

    @property
    def in_rounds(self) -> bool:
        """Whether responses may be left and gone on with under newer weights."""
        return self.round_tokens is not None

    @property
    def off_policy(self) -> bool:
        """Whether tokens may be of older weights than those that learn from them."""
        return self.max_staleness > 0 or self.in_rounds

    @property
    def filters(self) -> dict[str, float]:
        """Those of top_k, top_p and min_p that leave tokens out."""
        off = {"top_k": None, "top_p": 1.0, "min_p": 0.0}
        return {leaf: getattr(self, leaf) for leaf, value in off.items() if getattr(self, leaf) != value}

    @property
    def untold_filter(self) -> tuple[str, float, str] | None:
        """Key, value and remedy, for an engine that does not say which tokens it kept; None where no filter is on."""
        remedy = (
            "this rollout engine does not say which tokens it kept, so the log-probs that are trained would be those of"
            " another distribution than was sampled from; leave the filter out, or take the transformers engine"
        )
        return next(((f"rollout.{leaf}", value, remedy) for leaf, value in self.filters.items()), None)

    @model_validator(mode="after")
    def _fits(self) -> "RolloutConfig":
        def refuse(leaf: str, value: object, remedy: str) -> None:
            raise PydanticCustomError("within", "{remedy}", {"leaf": leaf, "value": value, "remedy": remedy})

        if self.top_k is not None and self.top_k < 2:
            refuse("top_k", self.top_k, "is at least 2: of a token without a choice nothing is learnt; null is off")
        if any(not text or "\N{REPLACEMENT CHARACTER}" in text for text in self.stop_strings):
            remedy = "each is at least a character, and none is U+FFFD, which stands for broken ones"
            refuse("stop_strings", self.stop_strings, remedy)
        if self.gpus_per_worker is not None and self.tensor_parallel_size > 1:
            remedy = f"a model on {self.tensor_parallel_size} GPUs (rollout.tensor_parallel_size) has them whole"
            refuse("gpus_per_worker", self.gpus_per_worker, f"{remedy}; leave it out")
        given = {"environment_options", "environment_timeout_s", "max_turns"} & self.model_fields_set
        for leaf in sorted(given) if self.environment is None else ():
            if getattr(self, leaf) != type(self).model_fields[leaf].get_default(call_default_factory=True):
                refuse(leaf, getattr(self, leaf), "does nothing without rollout.environment; name the class")
        if self.environment is not None and self.environment_timeout_s >= self.timeout_s:
            remedy = f"must be less than rollout.timeout_s = {self.timeout_s:g}, the deadline of a whole chunk"
            refuse("environment_timeout_s", self.environment_timeout_s, remedy)
        if self.stream_size is not None and self.stream_size >= self.chunk_size:
            remedy = f"does nothing: a worker has rollout.chunk_size = {self.chunk_size} at a time"
            refuse("stream_size", self.stream_size, f"{remedy}; give less, or leave it out")
        if self.emit_values:
            others = ("max_staleness", self.max_staleness, "learns from what older weights wrote")
            others = (others, ("round_tokens", self.round_tokens, "goes on with what older weights began"))
            others = (*others, ("environment", self.environment, "puts tokens between those of the policy"))
            for leaf, value, why in others:
                if value:
                    remedy = f"rollout.{leaf} = {value} {why}, of which only the learner has values"
                    refuse("emit_values", "true", f"{remedy}; take one of the two away")
        if self.in_rounds:
            if self.round_tokens >= self.max_new_tokens:
                remedy = f"does nothing: no response is longer than rollout.max_new_tokens = {self.max_new_tokens}"
                refuse("round_tokens", self.round_tokens, f"{remedy}; give less, or leave it out")
            if self.environment is not None:
                remedy = "what an environment holds of a response does not outlive a round (rollout.environment)"
                refuse("round_tokens", self.round_tokens, f"{remedy}; take one of the two away")
            if self.stream_size is not None:
                remedy = "does nothing with rollout.round_tokens: what is over is handed on at the end of a round"
                refuse("stream_size", self.stream_size, f"{remedy}; take one of the two away")
        elif self.extra_prompts:
            refuse("extra_prompts", self.extra_prompts, "does nothing without rollout.round_tokens; set that too")
        return self


class RewardConfig(Section):
    fn: str = Field(min_length=1)
    """`file.py:function` or `package.module:function`; a class is instantiated with `options`. Behind `verl:` or
    `openrlhf:` a function written for those; or the URL of a reward server. Required."""
    weight: float | dict[int, float] = 1.0
    """Factor in the sum of components, or a schedule {step: factor}, straight between its steps, e.g. {0: 1, 200: 0.1}.
    With 0 the component is only a metric, logged but never paid."""
    at_least: float | None = None
    """Hold the mean of reward/NAME/raw at this or above: `weight` is then where a Lagrange multiplier begins, which
    rises while the mean is below and falls, not under 0, while it is above."""
    multiplier_lr: float = Field(0.05, gt=0)
    """How far the multiplier of `at_least` moves in a step for each unit that the mean is off."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function or class."""
    spans: Literal["spread", "last"] = "spread"
    """The score of a span goes evenly to its tokens, or whole to the last of them."""
    observations: Literal["refuse", "drop"] = "refuse"
    """A score on nothing but what an environment wrote is an error, or is dropped: for components that read the whole
    response and do not know who wrote what."""
    normalize: Literal["none", "running", "batch"] = "none"
    """Divide by the standard deviation of all batches so far, or of this batch. The mean is never shifted."""
    clip: float | None = Field(None, gt=0)
    """Bound of the absolute (normalised) value of one token."""

    @property
    def paid(self) -> bool:
        """Whether it is ever part of the reward, or only a metric."""
        return self.at_least is not None or any(self._schedule.values())

    @property
    def last_weight(self) -> float:
        """The weight that a schedule ends with: one yardstick for the evaluations of a whole run."""
        return self._schedule[max(self._schedule)]

    def weight_at(self, step: int) -> float:
        """The weight in `step` (from 1); of a constraint, where its multiplier begins."""
        points = sorted(self._schedule.items())
        for (a, at_a), (b, at_b) in zip(points, points[1:], strict=False):
            if a <= step < b:
                return at_a + (at_b - at_a) * (step - a) / (b - a)
        return points[0][1] if step < points[0][0] else points[-1][1]

    @property
    def _schedule(self) -> dict[int, float]:
        return self.weight if isinstance(self.weight, dict) else {0: self.weight}

    @model_validator(mode="after")
    def _fits(self) -> "RewardConfig":
        def refuse(leaf: str, value: object, remedy: str) -> None:
            raise PydanticCustomError("within", "{remedy}", {"leaf": leaf, "value": value, "remedy": remedy})

        if isinstance(self.weight, dict) and (not self.weight or min(self.weight) < 0):
            refuse("weight", self.weight, "a schedule has at least one step, none below 0, e.g. {0: 1.0, 200: 0.1}")
        if self.at_least is not None and (isinstance(self.weight, dict) or self.weight < 0):
            refuse("weight", self.weight, "at_least wants one number, at least 0, from which its multiplier begins")
        return self


class PPOConfig(Section):
    estimator: Literal["gae", "reinforce_pp", "rloo", "grpo"] = "gae"
    """How advantages come from rewards: gae with the critic; without one reinforce_pp (returns-to-go), or rloo and
    grpo, which compare the samples of a prompt. Without a critic there is no value loss: `vf_coef` has no effect."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation."""
    lambda_alpha: float | None = Field(None, gt=0)
    """The policy's lambda is 1 - 1 / (lambda_alpha x tokens of the response) instead (VAPO has 0.05); off if null."""
    value_gamma: float | None = Field(None, ge=0, le=1)
    """Discount in the returns that the critic learns; as `gamma` if null."""
    value_lambda: float | None = Field(None, ge=0, le=1)
    """Lambda in the returns that the critic learns; as `gae_lambda` if null."""
    scale_rewards: Literal["none", "batch"] = "none"
    """Divide the rewards of tokens, before KL, by their deviation over the batch. The mean is never shifted."""
    scale_values: Literal["none", "running"] = "none"
    """running: the critic predicts returns divided by their root mean square so far, so that large rewards do not reach
    the policy through a shared trunk. `cliprange_value` and loss/value are then in those units."""
    cliprange: float = Field(0.2, gt=0, lt=1)
    """The probability ratio is clipped at 1 - cliprange (and 1 + cliprange unless `cliprange_high`)."""
    cliprange_high: float | None = Field(None, gt=0)
    """Upper clip of the ratio where it differs."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound of the loss of tokens with negative advantage, in units of |A|; off by default."""
    importance_cap: float | None = Field(None, gt=0)
    """Weigh the policy loss of each token by exp(old_logprobs - rollout_logprobs), at most this (2 is usual): corrects
    for an engine that does not sample from quite what the learner computes. With `rollout.max_staleness` or
    `rollout.round_tokens` it corrects for the older policy, and the ratio is against the policy before the step
    (decoupled PPO). Off if null."""
    cliprange_value: float = Field(0.2, gt=0)
    """A value may move this far from the old one before its loss is clipped."""
    vf_coef: float = Field(0.1, ge=0)
    """Weight of the value loss."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    ppo_epochs: int = Field(2, ge=1)
    """Passes over each batch."""
    stop_kl: float | None = Field(None, gt=0)
    """No further pass over a batch once the mean of ppo/approx_kl over the mini-batches of one is above this. Off if
    null."""
    mini_batch_size: int = Field(64, ge=1)
    """Responses per optimizer step, over all ranks; divides `rollout.batch_size`."""
    micro_batch_size: int = Field(8, ge=1)
    """Most responses per forward pass on one rank; no number depends on it but memory and time."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Most tokens per forward pass on one rank, prompts that are shared counted once; null: only `micro_batch_size`
    bounds it. A longer response goes alone."""
    value_warmup_steps: int = Field(0, ge=0)
    """First steps in which the value function alone is trained; a shared trunk stays as it is."""
    kl_coef: float = Field(0.02, ge=0)
    """Weight of the KL penalty against the reference in the reward of each token."""
    target_kl: float | None = Field(None, gt=0)
    """Steer `kl_coef` towards this KL in nats per response; fixed if null."""
    kl_horizon: int = Field(10_000, ge=1)
    """Responses over which the controller of `target_kl` works."""
    kl_loss_coef: float = Field(0.0, ge=0)
    """Weight of KL(policy || reference) in the loss, beside or instead of the one in the reward."""
    kl_loss: Literal["k2", "k3"] = "k3"
    """Which estimate of it loss/kl shows. The gradient is that of k2 for both: the one of k3 is biased."""
    ptx_coef: float = Field(0.0, ge=0)
    """Weight of a language-modelling loss on `data.ptx_path`, against forgetting (InstructGPT's PPO-ptx)."""
    whiten_advantages: bool | None = None
    """Mean 0, deviation 1 over the valid tokens of the whole batch; null: as the estimator is published, which is true
    for gae and reinforce_pp, false for rloo and grpo."""
    bootstrap_cut: bool = False
    """Continue a cut response with the value of its last state. False where the length limit belongs to the task."""

    @property
    def has_critic(self) -> bool:
        """Whether values are learnt and read."""
        return self.estimator == "gae"

    @property
    def compares_samples(self) -> bool:
        """Whether an advantage is relative to the other samples of the prompt."""
        return self.estimator in ("rloo", "grpo")

    @property
    def whitens(self) -> bool:
        return not self.compares_samples if self.whiten_advantages is None else self.whiten_advantages


class OptimConfig(Section):
    lr: float = Field(1e-6, ge=0)
    """Peak learning rate of AdamW."""
    value_lr: float | None = Field(None, ge=0)
    """The same for what the value loss alone trains: its head, and a trunk or adapter of its own; null: `optim.lr`."""
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
    transport: Literal["object_store", "collective", "cuda_ipc"] = "object_store"
    """How weights reach the workers: shared memory of each host, a broadcast (gloo on a CPU, NCCL on GPUs), or memory
    of the GPU that one learner shares with its workers."""
    bucket_mb: float = Field(64, gt=0)
    """Weights travel in buckets of about this size: one is on its way while the next is gathered."""
    timeout_s: float = Field(300, gt=0)
    """Deadline of each stage of a weight sync."""


class LogConfig(Section):
    trackers: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    """Besides metrics.jsonl, which is always written."""
    project: str = "tokenppo"
    """Project name in W&B, and TensorBoard's folder in the run folder."""
    ledger: float = Field(0.1, ge=0, le=1)
    """Share of the prompts whose responses are recorded token by token, every number of each (docs/ledger.md). 0: none;
    1: all, which replays want."""
    samples_every: int = Field(10, ge=0)
    """Steps between two looks at responses: trackers get a few of them, each token in the colour of its reward, and
    histograms (docs/trackers.md). 0: never."""
    samples: int = Field(4, ge=1, le=64)
    """How many responses a look has: the lowest reward, the highest, and those evenly between."""
    peer_names: Literal["none", "trl", "openrlhf", "verl"] = "none"
    """Trackers get what means the very same under the name of another trainer too, for dashboards that are there."""
    artifacts: list[Literal["record", "final", "best", "checkpoints"]] = ["record"]
    """What W&B keeps as files of a run besides its numbers: settings, metrics.jsonl, summary and report (record), the
    model, the best one, each checkpoint. Models are large and are uploaded whole."""

    @property
    def looks(self) -> bool:
        """Whether anybody is to look at responses."""
        return bool(self.samples_every and self.trackers)


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
    nodes: int = Field(1, ge=1)
    """Nodes that must have joined the Ray cluster at `ray_address` before a model is loaded."""
    join_timeout_s: float = Field(600, gt=0)
    """How long the run waits for them."""
    insecure: bool = False
    """Join or start a Ray that asks nobody for a token all the same, with RAY_AUTH_MODE=disabled in the environment.
    What is given up: whoever reaches its address runs code as you, and reads and changes all that this run does."""
    reward_timeout_s: float = Field(300, gt=0)
    """Deadline for the scores of one chunk."""
    reward_servers: int = Field(1, ge=1, le=256)
    """Reward servers (Ray actors) of each learner process; chunks go to them in turn."""
    reward_gpus: float = Field(0.0, ge=0)
    """Share of a GPU, or whole ones, that each reward server gets, for components that are models; 0 is the CPU."""
    reward_placement: Literal["colocated", "apart"] = "colocated"
    """Where reward servers with GPUs sit: each on that of its learner, or on others (docs/placement.md)."""
    reward_batch_size: int | None = Field(None, ge=1)
    """Most responses that a reward server scores together: waiting chunks of all workers are joined. null: each chunk
    by itself, so that a model gives the same bits whatever else is waiting."""
    collective_timeout_s: float = Field(1800, gt=0)
    """How long a learner process waits for the others wherever they meet."""

    @model_validator(mode="after")
    def _fits(self) -> "ResourcesConfig":
        def refuse(leaf: str, value: object, remedy: str) -> None:
            raise PydanticCustomError("within", "{remedy}", {"leaf": leaf, "value": value, "remedy": remedy})

        if self.reward_gpus and (self.reward_gpus < 0.01 or self.reward_gpus > 1 and self.reward_gpus % 1):
            refuse("reward_gpus", self.reward_gpus, "is 0, or a share of at least 0.01, or a number of whole GPUs")
        if self.nodes > 1 and self.ray_address is None:
            refuse(
                "nodes", self.nodes, "does nothing without resources.ray_address: a Ray of the run's own is one node"
            )
        if self.reward_placement == "apart" and not self.reward_gpus:
            refuse("reward_placement", "apart", "does nothing without resources.reward_gpus; set that, or leave it out")
        return self


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
    keep_checkpoints: int = Field(2, ge=2)
    """How many of the last checkpoints are kept; the one before the last is what is left where the last is damaged."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on in a folder that holds this very run. never: refuse a folder that holds one. must: refuse where
    there is no checkpoint to go on from."""
    best_metric: str = "reward/total"
    """Which mean of an evaluation decides what goes into `best/`, as summary.json names it; a `-` before it: lower is
    better."""
    patience: int | None = Field(None, ge=1)
    """Stop, as a normal end, after so many evaluations in a row that were not better than the best; null: never."""
    max_kl: float | None = Field(None, gt=0)
    """Stop, as a normal end, after a step whose `objective/kl` is above this; null: never."""
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
    def value_heads(self) -> list[str]:
        """Names of the value heads of `model.value_heads: components`; none where one head learns the whole."""
        if self.model.value_heads == "one":
            return []
        penalised = self.ppo.kl_coef > 0
        return [*(name for name, spec in self.rewards.items() if spec.paid), *[KL_HEAD] * penalised]

    @property
    def evaluation_means(self) -> list[str]:
        """What an evaluation gives, as summary.json names it (trainer/evaluate.py)."""
        of_components = [f"reward/{name}/raw" if spec.paid else name for name, spec in self.rewards.items()]
        return ["reward/total", *of_components, "response/length_mean", "response/truncated_frac"]

    @property
    def optimizer_steps(self) -> int:
        return self.run.steps * self.ppo.ppo_epochs * (self.rollout.batch_size // self.ppo.mini_batch_size)

    @property
    def reference(self) -> str:
        """`model.reference` with auto resolved."""
        chosen, lora = self.model.reference, bool(self.model.lora_rank)
        return chosen if chosen != "auto" else "adapter" if lora else "copy"

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
        if self.rollout.extra_prompts > self.prompts_per_step:
            remedy = f"is more than the {self.prompts_per_step} prompts of a step (rollout.batch_size /"
            refuse("rollout.extra_prompts", self.rollout.extra_prompts, f"{remedy} n_samples_per_prompt); give less")
        if self.sync.transport != "object_store" and self.rollout.max_staleness:
            remedy = "the learner would wait for workers that still write (rollout.max_staleness); take object_store"
            refuse("sync.transport", self.sync.transport, remedy)
        if self.sync.transport == "cuda_ipc" and self.rollout.placement == "apart":
            remedy = "reaches workers on the learner's GPU alone, and rollout.placement is apart; take collective"
            refuse("sync.transport", "cuda_ipc", remedy)
        if self.rollout.engine == "transformers":
            for leaf in ("tensor_parallel_size", "gpu_memory", "sleep", "prefix_cache"):
                value = getattr(self.rollout, leaf)
                if value != RolloutConfig.model_fields[leaf].default:
                    remedy = "does nothing without vLLM: set rollout.engine to vllm, or leave it out"
                    refuse(f"rollout.{leaf}", str(value).lower(), remedy)
        elif self.rollout.temperature < 0.01:
            remedy = "vLLM would take 0.01 in its place; give that or more, or leave rollout.engine out"
            refuse("rollout.temperature", self.rollout.temperature, remedy)
        elif self.rollout.sleep and self.rollout.max_staleness:
            remedy = "the workers write while the learner works; take one away, this or rollout.max_staleness"
            refuse("rollout.sleep", "true", remedy)
        elif self.rollout.untold_filter:
            refuse(*self.rollout.untold_filter)
        elif self.rollout.stop_strings:
            remedy = "the vLLM engine ends responses by ids alone; leave them out, or take the transformers engine"
            refuse("rollout.stop_strings", self.rollout.stop_strings, remedy)
        elif self.run.deterministic:
            refuse("run.deterministic", "true", "vLLM repeats no bits; take one away, this or rollout.engine vllm")
        if self.rollout.emit_values:
            apart, cap = self.model.value in ("lora", "separate"), self.ppo.importance_cap
            for key, value, is_other, why in (
                ("rollout.engine", self.rollout.engine, self.rollout.engine == "vllm", "gives no states"),
                ("model.value", self.model.value, apart, "reads other states than the policy's"),
                ("model.value_heads", "components", bool(self.value_heads), "says several values of a state"),
                ("ppo.estimator", self.ppo.estimator, not self.ppo.has_critic, "reads no values"),
                ("ppo.importance_cap", cap, cap is not None, "wants the learner's log-probs beside the workers'"),
            ):
                if is_other:
                    refuse("rollout.emit_values", "true", f"{key} = {value} {why}; take one of the two away")
        if self.data.skip_solved is not None and n == 1:
            remedy = "one sample has no variance; set rollout.n_samples_per_prompt to 2 or more, or leave it out"
            refuse("data.skip_solved", self.data.skip_solved, remedy)
        if self.ppo.target_kl is not None and self.ppo.kl_horizon < batch:
            refuse(
                "ppo.kl_horizon", self.ppo.kl_horizon, f"is less than one batch: at least {batch} keeps kl_coef above 0"
            )
        model = self.model
        if model.value == "lora" and not model.lora_rank:
            refuse("model.value", "lora", "is an adapter on a frozen trunk: set model.lora_rank, or take separate")
        if model.reference == "adapter" and not model.lora_rank:
            refuse("model.reference", "adapter", "there is none without model.lora_rank; take copy")
        if model.value_path is not None and model.value != "separate":
            refuse("model.value_path", model.value_path, f"model.value is {model.value}; set it to separate")
        if model.value_heads == "components" and not self.ppo.has_critic:
            remedy = f"wants a critic, and ppo.estimator {self.ppo.estimator} has none: leave it out or use gae"
            refuse("model.value_heads", "components", remedy)
        if self.ppo.compares_samples and n == 1:
            alone = "compares the samples of a prompt and there is one: set rollout.n_samples_per_prompt to 2 or more"
            refuse("ppo.estimator", self.ppo.estimator, f"{alone}, or use gae or reinforce_pp")
        if not self.ppo.has_critic:
            of_critic = ("lambda_alpha", "value_gamma", "value_lambda", "scale_values", "bootstrap_cut")
            for leaf in (*of_critic, "value_warmup_steps"):
                value = getattr(self.ppo, leaf)
                if value != PPOConfig.model_fields[leaf].default:
                    remedy = f"wants a critic, and ppo.estimator {self.ppo.estimator} has none: leave it out or use gae"
                    refuse(f"ppo.{leaf}", str(value).lower(), remedy)
        if self.ppo.ptx_coef and self.data.ptx_path is None:
            refuse("ppo.ptx_coef", self.ppo.ptx_coef, "wants texts: set data.ptx_path, or ppo.ptx_coef to 0")
        if self.data.ptx_path is not None and not self.ppo.ptx_coef:
            refuse("data.ptx_path", self.data.ptx_path, "has no weight: set ppo.ptx_coef above 0, or leave it out")
        if not all(0 <= beta < 1 for beta in self.optim.betas):
            refuse("optim.betas", list(self.optim.betas), "both must be at least 0 and less than 1, e.g. [0.9, 0.95]")
        if not self.rewards:
            refuse("rewards", "{}", "is empty: name at least one component, e.g. --rewards.mine.fn my_rewards.py:fn")
        if not any(r.paid for r in self.rewards.values()):
            refuse("rewards", sorted(self.rewards), "all have weight 0, so nothing would be learnt: give one a weight")
        for name in self.rewards:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name in RESERVED_COMPONENTS:
                taken = ", ".join(sorted(RESERVED_COMPONENTS))
                refuse(f"rewards.{name}", name, f"is no component name: letters, digits and _, and none of {taken}")
        if self.run.best_metric.removeprefix("-") not in self.evaluation_means:
            names = ", ".join(self.evaluation_means)
            refuse("run.best_metric", self.run.best_metric, f"is no mean of an evaluation; there are {names}")
        if self.run.patience is not None and not self.data.has_held_out:
            remedy = "counts evaluations and there are none: give data.eval_path or data.eval_frac"
            refuse("run.patience", self.run.patience, remedy)
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
