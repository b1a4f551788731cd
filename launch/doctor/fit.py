"""The configuration, and whether this machine has the memory for it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from core.faults import Fault, ProcessFault
from core.schema import Config
from launch import memory, placement
from launch.doctor import devices
from launch.doctor.finding import Finding, Situation, fail_of_config, ok, warn
from launch.memory import ACTOR_PROCESS, GIB, LEARNER_PROCESS, RAY_PROCESSES, ModelShape, Sharding, gib

CUDA_CONTEXT = 0.5 * GIB  # of each process on a GPU: its context and libraries' workspaces


@dataclass(frozen=True, kw_only=True)
class Machine:
    host: float  # bytes that are free
    gpus: tuple[float, ...] = ()  # bytes that are free on each
    seats: placement.Plan | None = None  # who sits where; None: on CPUs, or decided by a cluster later

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A memory and who shares it."""

    name: str
    room: float
    certain: float  # bytes whatever the prompts are
    most: float  # with the longest prompts and responses that the settings allow
    who: str


def places(cfg: Config, shape: ModelShape, sharding: Sharding, machine: Machine) -> list[Place]:
    """The host, and each GPU that has somebody."""
    one = memory.learner(cfg, shape, sharding, machine.device)
    worker = memory.worker(cfg, shape, machine.device)
    here = cfg.resources.ray_address is None  # else workers and servers are where the cluster puts them
    n, w = sharding.ranks, cfg.rollout.workers if here else 0
    servers = n * cfg.resources.reward_servers if here else 0
    width = 4 if cfg.model.dtype == "float32" else 2
    on_host = n * (LEARNER_PROCESS + one.host) + w * (ACTOR_PROCESS + worker.host) + servers * ACTOR_PROCESS
    if here:  # two versions of the weights: the one in use and the one that comes
        on_host += RAY_PROCESSES + min(cfg.resources.object_store_mb * 2**20, 2 * width * shape.parameters)
        on_host += servers * width * shape.parameters * (cfg.reference == "reward_server")
    who = f"{n} learner{'s' * (n > 1)}" + (f" + {w} worker{'s' * (w > 1)}" if w else "")
    if machine.device == "cpu":
        certain = on_host + n * one.states + w * worker.weights
        most = on_host + n * one.most + w * worker.most
        parts = f"{who}; a learner {gib(one.states)} and at most {gib(one.most - one.states)} more"
        parts += f", a worker {gib(worker.most)}" if w else ""
        return [Place(name="memory", room=machine.host, certain=certain, most=most, who=parts)]
    found = [Place(name="memory of the host", room=machine.host, certain=on_host, most=on_host, who=who)]
    return found + list(_on_gpus(cfg, one, worker, machine))


def _on_gpus(cfg: Config, one: memory.Learner, worker: memory.Worker, machine: Machine) -> Iterator[Place]:
    room = min(machine.gpus)
    seats = machine.seats
    if seats is None:  # a cluster decides: each learner has a GPU, that much is known
        yield _place("each learner's GPU", room, 1, one, 0, worker, False)
        return
    for index, bundle in enumerate(seats.bundles):
        gpus = max(1, math.ceil(bundle.gpus))
        on_one = sum((seat.gpus if seat.gpus >= 1 else 1) / gpus for seat in seats.workers if seat.bundle == index)
        yield _place(f"GPU {index}", room, len(bundle.learners) / gpus, one, on_one, worker, cfg.rollout.sleep)


def _place(
    name: str, room: float, learners: float, one: memory.Learner, workers: float, worker: memory.Worker, sleeps: bool
) -> Place:
    certain = learners * (one.states + CUDA_CONTEXT) + workers * CUDA_CONTEXT
    more = learners * (one.activations + one.logits)
    taken = worker.weights if worker.share is None else max(worker.share * room, worker.most)
    who = " + ".join(
        f"{n:g} {what}{'s' * (n > 1)}, {gib(size)} each"
        for n, what, size in ((learners, "learner", one.states), (workers, "worker", taken))
        if n
    )
    # With rollout.sleep in turn: the worker frees what it has while the learner works.
    certain = max(certain, workers * taken) if sleeps else certain + workers * taken
    if worker.share is None:
        more += workers * (worker.cache + worker.scratch)
    return Place(name=name, room=room, certain=certain, most=certain + more, who=who)


def judge_fit(cfg: Config, shape: ModelShape, sharding: Sharding, machine: Machine) -> list[Finding]:
    """A FAIL where what is certain does not fit; a warning where the longest prompts and responses would not."""
    found = []
    for place in places(cfg, shape, sharding, machine):
        said = f"{place.name}: {gib(place.certain)} to {gib(place.most)} of {gib(place.room)} free ({place.who})"
        if place.most <= place.room:
            found.append(ok(said))
            continue
        certain = place.certain > place.room
        remedy = _remedy(cfg, shape, sharding, machine, certain)
        found.append((fail_of_config if certain else warn)(said, remedy))
    return sorted(found, key=lambda f: f.status == "ok")


def _changes(
    cfg: Config, sharding: Sharding, machine: Machine
) -> Iterator[tuple[str, dict[str, dict[str, Any]], Sharding]]:
    """What may be tried: in words, settings by section, sharding. The cheapest for the result first."""
    gpu = machine.device == "cuda"
    if cfg.data.max_prompt_tokens > 256:
        words = "--data.max_prompt_tokens 256 (if prompts are no longer)"
        yield words, {"data": {"max_prompt_tokens": 256}}, sharding
    micro = max(1, cfg.ppo.micro_batch_size // 8)
    if micro < cfg.ppo.micro_batch_size:
        yield f"--ppo.micro_batch_size {micro}", {"ppo": {"micro_batch_size": micro}}, sharding
    if not cfg.model.gradient_checkpointing:
        yield "--model.gradient_checkpointing", {"model": {"gradient_checkpointing": True}}, sharding
    if cfg.rollout.slots > 8 and cfg.rollout.engine == "transformers":
        yield "--rollout.slots 8", {"rollout": {"slots": 8}}, sharding
    if cfg.rollout.workers > 1 and not gpu:
        yield "--rollout.workers 1", {"rollout": {"workers": 1}}, sharding
    if gpu and cfg.reference == "copy":
        yield "--model.reference offload", {"model": {"reference": "offload"}}, sharding
    if cfg.model.value == "separate":
        yield "--model.value shared", {"model": {"value": "shared"}}, sharding
    if gpu and len(machine.gpus) > 1 and sharding.kind != "zero3":
        ranks = max(sharding.ranks, len(machine.gpus))
        yield f"--accelerate zero3 --num-processes {ranks}", {}, Sharding(kind="zero3", ranks=ranks)
    if not cfg.model.lora_rank:
        yield "--model.lora_rank 16", {"model": {"lora_rank": 16}}, sharding


def _remedy(cfg: Config, shape: ModelShape, sharding: Sharding, machine: Machine, certain: bool) -> str:
    """Changes that are enough each by itself; else as many together as it takes; each was tried."""

    def fits(cfg: Config, sharding: Sharding) -> bool:
        found = places(cfg, shape, sharding, machine)
        return all((place.certain if certain else place.most) <= place.room for place in found)

    alone, together, now, how = [], [], cfg, sharding
    for words, settings, other in _changes(cfg, sharding, machine):
        if fits(_with(cfg, settings), other):
            alone.append(words)
    if alone:
        return f"one of: {', '.join(alone)}"
    for words, settings, other in _changes(cfg, sharding, machine):
        now, how = _with(now, settings), other if other != sharding else how
        together.append(words)
        if fits(now, how):
            return f"together: {' '.join(together)}"
    return "a smaller model, or a machine with more: nothing that we know of is enough here"


def _with(cfg: Config, settings: Mapping[str, Mapping[str, Any]]) -> Config:
    """For the arithmetic alone: what the schema refuses together does not matter to it."""
    return cfg.model_copy(
        update={name: getattr(cfg, name).model_copy(update=dict(leaves)) for name, leaves in settings.items()}
    )


def look_at_config(situation: Situation) -> list[Finding]:
    """All that `--dry-run` asks."""
    from launch.plan import plan

    try:
        words = plan(situation.cfg, situation.sharding.ranks, situation.sharding)  # a UserError is a FAIL of this check
    except ProcessFault:
        return [warn("not looked at to the end: no Ray answers", "see the line of Ray")]
    of_model, *_, of_run = [" ".join(line.split()[1:]) for line in words.splitlines() if line[:5] in ("model", "run  ")]
    return [ok(f"{of_model}; {of_run}; --dry-run shows all of it")]


def look_at_fit(situation: Situation) -> list[Finding]:
    from launch import build, cluster

    cfg, sharding = situation.cfg, situation.sharding
    try:
        device = cluster.device(cfg)
        shape = build.model_shape(cfg.model.path)
        seats = placement.of_machine(cfg, device, sharding.ranks) if device == "cuda" else None
    except Fault:
        return [warn("not estimated", "see what the line above says of the configuration")]
    _, available = devices.memory_here()
    return judge_fit(cfg, shape, sharding, Machine(host=available, gpus=_gpus(device), seats=seats))


def _gpus(device: str) -> tuple[float, ...]:
    if device == "cpu":
        return ()
    import torch

    return tuple(float(torch.cuda.mem_get_info(i)[0]) for i in range(torch.cuda.device_count()))
