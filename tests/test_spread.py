"""Rollout workers without GPUs over the nodes of a cluster: who sits where, worked by hand, and what always holds."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import load
from core.faults import UserError
from launch import cluster
from launch.placement import Spread

NODES = tuple("abcdef")


@pytest.mark.parametrize(
    ("workers", "learners", "apart", "nodes", "seats"),
    [
        (2, "a", False, "ab", "ab"),
        (3, "a", False, "ab", "aba"),
        (1, "a", False, "ba", "a"),  # the learner's node before an emptier name
        (4, "b", False, "ab", "bbaa"),
        (4, "aabb", False, "ab", "aabb"),  # worker i beside learner i, not in turn
        (3, "aab", False, "abc", "acb"),  # worker 1 has no room beside its learner, which is that of worker 0
        (2, "a", True, "ab", "bb"),
        (3, "a", True, "abc", "bcb"),
        (2, "ab", True, "ab", ""),  # nowhere
        (2, "", False, "ab", "ab"),  # an evaluation
        (2, "a", False, "a", "aa"),  # the other node is lost
        (2, "a", False, "bc", "bc"),  # the learner's node has no CPU to give
    ],
)
def test_seats_by_hand(workers, learners, apart, nodes, seats):
    assert Spread(workers=workers, learners=tuple(learners), apart=apart).over(nodes) == tuple(seats)


@given(
    workers=st.integers(1, 12),
    learners=st.lists(st.sampled_from(NODES[:4]), max_size=5),
    nodes=st.lists(st.sampled_from(NODES), min_size=1, unique=True),
    apart=st.booleans(),
)
def test_no_node_has_two_workers_more_than_another(workers, learners, nodes, apart):
    seats = Spread(workers=workers, learners=tuple(learners), apart=apart).over(nodes)
    allowed = set(nodes) - (set(learners) if apart else set())
    assert (len(seats) == workers and set(seats) <= allowed) if allowed else seats == ()
    if seats:
        load = Counter(dict.fromkeys(allowed, 0)) + Counter(seats)
        assert max(load[node] for node in allowed) - min(load[node] for node in allowed) <= 1
        assert seats == Spread(workers=workers, learners=tuple(learners), apart=apart).over(list(reversed(nodes))) or (
            set(nodes) - set(learners)  # only those without a learner are told apart by their place in the list
        )


def test_a_line_for_each_node_says_who_is_there():
    spread = Spread(workers=5, learners=("a", "b"))
    names = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"}
    assert spread.lines(spread.over("abc"), names) == [
        "10.0.0.1: learner 0 + workers 0, 4",
        "10.0.0.2: learner 1 + workers 1, 3",
        "10.0.0.3: worker 2",
    ]


def test_apart_on_cpus_is_for_a_cluster(tmp_path):
    values = {"model.path": "m", "data.path": "p.jsonl", "rewards.r.fn": "m:f", "rollout.placement": "apart"}
    values |= {"resources.device": "cpu"}
    with pytest.raises(UserError, match="rollout.placement = apart: does nothing on a CPU of one machine"):
        cluster.device(load(None, values))
    assert cluster.device(load(None, values | {"resources.ray_address": "10.0.0.1:6379"})) == "cpu"
