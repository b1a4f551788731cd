"""How much memory the processes of a run need, from shapes and settings alone: arithmetic, no torch.

    model states   P parameters, all in float32: weights 4 P, gradients 4 P, two moments of AdamW 8 P bytes. ZeRO
                   (Rajbhandari et al. 2019, arXiv 1910.02054, section 3.1, figure 1) counts 2 + 2 + K with K = 12 for
                   mixed precision, the same 16: there the float32 weights are among the K. Over N ranks its
                   stages divide the moments (1), the gradients too (2), and the weights too (3). What DeepSpeed and DDP
                   hold besides is in their source, and named at `_besides`.
    activations    what a backward pass reads again, for each token of a forward pass and each layer: by counting the
                   tensors of a pre-norm block with a gated MLP. Korthikanti et al. 2022 (arXiv 2205.05198, equation 2)
                   count the same for GPT: 34 H bytes in 16 bit, with dropout masks, which we have not.
    keys, values   2 x layers x (key-value heads x head width) numbers for each token of each slot (Kwon et al. 2023,
                   arXiv 2309.06180, section 3).

Legend: P parameters, N learner ranks, H hidden width, F inner width of the MLP, Q and K widths of all query and of all
key-value heads, V vocabulary. Everything is in bytes and for the worst moment; docs/doctor.md has measurements.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from core.schema import Config

GIB = 2**30
F32 = 4
# Interpreter, torch and what it loads: resident in a process whose model is nothing (docs/doctor.md).
LEARNER_PROCESS, ACTOR_PROCESS, RAY_PROCESSES = 0.6 * GIB, 0.35 * GIB, 0.5 * GIB
# deepspeed/runtime/zero/config.py: elements that are reduced at once, and that ZeRO-3 may hold whole.
REDUCE_BUCKET, MAX_LIVE = 500_000_000, 1_000_000_000
CHUNK = {"cpu": 16 << 20, "cuda": 512 << 20}  # bytes of one buffer of logits: trainer/fused_head.py
VLLM_CPU_CACHE = GIB  # rollout/engines/vllm_engine.py
VLLM_GPU_SHARE = 0.9  # of its gpu_memory_utilization, where rollout.gpu_memory says nothing


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the estimate reads of a model."""

    parameters: int
    trunk: int  # parameters without the output layer, where that has its own
    layers: int
    hidden: int
    inner: int
    query: int  # heads x head width
    key: int  # key-value heads x head width
    vocabulary: int
    linears: tuple[tuple[str, int, int], ...] = ()  # name, outputs, inputs; without the output layer
    window: int | None = None
    fused: bool = True  # whether log-probs are computed in chunks (trainer/fused_head.py)

    def adapter(self, rank: int, targets: list[str]) -> int:
        """Parameters of one low-rank adapter: B [out, rank] and A [rank, in] beside each layer that it is for."""
        taken = [(out, into) for name, out, into in self.linears if not targets or name.rsplit(".", 1)[-1] in targets]
        return rank * sum(out + into for out, into in taken)


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How the learner ranks share their model states, as the accelerate file says it."""

    kind: str = "one"  # one, ddp, fsdp2, zero0 to zero3
    ranks: int = 1
    offload_optimizer: bool = False  # to host memory
    offload_parameters: bool = False

    @classmethod
    def of(cls, file: Mapping[str, Any], ranks: int) -> "Sharding":
        """`file`: an accelerate file as YAML reads it; {} for none."""
        kinds = {"MULTI_GPU": "ddp", "FSDP": "fsdp2"}
        zero = file.get("deepspeed_config") or {}
        kind = kinds.get(str(file.get("distributed_type")), "ddp") if ranks > 1 else "one"
        if file.get("distributed_type") == "DEEPSPEED":
            kind = f"zero{zero.get('zero_stage', 2)}"
        return cls(
            kind=kind,
            ranks=ranks,
            offload_optimizer=zero.get("offload_optimizer_device", "none") not in (None, "none"),
            offload_parameters=zero.get("offload_param_device", "none") not in (None, "none"),
        )

    @property
    def words(self) -> str:
        if self.kind == "one":
            return "one learner"
        names = {"ddp": "DDP", "fsdp2": "FSDP2"}
        offload = " with offload" if self.offload_optimizer or self.offload_parameters else ""
        return f"{self.ranks} learners, {names.get(self.kind, self.kind.replace('zero', 'ZeRO-'))}{offload}"


@dataclass(frozen=True, kw_only=True)
class Learner:
    """Bytes of one rank, on its device unless it says `host`."""

    weights: float
    gradients: float
    moments: float
    reference: float
    buffers: float  # of the engine: buckets, flat copies, parameters that are gathered for a moment
    activations: float  # at most: with the longest prompts and responses
    logits: float
    host: float = 0.0  # beside a device: what is offloaded, and the model while it is loaded

    @property
    def states(self) -> float:
        """What is there whatever the prompts are."""
        return self.weights + self.gradients + self.moments + self.reference + self.buffers

    @property
    def most(self) -> float:
        return self.states + self.activations + self.logits

    def parts(self) -> dict[str, float]:
        """Those that are not 0, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Bytes of one rollout worker on its device; of a vLLM worker on each of its GPUs."""

    weights: float
    cache: float  # keys and values, at most
    scratch: float  # logits of the next token, and of a pass over prompts
    share: float | None = None  # of a GPU, which vLLM takes at once
    host: float = 0.0

    @property
    def most(self) -> float:
        return self.weights + self.cache + self.scratch


def trained_and_frozen(cfg: Config, shape: ModelShape) -> tuple[int, int]:
    """Parameters of the policy's engine that are trained, and that are not. The value heads are next to nothing."""
    model, heads = cfg.model, (shape.hidden + 1) * max(1, len(cfg.value_heads))
    critic = shape.trunk if model.value == "separate" else 0
    if not model.lora_rank:
        return shape.parameters + critic + heads, 0
    adapters = shape.adapter(model.lora_rank, model.lora_targets) * (2 if model.value == "lora" else 1)
    return adapters + critic + heads, shape.parameters


def _besides(sharding: Sharding, trained: int, whole: int) -> float:
    """Elements that engines hold beside weights, gradients and moments.

    ddp    buckets as large as the gradients, which are copied in and out (gradient_as_bucket_view is off)
    zero0  a flat copy of up to one bucket for the all-reduce
    zero1, zero2   a copy of the rank's weights for the optimizer even in float32 (single_partition_of_fp32_groups),
           its gradients flat for the step, and a bucket, which trainer/learner.py makes no larger than all gradients
    zero3  a bucket, what is in it once more (reduce_scatter_coalesced joins it by rank), and parameters that are
           gathered and kept because they are read again soon, up to MAX_LIVE
    fsdp2  two layers that are gathered; the largest there is an eighth of a small model, less of a large one
    """
    bucket = min(trained, REDUCE_BUCKET)
    return {
        "one": 0.0,
        "ddp": trained,
        "zero0": bucket,
        "zero1": 2 * trained / sharding.ranks + bucket,
        "zero2": 2 * trained / sharding.ranks + bucket,
        "zero3": 2 * bucket + min(whole, MAX_LIVE),
        "fsdp2": whole / 4,
    }[sharding.kind]


def learner(cfg: Config, shape: ModelShape, sharding: Sharding, device: str) -> Learner:
    """Bytes of one learner rank at the worst moment. `device`: cpu or cuda."""
    trained, frozen = trained_and_frozen(cfg, shape)
    whole, n = trained + frozen, sharding.ranks
    of_weights = n if sharding.kind in ("zero3", "fsdp2") else 1
    of_gradients = n if sharding.kind in ("zero2", "zero3", "fsdp2") else 1
    of_moments = n if sharding.kind in ("zero1", "zero2", "zero3", "fsdp2") else 1
    weights, gradients = F32 * whole / of_weights, F32 * trained / of_gradients
    moments, buffers = 2 * F32 * trained / of_moments, F32 * _besides(sharding, trained, whole)
    if cfg.model.dtype == "bfloat16":  # autocast: each matrix is rounded once and kept for the backward pass
        buffers += 2 * min(whole, MAX_LIVE)
    reference = F32 * shape.parameters if cfg.reference in ("copy", "offload") else 0.0
    host = 0.0
    if device != "cpu":
        host = F32 * (shape.parameters + (whole - shape.parameters if cfg.model.value == "separate" else 0))
        if sharding.offload_optimizer:  # DeepSpeed keeps moments, its copy of the weights and their gradients there
            host += moments + 2 * F32 * trained / n
            moments = 0.0
        if sharding.offload_parameters:
            host += weights
            weights = 0.0
        if cfg.reference == "offload":
            host += reference
    return Learner(
        weights=weights,
        gradients=gradients,
        moments=moments,
        reference=reference,
        buffers=buffers,
        activations=micro_batch_tokens(cfg, shape) * activation_bytes(cfg, shape),
        logits=logit_bytes(cfg, shape, device),
        host=host,
    )


def longest(cfg: Config, shape: ModelShape) -> int:
    """Tokens of the longest prompt and response together that the settings and the model's window allow."""
    most = cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    return most if shape.window is None else min(most, shape.window)


def micro_batch_tokens(cfg: Config, shape: ModelShape) -> int:
    """Tokens of a forward pass at most."""
    most, one = cfg.ppo.micro_batch_size * longest(cfg, shape), longest(cfg, shape)
    return most if cfg.ppo.micro_batch_tokens is None else min(most, max(one, cfg.ppo.micro_batch_tokens))


def activation_bytes(cfg: Config, shape: ModelShape) -> float:
    """For each token of a forward pass with gradient, what the backward pass reads.

    A layer keeps of each of its two norms what goes in, the normed, and what comes out; queries, keys and values, what
    attention gives; and of the MLP both halves, the activation and the product: 6 H + 2 Q + 2 K + 4 F numbers. Under
    bfloat16 the first two of a norm stay float32, and each of the five products that read a norm rounds it anew.
    """
    narrow = cfg.model.dtype == "bfloat16"
    of_norms = shape.hidden * (4 * F32 + 5 * 2 if narrow else 6 * F32)
    of_layer = of_norms + (2 if narrow else F32) * (2 * shape.query + 2 * shape.key + 4 * shape.inner)
    kept = shape.layers * of_layer
    if cfg.model.gradient_checkpointing:  # what enters each layer, and one layer whole while it is computed again
        kept = shape.layers * F32 * shape.hidden + of_layer
    trunks = 2 if cfg.model.value in ("separate", "lora") else 1
    return trunks * kept


def logit_bytes(cfg: Config, shape: ModelShape, device: str) -> float:
    """Three buffers of a chunk of logits and the gradient of the output layer; or three of [tokens, V]."""
    scored = cfg.ppo.micro_batch_size * cfg.rollout.max_new_tokens
    if cfg.ppo.micro_batch_tokens is not None:
        scored = min(scored, max(cfg.rollout.max_new_tokens, cfg.ppo.micro_batch_tokens))
    if shape.fused:
        scored = min(scored, max(16, CHUNK[device] // (F32 * shape.vocabulary)))
    of_layer = 0 if cfg.model.lora_rank else F32 * shape.vocabulary * shape.hidden
    return 3 * F32 * scored * shape.vocabulary + of_layer


def cache_bytes(shape: ModelShape, tokens: int, width: int) -> float:
    """Keys and values of so many tokens in numbers of `width` bytes."""
    return 2.0 * shape.layers * shape.key * width * tokens


def worker(cfg: Config, shape: ModelShape, device: str) -> Worker:
    """Bytes of one rollout worker at the worst moment."""
    width, r = (F32 if cfg.model.dtype == "float32" else 2), cfg.rollout
    weights = float(width * shape.parameters)
    if r.engine == "vllm":
        host = weights if device != "cpu" else 0.0  # the copy that a sync writes into
        if device == "cpu":
            return Worker(weights=2 * weights, cache=float(VLLM_CPU_CACHE), scratch=0.0)
        share = r.gpu_memory if r.gpu_memory is not None else VLLM_GPU_SHARE
        each = weights / r.tensor_parallel_size
        least = cache_bytes(shape, longest(cfg, shape), width) / r.tensor_parallel_size  # one response must fit
        return Worker(weights=each, cache=least, scratch=0.0, share=share, host=host)
    slots = min(r.slots, r.chunk_size)
    cache = cache_bytes(shape, slots * longest(cfg, shape), width)
    scratch = 3.0 * F32 * slots * shape.vocabulary
    # On a CPU the weights of a version lie in Ray's shared memory, once for all workers. What a worker has of its own
    # are its layers as they are read (rollout/engines/packed.py), and before that what it loaded.
    return Worker(weights=weights, cache=cache, scratch=scratch, host=weights if device != "cpu" else 0.0)


def gib(n: float) -> str:
    """About two digits, in the unit that suits: `0.36 GiB`, `12 MiB`."""
    if n < 0.1 * GIB:
        return f"{n / 2**20:.2g} MiB"
    return f"{n / GIB:.2g} GiB" if n < 10 * GIB else f"{n / GIB:,.0f} GiB"
