"""The learner processes of a job: joining them, and refusing launches that would train wrongly without a word.

Accelerate on a CPU falls back in silence: to one process where two were asked for (`--cpu`, MULTI_CPU in the file), to
two processes with unwrapped models (an FSDP file, a backend without `cpu=True`), to no DeepSpeed (`cpu=True`).
"""

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from core.faults import ProcessFault, UserError
from core.schema import Config
from launch import cluster, compiled_ops, placement
from trainer.ranks import Ranks


def join(cfg: Config, stack: ExitStack, note: Callable[[str], None]) -> tuple[Accelerator, Ranks]:
    """This process's part in the launch; `stack` leaves it again.

    Raises UserError for a launch that cannot train, ProcessFault where the other processes do not come.
    """
    device = cluster.device(cfg)
    deepspeed = _flag("ACCELERATE_USE_DEEPSPEED")
    _refuse(device, deepspeed)
    rank, world = cluster.launched()
    cluster.refuse_transport(cfg, device, world)
    placement.of_machine(cfg, device, world)
    ours = "bf16" if cfg.model.dtype == "bfloat16" else "no"
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") not in ("no", ours) and rank == 0:
        note(f"the mixed_precision of the accelerate file is not used: model.dtype is {cfg.model.dtype}")
    torch.manual_seed(cfg.run.seed)
    torch.set_num_threads(cluster.thread_plan(cfg)[0])
    torch.use_deterministic_algorithms(cfg.run.deterministic, warn_only=True)
    # Accelerate keeps the settings of its first user for the whole process: a second run in a notebook has its own.
    stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=cfg.resources.collective_timeout_s))
    if device == "cpu":
        group.backend = "gloo"  # unnamed, every rank under DeepSpeed would take itself for the only one
    if deepspeed:
        if device == "cpu":
            _without_shared_memory_op()
        compiled_ops.wait_for_compilers(note, say_wait=rank == 0)
    try:
        accelerator = Accelerator(
            cpu=device == "cpu" and not deepspeed,
            mixed_precision="no",  # trainer/model.py casts, alike under every engine
            kwargs_handlers=[group] if world > 1 or deepspeed else None,
        )
        stack.callback(accelerator.end_training)
        ranks = Ranks(
            accelerator.process_index, accelerator.num_processes, timeout_s=cfg.resources.collective_timeout_s
        )
    except (RuntimeError, ConnectionError, TimeoutError) as error:
        if world == 1:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ProcessFault(f"{world} learner processes did not find each other: {reason}") from None
    if ranks.size != world:
        raise UserError(f"{world} learner processes were launched, Accelerate made {ranks.size} of them: use ddp.yaml")
    wanted = {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    if deepspeed or _flag("ACCELERATE_USE_FSDP"):
        wanted = {DistributedType.DEEPSPEED if deepspeed else DistributedType.FSDP}
    if (deepspeed or world > 1) and accelerator.distributed_type not in wanted:
        raise UserError(
            f"{world} learner processes were launched as {accelerator.distributed_type.value}, which would not reduce"
            " gradients here: use launch/accelerate/ddp.yaml or zero2.yaml"
        )
    if deepspeed:
        # transformers would load every model in shards from here on, which all ranks must do together; what a model
        # computes is looked at before it is sharded, and its size on rank 0 alone.
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    return accelerator, ranks


def _without_shared_memory_op() -> None:
    """DeepSpeed on a CPU compiles, in a minute of processor, an operation that its `inference_all_reduce` alone calls:
    where this table, which nothing else there reads, says that it compiles here (deepspeed 0.19.8, comm/torch.py)."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _refuse(device: str, deepspeed: bool) -> None:
    """Raise UserError for launches that are known not to work, before anything waits for anything."""
    world = cluster.launched()[1]
    asked = asked_for()
    if asked is not None and asked > world:
        raise UserError(
            f"accelerate launch was asked for {asked} learner processes and started {world}, as it does with --cpu,"
            " use_cpu or MULTI_CPU: take launch/accelerate/ddp.yaml, which works on a CPU too"
        )
    if _flag("ACCELERATE_USE_FSDP"):
        if device == "cpu":
            raise UserError(
                "FSDP: on a CPU Accelerate leaves the model as it is and no gradient is reduced; take"
                " launch/accelerate/zero3.yaml, which shards here too, or ddp.yaml"
            )
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("fsdp_version in the accelerate file: only version 2; take launch/accelerate/fsdp2.yaml")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto"):
        raise UserError(
            f"gradient_accumulation_steps = {steps} in the accelerate file: losses would be divided by it; set it to 1,"
            " ppo.micro_batch_size decides how a mini-batch is cut"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cuda" and here > torch.cuda.device_count():
        raise UserError(f"{here} learner processes were launched on a machine with {torch.cuda.device_count()} GPUs")
    if deepspeed:
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in ("0", "1", "2", "3"):
            raise UserError(f"zero_stage = {stage} in the accelerate file: 0, 1, 2 or 3")
        if _flag("ACCELERATE_DEEPSPEED_ZERO3_INIT"):
            raise UserError(
                "zero3_init_flag = true in the accelerate file: models are loaded whole, then sharded; false"
            )
        offloaded = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none"
        for tool in ("g++", "ninja"):
            if device == "cpu" and offloaded and shutil.which(tool) is None:
                raise UserError(
                    f"offload_optimizer_device in the accelerate file: DeepSpeed compiles that optimizer with {tool},"
                    f" which is not on PATH: install the package {tool.replace('ninja', 'ninja-build')}, or use"
                    " launch/accelerate/zero3.yaml"
                )


def asked_for() -> int | None:
    """How many processes the `accelerate launch` above this process was asked for; None where it does not say."""
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    if not any(
        Path(w).name in ("accelerate", "accelerate-launch") or "accelerate" in w and "launch" in w for w in words
    ):
        return None
    options: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        options.setdefault(name.replace("-", "_"), value if equals else following)
    if (number := options.get("__num_processes", "")).isdigit():
        return int(number)
    file = options.get("__config_file")
    if file is None or not Path(file).is_file():
        return None
    tree = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    number = tree.get("num_processes") if isinstance(tree, dict) else None
    return number if isinstance(number, int) else None
