"""Who sits on which GPU: known tables, and what holds for every shape of cluster."""

import itertools
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import load
from core.faults import ProcessFault, UserError
from launch import placement, reservation
from launch.placement import Bundle, Plan, Seat, Wanted, plan, plan_beside_others

BARE = Wanted(
    learners=(),
    workers=0,
    gpus_of_worker=1,
    workers_apart=False,
    servers=0,
    servers_of_rank=1,
    gpus_of_server=0.0,
    servers_apart=False,
)


def wanted(learners: str = "", workers: int = 0, gpus: float | None = 1, **more: object) -> Wanted:
    """`learners`: a letter for the node of each."""
    return replace(BARE, learners=tuple(learners), workers=workers, gpus_of_worker=gpus, **more)


APART, REWARDS_APART = {"workers_apart": True}, {"servers_apart": True}


def rewards(servers: int, gpus: float, of_rank: int = 1) -> dict:
    return {"servers": servers, "gpus_of_server": gpus, "servers_of_rank": of_rank}


TABLES = {
    "one GPU for all": (wanted("a", 2, None), {"a": 1}, ["a: learner 0 + workers 0, 1 (0.5 each)"]),
    "a worker beside each learner": (
        wanted("aa", 2, 1),
        {"a": 4},
        ["a: learner 0 + worker 0 | learner 1 + worker 1"],
    ),
    "workers beside the learner that drives them": (
        wanted("ab", 5, None),
        {"a": 1, "b": 1},
        ["a: learner 0 + workers 0, 2, 4 (0.3333 each)", "b: learner 1 + workers 1, 3 (0.5 each)"],
    ),
    "fewer workers than learners": (
        wanted("aaa", 1, None),
        {"a": 3},
        ["a: learner 0 + worker 0 | learner 1 | learner 2"],
    ),
    "a share that leaves room": (
        wanted("a", 2, 0.25),
        {"a": 1},
        ["a: learner 0 + workers 0, 1 (0.25 each)"],
    ),
    "apart on one node": (wanted("aa", 2, 1, **APART), {"a": 4}, ["a: learner 0 | learner 1 | worker 0 | worker 1"]),
    "apart by shares": (
        wanted("a", 3, 0.5, **APART),
        {"a": 3},
        ["a: learner 0 | workers 0, 1 (0.5 each) | worker 2 (0.5)"],
    ),
    "apart, whole GPUs where there are enough": (
        wanted("a", 2, None, **APART),
        {"a": 4},
        ["a: learner 0 | worker 0 | worker 1"],
    ),
    "apart, equal shares where there are not": (
        wanted("a", 5, None, **APART),
        {"a": 3},
        ["a: learner 0 | workers 0, 1, 2 (0.3333 each) | workers 3, 4 (0.3333 each)"],
    ),
    "apart, first near the learners": (
        wanted("b", 2, 1, **APART),
        {"a": 4, "b": 2},
        ["b: learner 0 | worker 0", "a: worker 1"],
    ),
    "learners on one node, workers on another": (
        wanted("aa", 2, 1, **APART),
        {"a": 2, "b": 2},
        ["a: learner 0 | learner 1", "b: worker 0 | worker 1"],
    ),
    "a wide worker beside two learners": (
        wanted("aaaa", 1, 2),
        {"a": 4},
        ["a: learners 0, 1 + worker 0 (2) | learner 2 | learner 3"],
    ),
    "wide workers on a node each": (
        wanted("aabb", 2, 2),
        {"a": 2, "b": 2},
        ["a: learners 0, 1 + worker 0 (2)", "b: learners 2, 3 + worker 1 (2)"],
    ),
    "wide workers apart: the node that they fill": (
        wanted("a", 1, 4, **APART),
        {"a": 8, "b": 4},
        ["a: learner 0", "b: worker 0 (4)"],
    ),
    "reward models beside their learners": (
        wanted("aa", 2, None, **rewards(4, 0.25, of_rank=2)),
        {"a": 2},
        [
            "a: learner 0 + worker 0 (0.5) + reward servers 0, 1 (0.25 each) |"
            " learner 1 + worker 1 (0.5) + reward servers 2, 3 (0.25 each)"
        ],
    ),
    "reward models on a GPU of their own": (
        wanted("aa", 2, 1, **rewards(2, 0.5), **REWARDS_APART),
        {"a": 3},
        ["a: learner 0 + worker 0 | learner 1 + worker 1 | reward servers 0, 1 (0.5 each)"],
    ),
    "reward models share a GPU with workers apart": (
        wanted("a", 1, 0.5, **APART, **rewards(1, 0.5), **REWARDS_APART),
        {"a": 2},
        ["a: learner 0 | worker 0 (0.5) + reward server 0 (0.5)"],
    ),
    "equal shares of what reward models leave": (
        wanted("a", 3, None, **APART, **rewards(1, 0.5), **REWARDS_APART),
        {"a": 3},
        ["a: learner 0 | worker 0 (0.5) + reward server 0 (0.5) | workers 1, 2 (0.5 each)"],
    ),
    "a reward model on two GPUs": (
        wanted("a", 1, None, **rewards(1, 2), **REWARDS_APART),
        {"a": 2, "b": 2},
        ["a: learner 0 + worker 0", "b: reward server 0 (2)"],
    ),
    "learners on CPUs: rewards go where GPUs are": (
        wanted(**rewards(2, 0.5)),
        {"b": 1},
        ["b: reward servers 0, 1 (0.5 each)"],
    ),
    "nobody learns: an evaluation": (wanted("", 2, None), {"a": 4}, ["a: worker 0 | worker 1"]),
    "a piece of a GPU that somebody else has": (wanted(**rewards(1, 0.25)), {"a": 0.5}, ["a: reward server 0 (0.25)"]),
    "nothing": (wanted(), {}, []),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_was_worked_out_by_hand(name):
    what, nodes, lines = TABLES[name]
    made = plan(what, nodes)
    assert made.lines == lines
    holds(made, what, nodes)


def test_the_records_behind_a_line():
    made = plan(wanted("ab", 2, 0.5, **rewards(2, 0.25), **REWARDS_APART), {"a": 2, "b": 1})
    assert made == Plan(
        bundles=(Bundle("a", 1.0, (0,)), Bundle("b", 1.0, (1,)), Bundle("a", 0.5)),
        workers=(Seat(0, 0.5), Seat(1, 0.5)),
        servers=(Seat(2, 0.25), Seat(2, 0.25)),
    )


MISFITS = {
    "more workers than GPUs": (
        wanted("aa", 6, 1, **APART),
        {"a": 4},
        "rollout.workers = 6 of 1 GPU each, apart from 2 learners, 8 GPUs wanted in all: there is no room on 4 GPUs"
        " (a: 4); give rollout.workers <= 2 or rollout.gpus_per_worker <= 0.33",
    ),
    "no GPU but the learner's": (
        wanted("a", 2, None, **APART),
        {"a": 1},
        "rollout.workers = 2, apart from 1 learner, 2 GPUs wanted in all: there is no room on 1 GPU (a: 1); give"
        " rollout.placement: colocated",
    ),
    "whole workers beside too few learners": (
        wanted("a", 2, 1),
        {"a": 4},
        "rollout.workers = 2 of 1 GPU each, on the GPU of 1 learner: there is no room there; give rollout.workers <= 1"
        " or rollout.gpus_per_worker <= 0.5 or rollout.placement: apart",
    ),
    "GPUs enough, on no one node": (
        wanted("ab", 1, 2, **APART),
        {"a": 2, "b": 2},
        "rollout.workers = 1 of 2 GPUs each, apart from 2 learners, 4 GPUs wanted in all: there is no room on 4 GPUs"
        " (a: 2, b: 2); give fewer of all, or more GPUs",
    ),
    "a reward model where a worker has all": (
        wanted("a", 1, 1, **rewards(1, 0.5)),
        {"a": 2},
        "rollout.workers = 1 of 1 GPU each, on the GPU of 1 learner: there is no room there; give"
        " rollout.gpus_per_worker <= 0.5 or rollout.placement: apart or resources.reward_placement: apart",
    ),
    "reward models apart": (
        wanted("a", 1, 1, **rewards(2, 1, of_rank=2), **REWARDS_APART),
        {"a": 2},
        "resources.reward_gpus = 1 for 2 reward servers, apart from 1 learner, 3 GPUs wanted in all: there is no room"
        " on 2 GPUs (a: 2); give resources.reward_gpus <= 0.5",
    ),
    "more learners than GPUs": (
        wanted("aaa", 1, 1),
        {"a": 2},
        "3 learners of a GPU each, on the node that they were started on: there is no room on 2 GPUs (a: 2); start"
        " fewer, or give them more; learners on several machines want resources.ray_address",
    ),
    "a learner on a node without GPUs": (wanted("b", 1, 1), {"a": 2}, "1 learner of a GPU each, .*it was started on"),
    "no GPU at all": (wanted("", 2, None), {}, r"rollout.workers = 2, 1 GPUs wanted in all: .* 0 GPUs \(no node\)"),
    "shares that add up to more than one": (wanted("a", 3, 0.5), {"a": 1}, "rollout.workers = 3 of 0.5 GPU each"),
    "a hundred on one": (wanted("a", 101, None), {"a": 1}, "rollout.workers = 101, .*rollout.workers <= 100"),
    "many nodes are not all named": (
        wanted("", 99, 1),
        {f"n{i}": 1 for i in range(12)},
        r"there is no room on 12 GPUs \(n0: 1, .*n7: 1, 4 nodes more\); give rollout.workers <= 12 or"
        r" rollout.gpus_per_worker <= 0.11",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_one_line_with_the_numbers(name):
    what, nodes, words = MISFITS[name]
    with pytest.raises(UserError) as refused:
        plan(what, nodes)
    said = str(refused.value)
    assert "\n" not in said and (said == words or re.search(words, said)), said


SHAPES = st.builds(
    lambda learners, workers, gpus, apart, servers, gpus_of_server, servers_apart: (
        wanted("".join(learners), workers, gpus, workers_apart=apart, servers_apart=servers_apart)
        if not servers
        else wanted(
            "".join(learners),
            workers,
            gpus,
            workers_apart=apart,
            servers_apart=servers_apart,
            **rewards(servers * max(1, len(learners)), gpus_of_server, of_rank=servers),
        )
    ),
    st.lists(st.sampled_from("abc"), max_size=6),
    st.integers(0, 9),
    st.sampled_from([None, 0.01, 0.25, 0.3, 0.5, 0.7, 1, 2, 4]),
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from([0.1, 0.25, 0.5, 1, 2]),
    st.booleans(),
)
CLUSTERS = st.dictionaries(st.sampled_from("abcd"), st.sampled_from([1, 2, 3, 4, 8, 1.5]), max_size=4)


def holds(made: Plan, what: Wanted, nodes: dict[str, float]) -> None:
    """Everything that a plan promises, asked of it alone."""
    for node in {bundle.node for bundle in made.bundles}:
        assert sum(bundle.gpus for bundle in made.bundles if bundle.node == node) <= nodes[node] + 1e-6
    for index, bundle in enumerate(made.bundles):
        seats = [seat for seat in (*made.workers, *made.servers) if seat.bundle == index]
        assert sum(seat.gpus for seat in seats) <= bundle.gpus + 1e-6
        assert bundle.learners or abs(sum(seat.gpus for seat in seats) - bundle.gpus) < 1e-6, "reserved for nobody"
        assert all(seat.gpus >= 0.01 for seat in seats)
        assert bundle.gpus <= 1 or len(seats) == 1, "Ray would choose which GPU of several"
    ranks = [rank for bundle in made.bundles for rank in bundle.learners]
    assert sorted(ranks) == list(range(len(what.learners)))
    for bundle in made.bundles:
        assert {what.learners[rank] for rank in bundle.learners} <= {bundle.node}
        assert not bundle.learners or bundle.gpus == len(bundle.learners)
    assert len(made.workers) == what.workers and len(made.servers) == what.servers
    n = len(what.learners)
    for number, seat in enumerate(made.workers):
        beside = made.bundles[seat.bundle].learners
        assert bool(beside) == (bool(n) and not what.workers_apart)
        assert not beside or seat.gpus > 1 or beside == (number % n,)
        assert what.gpus_of_worker is None or seat.gpus == what.gpus_of_worker
    for number, seat in enumerate(made.servers):
        beside = made.bundles[seat.bundle].learners
        assert bool(beside) == (bool(n) and not what.servers_apart)
        assert not beside or number // what.servers_of_rank in beside
        assert seat.gpus == what.gpus_of_server


@settings(max_examples=400, deadline=None)
@given(SHAPES, CLUSTERS)
def test_a_plan_keeps_its_promises_and_a_remedy_is_one(what, nodes):
    try:
        holds(plan(what, nodes), what, nodes)
        return
    except UserError as error:
        said = str(error)
    changes = {
        r"rollout\.workers <= (\d+)": lambda n: {"workers": int(n)},
        r"rollout\.gpus_per_worker <= ([\d.]+)": lambda x: {"gpus_of_worker": float(x)},
        r"rollout\.placement: (\w+)": lambda where: {"workers_apart": where == "apart"},
        r"resources\.reward_gpus <= ([\d.]+)": lambda x: {"gpus_of_server": float(x)},
        r"resources\.reward_placement: (\w+)": lambda where: {"servers_apart": where == "apart"},
    }
    remedies = said.partition("; give ")[2]
    for pattern, change in changes.items():
        if found := re.search(pattern, remedies):
            changed = replace(what, **change(found[1]))
            assert changed != what
            holds(plan(changed, nodes), changed, nodes)


def could_be_packed(sizes: list[int], nodes: dict[str, int]) -> bool:
    """By trying every way."""
    for places in itertools.product(nodes, repeat=len(sizes)):
        used = {node: sum(s for s, p in zip(sizes, places, strict=True) if p == node) for node in nodes}
        if all(used[node] <= nodes[node] for node in nodes):
            return True
    return not sizes


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 6), min_size=1),
    st.integers(0, 4),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 3),
    st.sampled_from([1, 2]),
)
def test_room_is_found_wherever_there_is_some(nodes, workers, size, servers, gpus):
    what = wanted("", workers, size, **rewards(servers, gpus))
    fits = could_be_packed([size] * workers + [gpus] * servers, nodes)
    try:
        plan(what, nodes)
    except UserError:
        assert not fits
    else:
        assert fits


def test_what_others_hold_is_another_fault_than_what_is_not_there():
    what = wanted("a", 2, 1, **APART)
    with pytest.raises(ProcessFault) as held:
        plan_beside_others(what, {"a": 4}, {"a": 2}, "tokenppo-theirs-learners (2)")
    assert str(held.value) == (
        "rollout.workers = 2 of 1 GPU each, apart from 1 learner, 3 GPUs wanted in all: there would be room on 4 GPUs"
        " (a: 4), but only 2 are free (a: 2); Ray has given the others to tokenppo-theirs-learners (2): wait for their"
        " end, or ask for less"
    )
    with pytest.raises(UserError, match="there is no room on 2 GPUs"):
        plan_beside_others(what, {"a": 2}, {"a": 1}, "")
    assert plan_beside_others(what, {"a": 4}, {"a": 3}, "").lines == ["a: learner 0 | worker 0 | worker 1"]


def test_a_large_cluster_is_planned_at_once():
    nodes = {f"n{i}": 8 for i in range(128)}
    learners = tuple(node for node in list(nodes)[:64] for _ in range(8))
    what = replace(BARE, learners=learners, workers=512, workers_apart=True, **rewards(512, 0.25))
    assert len(plan(what, nodes).lines) == 128


def configured(**overrides: object):
    values = {"model.path": "m", "data.path": "p.jsonl", "rewards.a.fn": "r.py:f"}
    return load(None, values | {name.replace("__", "."): value for name, value in overrides.items()})


def test_what_the_configuration_wants():
    cfg = configured(rollout__workers=3, resources__reward_gpus=0.25, resources__reward_servers=2)
    assert Wanted.of(cfg, "cuda", ("a", "b"), 2) == wanted("ab", 3, None, **rewards(4, 0.25, of_rank=2))
    on_cpus = Wanted.of(cfg, "cpu", ("a", "b"), 2)
    assert on_cpus == wanted("", 0, None, **rewards(4, 0.25, of_rank=2)) and on_cpus.any
    assert not Wanted.of(configured(), "cpu", ("a",), 1).any
    vllm = configured(rollout__engine="vllm", rollout__tensor_parallel_size=2, rollout__placement="apart")
    assert Wanted.of(vllm, "cuda", ("a",), 1).gpus_of_worker == 2 and Wanted.of(vllm, "cuda", ("a",), 1).workers_apart
    half = configured(rollout__engine="vllm", rollout__gpus_per_worker=0.5)
    assert Wanted.of(half, "cuda", ("a",), 1).gpus_of_worker == 0.5


REFUSED = {
    "a share of several GPUs": (
        {"rollout__engine": "vllm", "rollout__tensor_parallel_size": 2, "rollout__gpus_per_worker": 0.5},
        "rollout.gpus_per_worker = 0.5: a model on 2 GPUs",
    ),
    "more than a GPU": (
        {"rollout__gpus_per_worker": 2},
        "rollout.gpus_per_worker = 2: must be less than or equal to 1",
    ),
    "nothing of a GPU": ({"rollout__gpus_per_worker": 0}, "rollout.gpus_per_worker = 0: must be greater"),
    "a GPU and a half": ({"resources__reward_gpus": 1.5}, "resources.reward_gpus = 1.5: is 0, or a share"),
    "a grain of a GPU": ({"resources__reward_gpus": 0.001}, "resources.reward_gpus = 0.001: is 0, or a share"),
    "rewards apart without a GPU": (
        {"resources__reward_placement": "apart"},
        "does nothing without resources.reward_gpus",
    ),
    "memory of a GPU that is not shared": (
        {"sync__transport": "cuda_ipc", "rollout__placement": "apart"},
        "sync.transport = cuda_ipc: .*rollout.placement is apart",
    ),
    "a place that is none": ({"rollout__placement": "beside"}, "rollout.placement = "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_be_refused_when_the_configuration_is_read(name):
    values, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        configured(**values)


def test_a_gpu_has_the_name_that_ray_gives_it(monkeypatch):
    for visible, names in (
        (None, ["0", "1"]),
        ("", ["0", "1"]),
        ("2,3", ["2", "3"]),
        ("GPU-a, GPU-b", ["GPU-a", "GPU-b"]),
    ):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [reservation.gpu_name(i) for i in range(2)] == names


def test_this_machine_is_planned_by_what_torch_sees(monkeypatch):
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(device_count=lambda: 4))
    vllm = {"rollout__engine": "vllm", "rollout__placement": "apart"}
    assert placement.of_machine(configured(**vllm), "cuda", 2).lines == [
        "this machine: learner 0 | learner 1 | worker 0 | worker 1"
    ]
    with pytest.raises(UserError, match=r"rollout.workers = 2 of 2 GPUs each.* 4 GPUs \(this machine: 4\)"):
        placement.of_machine(configured(**vllm, rollout__tensor_parallel_size=2), "cuda", 1)
    with pytest.raises(UserError, match="8 learners of a GPU each"):
        placement.of_machine(configured(), "cuda", 8)
    assert placement.of_machine(configured(), "cpu", 8) == Plan()
    joined = configured(**vllm, rollout__workers=64, resources__ray_address="127.0.0.1:1")
    assert placement.of_machine(joined, "cuda", 1) is None
