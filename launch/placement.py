"""Who sits on which GPU: learner ranks, rollout workers, reward servers. Arithmetic alone: no Ray, no torch.

    Wanted (configuration, ranks)  +  GPUs of each node   ->   Plan: bundles, and who sits in which
                                                                 |
                                           launch/reservation.py: placement groups of Ray

Legend: N learner ranks, W rollout workers, k GPUs of a worker whose model lies on several. A *bundle* is what Ray
reserves in one piece on one node: the GPU of a learner (k of them, where such a worker sits beside k learners), a GPU
or a share of one, or k GPUs. A *seat* is a bundle and how much of it. Learners have whole GPUs and claim nothing in
their bundles, since Ray does not know them: what is left there is for who sits beside them.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from core.faults import ProcessFault, UserError
from core.schema import Config

THIS_MACHINE = "this machine"
DIGITS = 4  # Ray counts ten-thousandths of a GPU
LEAST_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run wants of GPUs."""

    learners: tuple[str, ...]  # the node of each learner that has a GPU, by rank; () where they are on CPUs
    workers: int  # that have GPUs: 0 where they are on CPUs
    gpus_of_worker: float | None  # at most 1, or k; None: an equal share of the GPU it sits on
    workers_apart: bool
    servers: int  # reward servers of all ranks, those of rank 0 first; 0 where they have no GPU
    servers_of_rank: int
    gpus_of_server: float
    servers_apart: bool

    @classmethod
    def of(cls, cfg: Config, device: str, learners: tuple[str, ...], ranks: int) -> "Wanted":
        """`device`: cpu or cuda, where learners and workers compute. `learners`: the node of each rank that has a GPU
        to itself. `ranks`: learner processes, each with reward servers of its own."""
        rollout, resources = cfg.rollout, cfg.resources
        natural = rollout.tensor_parallel_size if rollout.engine == "vllm" else None
        on_gpus = device != "cpu"
        return cls(
            learners=learners if on_gpus else (),
            workers=rollout.workers if on_gpus else 0,
            gpus_of_worker=natural if rollout.gpus_per_worker is None else rollout.gpus_per_worker,
            workers_apart=rollout.placement == "apart",
            servers=ranks * resources.reward_servers if resources.reward_gpus else 0,
            servers_of_rank=resources.reward_servers,
            gpus_of_server=resources.reward_gpus,
            servers_apart=resources.reward_placement == "apart",
        )

    @property
    def any(self) -> bool:
        return bool(self.learners or self.workers or self.servers)

    @property
    def beside(self) -> tuple[bool, bool]:
        """Whether (workers, servers) sit beside learners; without learners on GPUs nobody can."""
        return bool(self.learners) and not self.workers_apart, bool(self.learners) and not self.servers_apart


@dataclass(frozen=True)
class Bundle:
    node: str
    gpus: float
    learners: tuple[int, ...] = ()  # ranks whose GPUs these are


@dataclass(frozen=True)
class Seat:
    bundle: int
    gpus: float


@dataclass(frozen=True)
class Plan:
    bundles: tuple[Bundle, ...] = ()  # those of learners first
    workers: tuple[Seat, ...] = ()  # by number
    servers: tuple[Seat, ...] = ()  # those of rank 0 first

    @property
    def lines(self) -> list[str]:
        """One line for each node: who sits together, with what share of a GPU; `|` is between bundles."""
        of_node: dict[str, list[str]] = {}
        for index, bundle in enumerate(self.bundles):
            words = [_named("learner", bundle.learners, 1)] if bundle.learners else []
            for kind, seats in (("worker", self.workers), ("reward server", self.servers)):
                here = [(number, seat.gpus) for number, seat in enumerate(seats) if seat.bundle == index]
                for share in sorted({gpus for _, gpus in here}, reverse=True):
                    words.append(_named(kind, tuple(number for number, gpus in here if gpus == share), share))
            of_node.setdefault(bundle.node, []).append(" + ".join(words))
        return [f"{node}: {' | '.join(parts)}" for node, parts in of_node.items()]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Rollout workers without GPUs, over the nodes of a cluster that the run has joined."""

    workers: int
    learners: tuple[str, ...]  # the node of each rank, which drives workers rank, rank + N, ...; () without learners
    apart: bool = False  # not on a learner's node

    def over(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """The node of each worker, by number; () where none of `nodes` may have one.

        No node has two workers more than another. Within that a worker sits on its learner's node, where it can.
        """
        load = {node: 0 for node in [*self.learners, *nodes] if node in nodes}
        if self.apart:
            load = {node: 0 for node in load if node not in self.learners}
        if not load:
            return ()
        homes = [self.learners[number % len(self.learners)] if self.learners else "" for number in range(self.workers)]
        fair, seats = self.workers // len(load), dict[int, str]()
        for number, home in enumerate(homes):
            if load.get(home, fair) < fair:
                seats[number] = home
                load[home] += 1
        for number, home in enumerate(homes):
            if number not in seats:
                seats[number] = min(load, key=lambda node: (load[node], node != home))
                load[seats[number]] += 1
        return tuple(seats[number] for number in range(self.workers))

    def lines(self, seats: Sequence[str], names: Mapping[str, str]) -> list[str]:
        """One for each node that has anybody: who sits there. `seats`: as `over` gives them. `names`: of nodes."""
        of_node: dict[str, list[str]] = {}
        for kind, nodes in (("learner", self.learners), ("worker", seats)):
            for node in dict.fromkeys(nodes):
                here = tuple(number for number, where in enumerate(nodes) if where == node)
                of_node.setdefault(node, []).append(_named(kind, here, 1))
        return [f"{names[node]}: {' + '.join(words)}" for node, words in of_node.items()]


class _NoRoom(Exception):
    """For `who`: learners, workers or servers."""

    def __init__(self, who: str) -> None:
        super().__init__(who)
        self.who = who


def plan(wanted: Wanted, nodes: Mapping[str, float]) -> Plan:
    """Give everybody a seat.

    Args:
        nodes: node -> GPUs that can be given out there, those of learners among them; may be broken numbers, where
            somebody else has a share.

    The widest are seated first, each where the fewest GPUs are left. That finds room whenever there is some, as long as
    of two sizes above 1 one divides the other.

    Raises UserError, with the numbers and with remedies that were tried, where there is no room.
    """
    try:
        return _Table(wanted, nodes).filled()
    except _NoRoom as full:
        raise UserError(_misfit(wanted, nodes, full.who)) from None


def plan_beside_others(wanted: Wanted, total: Mapping[str, float], free: Mapping[str, float], holders: str) -> Plan:
    """`plan` on a cluster that others use too. `holders`: in words, who has what is not free.

    Raises UserError where an empty cluster would have no room, ProcessFault where it is others who leave none.
    """
    try:
        return _Table(wanted, free).filled()
    except _NoRoom as full:
        plan(wanted, total)
        left = sum(free.values())
        raise ProcessFault(
            f"{_asked(wanted, full.who)}: there would be room on {_there(total)}, but only {_count(left)}"
            f" {'is' if left == 1 else 'are'} free ({_by_node(free)}); Ray has given the others to {holders}: wait for"
            " their end, or ask for less"
        ) from None


def of_machine(cfg: Config, device: str, learners: int) -> Plan | None:
    """The plan on this machine alone, from what torch sees; None where the run joins a cluster and will ask that.

    Raises UserError where there is no room.
    """
    if cfg.resources.ray_address is not None:
        return None
    wanted = Wanted.of(cfg, device, (THIS_MACHINE,) * learners, learners)
    if not wanted.any:
        return Plan()
    import torch

    return plan(wanted, {THIS_MACHINE: torch.cuda.device_count()})


@dataclass
class _Draft:
    """A bundle that is being filled."""

    node: str
    gpus: float  # that it has
    learners: tuple[int, ...] = ()
    taken: float = 0.0

    @property
    def room(self) -> float:
        return round(self.gpus - self.taken, DIGITS)

    def take(self, gpus: float) -> None:
        self.taken = round(self.taken + gpus, DIGITS)


@dataclass
class _Table:
    wanted: Wanted
    nodes: Mapping[str, float]
    of_learners: list[_Draft] = field(default_factory=list)
    of_rank: dict[int, _Draft] = field(default_factory=dict)
    others: list[_Draft] = field(default_factory=list)
    seats: dict[tuple[str, int], tuple[_Draft, float]] = field(default_factory=dict)

    def filled(self) -> Plan:
        wanted = self.wanted
        self._seat_learners()
        # What has a size of its own first, the larger before the smaller: few whole GPUs are left over so.
        beside_workers, beside_servers = wanted.beside
        if wanted.servers and beside_servers:
            self._seat_servers_beside()
        if wanted.workers and beside_workers:
            self._seat_workers_beside()
        size = wanted.gpus_of_worker
        apart = [("workers", size, i) for i in range(wanted.workers)] if not beside_workers and size else []
        if not beside_servers:
            apart += [("servers", wanted.gpus_of_server, i) for i in range(wanted.servers)]
        for who, gpus, number in sorted(apart, key=lambda seat: -seat[1]):
            self._seat_apart(who, number, gpus)
        if wanted.workers and not beside_workers and size is None:
            self._share_out()
        return self._plan()

    def _seat_learners(self) -> None:
        here = Counter(self.wanted.learners)
        if any(number > self.nodes.get(node, 0) for node, number in here.items()):
            raise _NoRoom("learners")
        for ranks in self._blocks():
            self.of_learners.append(_Draft(self.wanted.learners[ranks[0]], float(len(ranks)), ranks))
            self.of_rank |= dict.fromkeys(ranks, self.of_learners[-1])
        # Whoever sits apart is near a learner, as long as there is room.
        for node in [*here, *(node for node in self.nodes if node not in here)]:
            left = round(self.nodes[node] - here[node], DIGITS)
            self.others += [_Draft(node, 1.0) for _ in range(int(left))]
            if broken := round(left - int(left), DIGITS):
                self.others.append(_Draft(node, broken))

    def _blocks(self) -> Iterator[tuple[int, ...]]:
        """Ranks whose GPUs are one bundle: k of a node for each worker on k GPUs beside them, else one."""
        wanted = self.wanted
        size = wanted.gpus_of_worker or 1
        wide = wanted.workers if wanted.beside[0] and size > 1 else 0
        of_node: dict[str, list[int]] = {}
        for rank, node in enumerate(wanted.learners):
            of_node.setdefault(node, []).append(rank)
        for ranks in of_node.values():
            while wide and len(ranks) >= size:
                yield tuple(ranks[: int(size)])
                del ranks[: int(size)]
                wide -= 1
        yield from sorted((rank,) for ranks in of_node.values() for rank in ranks)

    def _seat(self, who: str, number: int, draft: _Draft, gpus: float) -> None:
        if gpus > draft.room:
            raise _NoRoom(who)
        draft.take(gpus)
        self.seats[who, number] = (draft, gpus)

    def _seat_servers_beside(self) -> None:
        for number in range(self.wanted.servers):
            draft = self.of_rank[number // self.wanted.servers_of_rank]
            self._seat("servers", number, draft, self.wanted.gpus_of_server)

    def _seat_workers_beside(self) -> None:
        """Worker i beside learner i mod N, which drives it; those on k GPUs in a block each."""
        wanted, size = self.wanted, self.wanted.gpus_of_worker
        if size is not None and size > 1:
            blocks = [draft for draft in self.of_learners if draft.gpus == size]
            if len(blocks) < wanted.workers:
                raise _NoRoom("workers")
            for number in range(wanted.workers):
                self._seat("workers", number, blocks[number], size)
            return
        of_rank = Counter(number % len(wanted.learners) for number in range(wanted.workers))
        shares = {rank: size or _down(self.of_rank[rank].room / n) for rank, n in of_rank.items()}
        if min(shares.values()) < LEAST_SHARE:
            raise _NoRoom("workers")
        for number in range(wanted.workers):
            rank = number % len(wanted.learners)
            self._seat("workers", number, self.of_rank[rank], shares[rank])

    def _seat_apart(self, who: str, number: int, gpus: float) -> None:
        if gpus <= 1:
            self._seat(who, number, next((d for d in self.others if d.room >= gpus), _Draft("", 0)), gpus)
            return
        whole = Counter(draft.node for draft in self.others if draft.gpus == draft.room == 1)
        nodes = [node for node in whole if whole[node] >= gpus]
        if not nodes:
            raise _NoRoom(who)
        node = min(nodes, key=lambda node: whole[node])  # the tightest: the others may have room for a wider one
        used = [draft for draft in self.others if draft.node == node and draft.gpus == draft.room == 1][: int(gpus)]
        self.others = [draft for draft in self.others if not any(draft is one for one in used)]
        wide = _Draft(node, float(gpus))
        self.others.append(wide)
        self._seat(who, number, wide, gpus)

    def _share_out(self) -> None:
        """The fewest workers on a GPU with which all find one; they have equal shares."""
        for on_one in range(1, int(1 / LEAST_SHARE) + 1):
            share = _down(1 / on_one)
            if sum(int(draft.room / share + 1e-9) for draft in self.others) >= self.wanted.workers:
                for number in range(self.wanted.workers):
                    self._seat_apart("workers", number, share)
                return
        raise _NoRoom("workers")

    def _plan(self) -> Plan:
        used = [draft for draft in self.others if draft.taken]
        bundles = tuple(Bundle(draft.node, draft.gpus, draft.learners) for draft in self.of_learners)
        bundles += tuple(Bundle(draft.node, draft.taken) for draft in used)  # no more of a GPU than is sat on
        index = {id(draft): i for i, draft in enumerate([*self.of_learners, *used])}

        def seats(who: str, n: int) -> tuple[Seat, ...]:
            return tuple(Seat(index[id(self.seats[who, i][0])], self.seats[who, i][1]) for i in range(n))

        return Plan(bundles, seats("workers", self.wanted.workers), seats("servers", self.wanted.servers))


def _misfit(wanted: Wanted, nodes: Mapping[str, float], who: str) -> str:
    if who == "learners":
        remedy = "start fewer, or give them more; learners on several machines want resources.ray_address"
    else:
        remedy = "give " + (" or ".join(_remedies(wanted, nodes)) or "fewer of all, or more GPUs")
    # Beside learners there are only theirs.
    beside = who != "learners" and wanted.beside[who == "servers"]
    return f"{_asked(wanted, who)}: there is no room {'there' if beside else f'on {_there(nodes)}'}; {remedy}"


def _asked(wanted: Wanted, who: str) -> str:
    """What is wanted, behind the key that there is no room for."""
    n = len(wanted.learners)
    learners = f"{n} learner{'s' * (n > 1)}"
    if who == "learners":
        return f"{learners} of a GPU each, on the node that {'they were' if n > 1 else 'it was'} started on"
    if who == "workers":
        gpus, beside = wanted.gpus_of_worker, wanted.beside[0]
        each = "" if gpus is None else f" of {_count(gpus)} GPU{'s' * (gpus > 1)} each"
        text = f"rollout.workers = {wanted.workers}{each}"
    else:
        beside = wanted.beside[1]
        servers = f"{wanted.servers} reward server{'s' * (wanted.servers > 1)}"
        text = f"resources.reward_gpus = {_count(wanted.gpus_of_server)} for {servers}"
    if beside:
        return f"{text}, on the GPU{'s' * (n > 1)} of {learners}"
    return text + f", apart from {learners}" * (n > 0) + f", {_least(wanted)} GPUs wanted in all"


def _least(wanted: Wanted) -> int:
    """GPUs that are wanted at least: of learners and of whoever sits apart from them."""
    sizes = [] if wanted.beside[0] else [(wanted.workers, wanted.gpus_of_worker or LEAST_SHARE)]
    sizes += [] if wanted.beside[1] else [(wanted.servers, wanted.gpus_of_server)]
    on_one = [(n, s if s > 1 else 1 / int(1 / s + 1e-9)) for n, s in sizes if n]
    return len(wanted.learners) + sum(math.ceil(n * size - 1e-9) for n, size in on_one)


def _remedies(wanted: Wanted, nodes: Mapping[str, float]) -> Iterator[str]:
    """Each a single change with which there is room."""

    def fits(**change: object) -> bool:
        try:
            _Table(replace(wanted, **change), nodes).filled()
        except _NoRoom:
            return False
        return True

    if wanted.workers:
        if fits(workers=1):
            yield f"rollout.workers <= {_largest(wanted.workers, lambda n: fits(workers=n))}"
        if (wanted.gpus_of_worker or 2) <= 1:
            shares = (_down(wanted.gpus_of_worker / n, 2) for n in range(2, 100))
            if share := next((s for s in shares if s >= LEAST_SHARE and fits(gpus_of_worker=s)), None):
                yield f"rollout.gpus_per_worker <= {share:g}"
        if wanted.learners and fits(workers_apart=not wanted.workers_apart):
            yield f"rollout.placement: {'colocated' if wanted.workers_apart else 'apart'}"
    if wanted.servers:
        shares = (_down(min(wanted.gpus_of_server, 1) / n, 2) for n in range(1, 100))
        smaller = (s for s in shares if LEAST_SHARE <= s < wanted.gpus_of_server)
        if share := next((s for s in smaller if fits(gpus_of_server=s)), None):
            yield f"resources.reward_gpus <= {share:g}"
        if wanted.learners and fits(servers_apart=not wanted.servers_apart):
            yield f"resources.reward_placement: {'colocated' if wanted.servers_apart else 'apart'}"


def _largest(too_many: int, fits: Callable[[int], bool]) -> int:
    """The largest number that fits, where 1 does and `too_many` does not."""
    low, high = 1, too_many
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _there(nodes: Mapping[str, float]) -> str:
    total = sum(nodes.values())
    return f"{_count(total)} GPU{'s' * (total != 1)} ({_by_node(nodes)})"


def _by_node(nodes: Mapping[str, float]) -> str:
    shown = [f"{node}: {_count(gpus)}" for node, gpus in list(nodes.items())[:8]]
    return ", ".join(shown + [f"{len(nodes) - 8} nodes more"] * (len(nodes) > 8)) or "no node"


def _named(kind: str, numbers: tuple[int, ...], share: float) -> str:
    many = len(numbers) > 1
    each = "" if share == 1 else f" ({_count(share)}{' each' * many})"
    return f"{kind}{'s' * many} {', '.join(map(str, numbers))}{each}"


def _count(number: float) -> str:
    return f"{round(number, DIGITS):g}"


def _down(share: float, digits: int = DIGITS) -> float:
    return math.floor(share * 10**digits + 1e-6) / 10**digits
