"""Builds the parts of a run from its configuration: the one place where they are wired together."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from core.faults import UserError
from core.pretrained import from_pretrained, load_tokenizer
from core.reward_name import RewardName
from core.schema import Config
from launch import early, environment, interpreter
from launch.cluster import thread_plan
from launch.memory import ModelShape
from launch.reservation import NO_SEATS, Seats
from reward_server.client import RewardClient
from reward_server.reference import ReferenceSpec
from rollout.engines.engine import Engine
from rollout.engines.sampling import Filters
from rollout.engines.transformers_engine import TransformersEngine, stop_ids
from rollout.engines.vllm_engine import VLLMEngine
from rollout.environment import EnvironmentSpec
from rollout.group import RolloutGroup
from rollout.prompts import (
    EVAL_SEED,
    Place,
    PromptStream,
    load_rows,
    load_training_rows,
    split_off,
    training_order,
)
from rollout.rounds import RoundPlan
from rollout.shares import Exchange, Rollouts, Shares


def model_config(path: str) -> Any:
    """The configuration of a causal LM. Raises UserError if there is none."""
    from transformers import AutoConfig

    return from_pretrained(AutoConfig, path, "model configuration")


def model_shape(path: str) -> ModelShape:
    """What `launch/memory.py` reads of a model, from its configuration alone: nothing is allocated.

    Raises UserError if it is no causal LM.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = model_config(path)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError:
        raise UserError(
            f"model.path = {path}: a model of type {config.model_type} is no causal language model; give one that"
            " AutoModelForCausalLM loads"
        ) from None
    return shape_of(model)


def shape_of(lm: Any) -> ModelShape:
    """The shape of a causal LM of transformers; its tensors may be on `meta`."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    from trainer.model import changes_logits

    config, head = lm.config.get_text_config(), lm.get_output_embeddings()
    linears = {
        name: tuple(m.weight.shape)
        for name, m in lm.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and m is not head
    }
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    own_head = head.weight is not lm.get_input_embeddings().weight
    n = lm.num_parameters()
    return ModelShape(
        parameters=n,
        trunk=n - (head.weight.numel() if own_head else 0),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size,
        query=heads * width,
        key=(getattr(config, "num_key_value_heads", None) or heads) * width,
        vocabulary=config.vocab_size,
        linears=tuple((name, *shape) for name, shape in linears.items()),
        window=getattr(config, "max_position_embeddings", None),
        fused=not changes_logits(config),
    )


def response_room(cfg: Config) -> int | None:
    """Prompt tokens that leave room for a whole response in the model's window; None where it names no window."""
    window = getattr(model_config(cfg.model.path), "max_position_embeddings", None)
    if window is None:
        return None
    early.refuse_response(cfg, window)
    return window - cfg.rollout.max_new_tokens


def prompt_streams(
    cfg: Config, tokenizer: Any, rows: list[dict] | None = None, eval_rows: list[dict] | None = None
) -> tuple[PromptStream, PromptStream | None]:
    """Training prompts and held-out ones (None without `data.eval_path` and `data.eval_frac`). `rows` stand in for
    files."""
    data, stop = cfg.data, stop_ids(cfg.model.path, tokenizer.eos_token_id)
    make = functools.partial(PromptStream, tokenizer=tokenizer, data=data, window=response_room(cfg), stop=stop)
    make_held_out = functools.partial(make, run_id="eval", seed=EVAL_SEED)
    if rows is None:
        rows, places = load_training_rows(data)
    else:
        places = [Place("data.path", i) for i in range(len(rows))]
    if not rows:
        raise UserError(f"data.path: has no rows; each line must be an object with `{data.prompt_column}`")
    early.refuse_reserved(rows, data.prompt_column)
    held_out = None
    if data.eval_frac:
        kept, off = split_off(rows, places, data)
        held_out = make_held_out([rows[i] for i in off], places=[places[i] for i in off])
        rows, places = [rows[i] for i in kept], [places[i] for i in kept]
    augment = early.load_augment(data.augment) if data.augment is not None else None
    training = make(
        rows,
        run_id=cfg.run.name,
        seed=cfg.run.seed,
        order=training_order(rows, places, data, cfg.run.seed),
        places=places,
        augment=augment,
        skip_solved=data.skip_solved,
    )
    if eval_rows is None and data.eval_path is not None:
        eval_rows = load_rows(data.eval_path, data.eval_split, "data.eval_path")
    if eval_rows is not None:
        early.refuse_reserved(eval_rows, data.prompt_column)
        if data.mixture:  # what a reward asks for in training it asks for here too
            eval_rows = [{"dataset": "held_out"} | row for row in eval_rows]
        held_out = make_held_out(eval_rows, source="data.eval_path")
    return training, held_out


def texts(cfg: Config, tokenizer: Any) -> list[np.ndarray]:
    """Ids of the texts of `data.ptx_path`, column `text`, each with the tokenizer's eos; [] without one. What is longer
    than prompt and response may be becomes several. Raises UserError."""
    path = cfg.data.ptx_path
    if path is None:
        return []
    room = response_room(cfg)
    width = cfg.rollout.max_new_tokens + min(cfg.data.max_prompt_tokens, *([] if room is None else [room]))
    pieces: list[np.ndarray] = []
    for i, row in enumerate(load_rows(path, cfg.data.split, "data.ptx_path")):
        if not isinstance(row.get("text"), str):
            raise UserError(
                f"data.ptx_path = {path}: row {i + 1} has no text in `text` (its columns: {', '.join(row)})"
            )
        ids = tokenizer.encode(row["text"])
        ids += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        cut = [ids[start : start + width] for start in range(0, len(ids), width)]
        pieces += [np.asarray(piece, dtype=np.int64) for piece in cut if len(piece) > 1]
    if not pieces:
        raise UserError(f"data.ptx_path = {path}: has no text of two tokens or more; give texts, or ppo.ptx_coef 0")
    return pieces


def reference_lm(cfg: Config, device: Any) -> Any:
    """The frozen copy; None where the reference is the policy without its adapter, or is elsewhere."""
    from trainer.model import load_causal_lm

    if cfg.reference in ("adapter", "reward_server"):
        return None
    return load_causal_lm(cfg.model.path, "cpu" if cfg.reference == "offload" else device)


def critic(cfg: Config, device: Any) -> tuple[Any, Any] | None:
    """Trunk and [1, H] head of `model.value_path`, a reward model or any other; None without one. Raises UserError."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from core.pretrained import load_causal_lm as load_lm

    path = cfg.model.value_path
    if path is None:
        return None
    config = from_pretrained(AutoConfig, path, "model configuration", "model.value_path")
    architecture = (config.architectures or [""])[0]
    if "ForSequenceClassification" not in architecture:
        return load_lm(path, torch.float32).base_model.to(device).eval(), None
    model, found = from_pretrained(
        AutoModelForSequenceClassification, path, "reward model", "model.value_path", output_loading_info=True
    )
    score = getattr(model, "score", None)
    if score is None or score.weight.shape[0] != 1:
        raise UserError(
            f"model.value_path = {path}: a reward model has one label and a linear layer `score`, this {architecture}"
            " has not; give such a one, or a causal language model"
        )
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"model.value_path = {path}: the weights have no {missing[0]}, which would be random; give the whole reward"
            " model"
        )
    return model.base_model.float().to(device).eval(), score.weight.detach().float().to(device)


def shares(cfg: Config, rank: int = 0, n_ranks: int = 1) -> Shares:
    """Which chunks and which workers are those of one learner rank. Raises UserError where it must have workers and
    there are too few."""
    if cfg.rollout.in_rounds and n_ranks > cfg.rollout.workers:
        raise UserError(
            f"rollout.workers = {cfg.rollout.workers}: with rollout.round_tokens each of the {n_ranks} learner"
            f" processes drives workers of its own; give {n_ranks} or more"
        )
    if 0 < cfg.rollout.extra_prompts < n_ranks:
        raise UserError(
            f"rollout.extra_prompts = {cfg.rollout.extra_prompts}: of the {n_ranks} learner processes some would have"
            f" none, and all would wait for their longest responses; give {n_ranks} or more"
        )
    return Shares(rank, n_ranks, cfg.rollout.workers, cfg.rollout.chunk_size)


def round_plan(cfg: Config, share: Shares) -> RoundPlan | None:
    """How a learner rank has its batches written in rounds; None where they are written whole."""
    if cfg.rollout.round_tokens is None:
        return None
    return RoundPlan(
        tokens=cfg.rollout.round_tokens,
        prompts_per_step=cfg.prompts_per_step,
        chunk_size=share.chunk_size,
        rank=share.rank,
        n_ranks=share.n_ranks,
    )


def source_digest(fn: str) -> str | None:
    """Digest of the file of a reward or environment `file.py:name`; None for one of a package, or handed over."""
    file = RewardName.parse(fn).file
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() if file is not None else None


def rollouts(
    cfg: Config,
    tokenizer: Any,
    device: str,
    note: Callable[[str], None],
    *,
    share: Shares | None = None,
    exchange: Exchange | None = None,
    seats: Seats = NO_SEATS,
) -> Rollouts:
    """Start the workers of this rank; they load the model from disk and get their first version from the learner.

    `device`: cpu or cuda; which GPU that is, `seats` says."""
    share = share or shares(cfg)
    group = _group(cfg, tokenizer, device, note, share.workers, seats) if share.workers else None
    ahead, plan = cfg.rollout.max_staleness > 0, round_plan(cfg, share)
    timeout_s, at_least = cfg.resources.collective_timeout_s, cfg.rollout.stream_size
    return Rollouts(share, group, exchange, timeout_s, ahead=ahead, plan=plan, at_least=at_least)


def environment_spec(cfg: Config) -> EnvironmentSpec | None:
    """What a worker needs to start the environment of the run; None without one."""
    r = cfg.rollout
    if r.environment is None:
        return None
    return EnvironmentSpec(
        name=r.environment,
        load=functools.partial(environment.load, r.environment, r.environment_options),
        timeout_s=r.environment_timeout_s,
        start_timeout_s=r.timeout_s / 2,  # within that of the worker's own start, which names nobody
        max_turns=r.max_turns,
        max_new_tokens=r.max_new_tokens,
    )


def engine_loader(cfg: Config, stop: tuple[int, ...], device: str) -> Callable[[], Engine]:
    """What a worker calls, in its own process, to have its engine."""
    rollout = cfg.rollout
    settings: dict[str, Any] = {
        "dtype": cfg.model.dtype,
        "device": device,
        "temperature": rollout.temperature,
        "max_new_tokens": rollout.max_new_tokens,
    }
    if rollout.engine == "transformers":
        return functools.partial(
            TransformersEngine.load,
            cfg.model.path,
            stop,
            slots=rollout.slots,
            filters=Filters(**rollout.filters) if rollout.filters else None,
            stop_strings=tuple(rollout.stop_strings),
            load_tokenizer=functools.partial(load_tokenizer, cfg.model.path),
            values=rollout.emit_values,
            **settings,
        )
    room = response_room(cfg)
    return functools.partial(
        VLLMEngine.load,
        cfg.model.path,
        stop,
        max_prompt_tokens=min(cfg.data.max_prompt_tokens, *([] if room is None else [room])),
        requests=rollout.slots,
        tensor_parallel_size=rollout.tensor_parallel_size,
        gpu_memory=rollout.gpu_memory,
        sleep=rollout.sleep,
        prefix_cache=rollout.prefix_cache,
        **settings,
    )


def worker_options(cfg: Config, seats: Seats, number: int) -> dict[str, Any] | None:
    """Ray's options for a rollout worker; None where no node may have it. Raises ProcessFault where the node of its GPU
    is gone."""
    place = seats.worker(number)
    if place is None:
        return None
    # No CPU of Ray's count: on a small host the last actor would wait for ever.
    options: dict[str, Any] = {"num_cpus": 0} | place
    if cfg.rollout.python is not None:
        options["runtime_env"] = interpreter.environment(cfg.rollout.python)
    return options


def _group(
    cfg: Config,
    tokenizer: Any,
    device: str,
    note: Callable[[str], None],
    workers: list[int],
    seats: Seats = NO_SEATS,
) -> RolloutGroup:
    load_engine = engine_loader(cfg, stop_ids(cfg.model.path, tokenizer.eos_token_id), device)
    _, threads = thread_plan(cfg)

    def make_args(name: str) -> tuple[tuple, dict]:
        load = functools.partial(load_tokenizer, cfg.model.path)
        settings = {"threads": threads, "deterministic": cfg.run.deterministic, "environment": environment_spec(cfg)}
        return (name, load_engine, load), settings

    return RolloutGroup(
        workers,
        make_args,
        actor_options=functools.partial(worker_options, cfg, seats),
        where=seats.where,
        moves=seats.moves,
        timeout_s=cfg.rollout.timeout_s,
        max_losses=cfg.rollout.max_worker_losses,
        note=note,
        rest=cfg.rollout.sleep,
    )


def reward_client(
    cfg: Config,
    functions: dict[str, Callable] | None,
    note: Callable[[str], None],
    *,
    rank: int = 0,
    seats: Seats = NO_SEATS,
) -> RewardClient:
    """Start the reward servers of this rank."""
    return RewardClient(
        cfg.rewards,
        functools.partial(load_tokenizer, cfg.model.path),
        functions=functions,
        timeout_s=cfg.resources.reward_timeout_s,
        max_dropped_frac=cfg.run.max_dropped_frac,
        note=note,
        servers=cfg.resources.reward_servers,
        device="cuda" if cfg.resources.reward_gpus else "cpu",
        actor_options=functools.partial(seats.server, rank),
        batch_size=cfg.resources.reward_batch_size,
        reference=reference_spec(cfg),
    )


def reference_spec(cfg: Config) -> ReferenceSpec | None:
    """The reference as reward servers have it; None where they have none."""
    if cfg.reference != "reward_server":
        return None
    return ReferenceSpec(
        model=cfg.model.path,
        dtype=cfg.model.dtype,
        temperature=cfg.rollout.temperature,
        batch_size=cfg.rollout.chunk_size,
    )
