"""Who sits where, held in Ray: GPUs by two placement groups, which end with the driver that made them, killed or not;
rollout workers on CPUs, in a cluster that was joined, by the id of a node each.

    rank r   node and GPU that it computes on  ->  rank 0
    rank 0   nodes and what is free  ->  plan (launch/placement.py), or an error at once
             group of the learners: so their GPUs are nobody else's   ->  which GPU is which bundle?
             group of all who sit apart from them
    rank 0   Seats  ->  rank r, for Ray's options of its workers and reward servers

Learners are no actors, so Ray cannot be told which GPU a learner has: it gives out the lowest that are free, which are
the learners' where they come first. That it was so is looked at, not believed. What waits here waits for Ray to make a
group, READY_S at most; two runs that reach for the same GPU at the same time are both told so.
"""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.state import available_resources_per_node  # the public one adds up all nodes
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from core.faults import ProcessFault, UserError
from core.schema import Config
from launch.placement import Bundle, Plan, Spread, Wanted, plan_beside_others
from trainer.ranks import Ranks

READY_S = 60.0  # for a group that has room: milliseconds
STARTED_S = 60.0  # for the first process in each bundle, which says what GPU it has
FREED_S = 2.0  # until Ray has noticed the end of a run that ended a moment ago
ANSWER_S = 3.0  # of a raylet to a connection, which takes milliseconds; Ray calls a node alive for longer
NODE = "ray.io/node-id"  # a label that Ray gives each node


@dataclass(frozen=True)
class Held:
    """A bundle of a placement group."""

    group: PlacementGroup
    index: int
    node: str  # id
    place: str  # its name


@dataclass
class OnNodes:
    """Rollout workers on the CPUs of a cluster; nodes by their ids. Each rank has a copy, for its own workers."""

    spread: Spread
    names: dict[str, str]  # of each node that was there at the start
    planned: tuple[str, ...]  # the node of each worker
    now: dict[int, str] = field(default_factory=dict)  # of each worker that was started

    @property
    def lines(self) -> list[str]:
        return self.spread.lines(self.planned, self.names)

    def take(self, number: int) -> str | None:
        """The node that worker `number` is started on now: its own, or, where that is lost, one of those that are
        left. None: none of them may have it."""
        alive = _alive()
        left = _for_workers(alive)
        self.names |= _places(alive)
        if self.planned[number] in left and _answers(alive[self.planned[number]]):
            self.now[number] = self.planned[number]
            return self.now[number]
        while seats := self.spread.over(left):
            if _answers(alive[seats[number]]):
                self.now[number] = seats[number]
                return self.now[number]
            left.remove(seats[number])
        return None

    def moves(self, number: int) -> bool:
        """Whether worker `number`, which is not where it was planned since that node was lost, has found a node that
        joined and has no worker of this rank: it is planned there from now on."""
        if self.now.get(number) == self.planned[number]:
            return False
        alive = _alive()
        used = {*self.now.values(), *(self.spread.learners if self.spread.apart else ())}
        fresh = [node for node in _for_workers(alive) if node not in used and _answers(alive[node])]
        if fresh:
            self.names |= _places(alive)
            self.planned = (*self.planned[:number], fresh[0], *self.planned[number + 1 :])
        return bool(fresh)


@dataclass(frozen=True)
class Seats:
    """Ray's options for those who have a place of their own; of everybody else there are none. Ranks hand it to each
    other."""

    plan: Plan = Plan()
    held: tuple[Held, ...] = ()  # by the plan's number of the bundle
    servers_of_rank: int = 0
    ranks_on: tuple[str, ...] = ()  # id of the node of each learner process; () in a Ray of our own, which has one node
    on_nodes: OnNodes | None = None

    def worker(self, number: int) -> dict[str, Any] | None:
        """Of rollout worker `number`, also when it is started again. None: no node may have it, for now. Raises
        ProcessFault where the node of its GPU is gone."""
        if self.on_nodes is None:
            return self._seat(f"worker-{number}", self.plan.workers, number)
        node = self.on_nodes.take(number)
        return None if node is None else on_node(node)

    def server(self, rank: int, number: int) -> dict[str, Any]:
        """Of a reward server of `rank`, as `worker`; without a GPU of its own it is on the node of its learner."""
        if not self.plan.servers and self.ranks_on:
            return on_node(self.ranks_on[rank])
        return self._seat("the reward server", self.plan.servers, rank * self.servers_of_rank + number)

    def where(self, number: int) -> tuple[str, bool]:
        """In words, the node of a worker that was started, and whether that is out of reach. Where a run has one node,
        ("", False)."""
        if self.on_nodes is not None and number in self.on_nodes.now:
            node = self.on_nodes.now[number]
            name = self.on_nodes.names[node]
        elif self.plan.workers:
            held = self.held[self.plan.workers[number].bundle]
            node, name = held.node, held.place
        else:
            return "", False
        info = _alive().get(node)
        if info is None:
            return f"on node {name}, which Ray has lost", True
        if not _answers(info):
            return f"on node {name}, which does not answer", True
        return f"on node {name}", False

    def moves(self, number: int) -> bool:
        """See OnNodes; nobody with a GPU moves."""
        return self.on_nodes is not None and self.on_nodes.moves(number)

    def _seat(self, who: str, seats: tuple, number: int) -> dict[str, Any]:
        if not seats:
            return {}
        seat, held = seats[number], self.held[seats[number].bundle]
        if held.node not in _alive():
            raise ProcessFault(
                f"{who} has its GPU on node {held.place}, and Ray has lost that node; start the run again, it goes on"
                " from its last checkpoint"
            )
        return _options(held, seat.gpus)


NO_SEATS = Seats()  # on the CPUs of one machine


def seats_of_run(cfg: Config, ranks: Ranks, device: Any, note: Callable[[str], None]) -> Seats:
    """What every rank needs to start its actors; all ranks call it, in Ray. Rank 0 notes who sits where.

    `device`: torch's, of the learner.

    Raises:
        UserError: the plan does not fit on the cluster. ProcessFault: others hold what it wants, or were faster.
    """
    joined = cfg.resources.ray_address is not None
    if not joined and not Wanted.of(cfg, device.type, ("",) * ranks.size, ranks.size).any:
        return NO_SEATS
    here = ray.get_runtime_context().get_node_id()
    on_gpus = device.type != "cpu"
    of_ranks = ranks.gather((here, gpu_name(device.index or 0) if on_gpus else ""))
    with ranks.together():
        seats = None
        if ranks.is_main:
            ranks_on = tuple(node for node, _ in of_ranks) if joined else ()
            seats = reserve(cfg, device.type, of_ranks if on_gpus else [], ranks.size, ranks_on)
            for line in seats.plan.lines:
                note(f"GPUs of {line}")
            for line in seats.on_nodes.lines if seats.on_nodes else ():
                note(f"node {line}")
    return ranks.from_main(seats)


def gpu_name(index: int) -> str:
    """How Ray names the GPU that is `cuda:index` in this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index].strip() if visible else str(index)


def reserve(
    cfg: Config, device: str, learners: list[tuple[str, str]], ranks: int, ranks_on: tuple[str, ...] = ()
) -> Seats:
    """Plan and hold. `learners`: node id and name of the GPU of each learner, by rank; [] where none has one.
    `ranks_on`: node id of each learner process in a cluster that was joined. Raises as `seats_of_run`."""
    places = _places()
    ids = {place: node for node, place in places.items()}
    wanted = Wanted.of(cfg, device, tuple(places[node] for node, _ in learners), ranks)
    made = _plan(wanted, places)
    of_learners = [bundle for bundle in made.bundles if bundle.learners]
    others = [bundle for bundle in made.bundles if not bundle.learners]
    held: list[Held] = []
    for what, bundles in (("learners", of_learners), ("others", others)):
        if bundles:
            group = _hold(f"tokenppo-{cfg.run.name}-{what}", bundles, ids)
            held += [Held(group, i, ids[bundle.node], bundle.node) for i, bundle in enumerate(bundles)]
        if what == "learners":
            held = _in_order(held, of_learners, learners)
    on_nodes = _spread(cfg, ranks_on) if device == "cpu" and cfg.resources.ray_address is not None else None
    return Seats(made, tuple(held), wanted.servers_of_rank, ranks_on, on_nodes)


def _spread(cfg: Config, ranks_on: tuple[str, ...]) -> OnNodes:
    apart = cfg.rollout.placement == "apart"
    spread, alive = Spread(workers=cfg.rollout.workers, learners=ranks_on, apart=apart), _alive()
    names, planned = _places(alive), spread.over(_for_workers(alive))
    if not planned:
        raise UserError(
            f"rollout.placement = apart: the cluster has no node but the learners' ({', '.join(names.values())}) that"
            " gives Ray a CPU; start Ray on another one, or leave the key out"
        )
    return OnNodes(spread, names, planned)


def _plan(wanted: Wanted, places: dict[str, str]) -> Plan:
    """Tries for FREED_S, since Ray may not have heard yet of GPUs that were given back."""
    deadline = time.monotonic() + FREED_S
    while True:
        total, free = _gpus(places)
        try:
            return plan_beside_others(wanted, total, free, _holders(sum(total.values()) - sum(free.values())))
        except ProcessFault:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _hold(name: str, bundles: list[Bundle], ids: dict[str, str]) -> PlacementGroup:
    group = placement_group(
        [{"GPU": bundle.gpus} for bundle in bundles],
        bundle_label_selector=[{NODE: ids[bundle.node]} for bundle in bundles],
        name=name,
    )
    if not group.wait(READY_S):
        total, free = _gpus(_places())
        raise ProcessFault(
            f"Ray did not reserve {[bundle.gpus for bundle in bundles]} GPUs on"
            f" {', '.join(sorted({bundle.node for bundle in bundles}))} within {READY_S:g} s, though they were free:"
            f" somebody else was faster, or what is free is in pieces. Now {free} of {total} are free, Ray has given"
            f" the others to {_holders(sum(total.values()) - sum(free.values()))}"
        )
    return group


def _in_order(held: list[Held], bundles: list[Bundle], learners: list[tuple[str, str]]) -> list[Held]:
    """The bundles of learners by the GPU that each turned out to be. Raises UserError where Ray gave other GPUs."""

    def gpu_ids() -> list[str]:  # defined here, it travels by itself, and needs nothing of ours there
        import os

        import ray

        given, shown = [str(gpu).strip() for gpu in ray.get_gpu_ids()], os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if given and [gpu.strip() for gpu in shown.split(",")] != given:
            raise RuntimeError(f"Ray gave a process the GPUs {given} and shows it {shown!r} (CUDA_VISIBLE_DEVICES)")
        return given

    look = ray.remote(num_cpus=0, max_retries=0)(gpu_ids)
    asked = [look.options(**_options(h, b.gpus)).remote() for h, b in zip(held, bundles, strict=True)]
    try:
        of_bundle = ray.get(asked, timeout=STARTED_S)
    except (RayError, GetTimeoutError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ProcessFault(
            f"Ray did not say within {STARTED_S:g} s which GPUs it reserved for learners: {reason}"
        ) from None
    holder = {(h.node, gpu): h for h, gpus in zip(held, of_bundle, strict=True) for gpu in gpus}
    for rank, (node, gpu) in enumerate(learners):
        if (node, gpu) not in holder:
            given = sorted(name for where, name in holder if where == node)
            raise UserError(
                f"learner rank {rank} computes on GPU {gpu} of its node, and Ray, which gives out the lowest free ones"
                f" first, has only {', '.join(given)} for the learners there; start them on those, by"
                f" CUDA_VISIBLE_DEVICES={','.join(given)}, or end what holds GPU {gpu} in Ray"
            )
    if any(len(bundle.learners) > 1 for bundle in bundles):  # nobody sits on single ones; wide ones are all alike
        return held
    return [holder[learners[bundle.learners[0]]] for bundle in bundles]


def _options(held: Held, gpus: float) -> dict[str, Any]:
    place = PlacementGroupSchedulingStrategy(held.group, placement_group_bundle_index=held.index)
    return {"num_gpus": gpus, "scheduling_strategy": place}


def on_node(node: str) -> dict[str, Any]:
    """Ray's options for whoever must be on the node with that id. What is started on one that Ray has lost is an
    ActorUnschedulableError to whoever waits for it."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def _for_workers(alive: dict[str, Any]) -> list[str]:
    """Ids of the nodes that rollout workers on CPUs may be on, by address: those that give Ray a CPU (the head of a
    cluster often gives it none, to have no work), or, where none does, all."""
    places = _places(alive)
    nodes = sorted(alive, key=lambda node: places[node])
    return [node for node in nodes if alive[node]["Resources"].get("CPU")] or nodes


def _answers(info: dict[str, Any]) -> bool:
    """Whether a node's raylet takes a connection. Ray calls a node alive for a minute after its cable was cut."""
    try:
        socket.create_connection((info["NodeManagerAddress"], info["NodeManagerPort"]), timeout=ANSWER_S).close()
    except OSError:
        return False
    return True


def _alive() -> dict[str, Any]:
    """Node id -> what Ray says of it."""
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _places(alive: dict[str, Any] | None = None) -> dict[str, str]:
    """Id of each node, of all or of those -> its address, with the id where several have one address."""
    alive = _alive() if alive is None else alive
    addresses = {node: info["NodeManagerAddress"] for node, info in alive.items()}
    alone = len(set(addresses.values())) == len(addresses)
    return {node: address if alone else f"{address} ({node[:8]})" for node, address in addresses.items()}


def _gpus(places: dict[str, str]) -> tuple[dict[str, float], dict[str, float]]:
    """Place -> GPUs of the node, and those that nobody has reserved, for nodes that have GPUs."""
    free, alive = available_resources_per_node(), _alive()
    total = {place: alive[node]["Resources"].get("GPU", 0.0) for node, place in places.items() if node in alive}
    left = {place: free.get(node, {}).get("GPU", 0.0) for node, place in places.items()}
    return {p: n for p, n in total.items() if n}, {p: left[p] for p, n in total.items() if n}


def _holders(taken: float) -> str:
    """In words, who has so many GPUs of the cluster: groups by name, the rest is of actors and tasks."""
    groups = []
    for group in placement_group_table().values():
        gpus = sum(bundle.get("GPU", 0.0) for bundle in group["bundles"].values())
        if gpus and group["state"] == "CREATED":
            groups.append(f"{group['name'] or 'a placement group without a name'} ({gpus:g})")
            taken -= gpus
    rest = [f"actors and tasks outside of placement groups ({taken:g})"] if taken > 1e-4 else []
    return ", ".join([*groups, *rest]) or "nobody"
