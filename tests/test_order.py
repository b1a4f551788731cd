"""The order of prompts: shares of datasets and classes, curriculum, rows left out; known answers, then properties."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.order import BLOCK, Group, Order, make_groups


def shares(groups: list[Group]) -> list[float]:
    return [group.share for group in groups]


def mixture(*sizes_and_weights: tuple[int, float], seed: int = 0, **options) -> Order:
    source_of = [g for g, (n, _) in enumerate(sizes_and_weights) for _ in range(n)]
    groups = make_groups(source_of, [w for _, w in sizes_and_weights], None, 1.0)
    return Order(groups, seed=seed, shuffle=True, **options)


def test_an_epoch_of_one_file_is_the_permutation_of_seed_and_epoch():
    """numpy.random.default_rng([3, 5]).permutation(8), written down: runs that were begun must be gone on with."""
    order = Order.of_all(8, seed=3, shuffle=True)
    assert [order.row_at(5 * 8 + i) for i in range(8)] == [4, 0, 2, 6, 5, 1, 3, 7]


def test_shares_by_hand():
    """8 of a, 2 of b: n^0.5 is 2.83 and 1.41. Then two datasets, 3 : 1, of which the first is balanced in itself."""
    of_one = [0] * 10
    classes = ["a"] * 8 + ["b"] * 2
    assert shares(make_groups(of_one, [7.0], classes, 0.5)) == pytest.approx([2 / 3, 1 / 3])
    assert shares(make_groups(of_one, [7.0], classes, 1.0)) == pytest.approx([0.5, 0.5])
    assert shares(make_groups(of_one, [7.0], classes, 0.0)) == [1.0]
    assert shares(make_groups(of_one, [7.0], None, 1.0)) == [1.0]
    two = make_groups([0] * 5 + [1] * 3, [3.0, 1.0], ["a", "a", "a", "a", "b", "a", "a", "a"], 1.0)
    assert shares(two) == pytest.approx([0.375, 0.375, 0.25])
    assert [group.rows.tolist() for group in two] == [[0, 1, 2, 3], [4], [5, 6, 7]]


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (0.999, 0.0005, 0.0005), (1 / 3, 1 / 3, 1 / 3)])
def test_each_dataset_gets_its_share_of_every_block_and_of_ten_thousand_prompts(weights):
    order = mixture(*((n, w) for n, w in zip((50, 7, 3), weights, strict=True)), seed=4)
    source = np.digitize([order.row_at(i) for i in range(10_000)], [50, 57])
    for g, weight in enumerate(weights):
        assert abs(np.mean(source == g) - weight) < 0.001  # asked for: 0.01
        of_blocks = [np.sum(source[b : b + BLOCK] == g) for b in range(0, 10_000 - BLOCK, BLOCK)]
        assert set(of_blocks) <= {int(BLOCK * weight), int(BLOCK * weight) + 1}


def test_within_a_block_the_order_is_random():
    """64 of each in every block; chi-square of group against place, 127 degrees of freedom: 99.9 % lie below 182."""
    order = mixture((5, 1.0), (5, 1.0), seed=1)
    first = np.array([[order.row_at(b * BLOCK + i) < 5 for i in range(BLOCK)] for b in range(400)])
    expected = 200.0
    statistic = float((((first.sum(axis=0) - expected) ** 2) / (expected / 2)).sum())
    assert 80 < statistic < 182  # far below would be as suspicious: a fixed pattern has 0


def test_balance_by_chi_square():
    """Known class frequencies 900 : 90 : 10, tempered to n^0.5: 0.700, 0.221, 0.074 by hand; 2 degrees of freedom."""
    classes = ["a"] * 900 + ["b"] * 90 + ["c"] * 10
    order = Order(make_groups([0] * 1000, [1.0], classes, 0.5), seed=0, shuffle=True)
    drawn = Counter(classes[order.row_at(i)] for i in range(20_000))
    p = {"a": 30.0 / 42.6491106, "b": 9.4868330 / 42.6491106, "c": 3.1622777 / 42.6491106}
    statistic = sum((drawn[c] - 20_000 * p[c]) ** 2 / (20_000 * p[c]) for c in p)
    assert statistic < 5.99
    natural = sum((drawn[c] - 20_000 * q) ** 2 / (20_000 * q) for c, q in {"a": 0.9, "b": 0.09, "c": 0.01}.items())
    assert natural > 1000  # the statistic does tell them apart


def test_within_a_class_each_row_is_seen_equally_often():
    classes = ["a"] * 40 + ["b"] * 3
    order = Order(make_groups([0] * 43, [1.0], classes, 1.0), seed=0, shuffle=True)
    drawn = Counter(order.row_at(i) for i in range(2400))
    assert {drawn[row] for row in range(40)} <= {29, 30, 31} and {drawn[row] for row in range(40, 43)} <= {
        399,
        400,
        401,
    }


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.floats(0.01, 5)), min_size=1, max_size=4),
    seed=st.integers(0, 9),
    jumps=st.lists(st.integers(0, 3000), min_size=1, max_size=8),
)
def test_a_jump_finds_what_counting_from_the_start_finds(sizes, seed, jumps):
    """The count of a group before an ordinal, in any order of asking; and `drawn` is that count."""
    whole, source = [], mixture(*sizes, seed=seed)
    group_of = {int(row): g for g, group in enumerate(source.groups) for row in group.rows}
    whole = [source.row_at(i) for i in range(max(jumps) + 1)]
    asked = mixture(*sizes, seed=seed)
    for i in jumps:
        assert asked.row_at(i) == whole[i]
        for g in range(len(sizes)):
            assert asked.drawn(g, i) == sum(group_of[row] == g for row in whole[:i])
    for g, group in enumerate(source.groups):  # epochs of a dataset: every row once
        draws = [row for row in whole if group_of[row] == g]
        n = len(group.rows)
        for start in range(0, len(draws) - n + 1, n):
            assert sorted(draws[start : start + n]) == group.rows.tolist()


def test_a_curriculum_goes_from_easy_to_hard_and_ends():
    difficulty = [float(i % 5) for i in range(50)]
    order = Order([Group(np.arange(50), 1.0)], seed=2, shuffle=True, difficulty=difficulty, curriculum_epochs=3)
    plain = Order.of_all(50, seed=2, shuffle=True)
    epochs = [[order.row_at(e * 50 + i) for i in range(50)] for e in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert [difficulty[row] for row in epochs[0]] == sorted(difficulty)
    assert epochs[0][:10] != sorted(epochs[0][:10])  # equally hard ones come in any order
    trend = [np.corrcoef(np.arange(50), [difficulty[row] for row in epoch])[0, 1] for epoch in epochs]
    assert trend[0] > 0.95 > trend[1] > trend[2] > 0.3 > abs(trend[3])
    assert epochs[3] == [plain.row_at(150 + i) for i in range(50)]


def measured_order(n: int = 40, **options) -> Order:
    return Order([Group(np.arange(n), 1.0)], seed=2, shuffle=True, measures=True, **options)


def test_measured_difficulties_order_the_epochs_after_the_first():
    """Row i is found i hard: random, then strictly by it, then more loosely, then random again."""
    order, plain = measured_order(curriculum_epochs=2), Order.of_all(40, seed=2, shuffle=True)
    assert [order.row_at(i) for i in range(40)] == [plain.row_at(i) for i in range(40)]
    for row in range(40):
        order.measure(row, float(row))
    assert [order.row_at(i) for i in range(40, 80)] == list(range(40))
    third = [order.row_at(i) for i in range(80, 120)]
    assert 0.3 < np.corrcoef(np.arange(40), third)[0, 1] < 0.95
    assert [order.row_at(i) for i in range(120, 160)] == [plain.row_at(i) for i in range(120, 160)]


def test_what_is_found_in_an_epoch_counts_from_the_next_that_nobody_has_begun():
    order = measured_order(curriculum_epochs=9)
    for row in range(40):
        order.measure(row, float(row))
    begun = order.row_at(40)
    for row in range(40):
        order.measure(row, float(-row))
    assert begun == 0 and [order.row_at(i) for i in range(40, 80)] == list(range(40))
    loose = [order.row_at(i) for i in range(80, 120)]
    assert np.corrcoef(np.arange(40), loose)[0, 1] < -0.5
    again = measured_order(curriculum_epochs=9)
    again.measured = json.loads(json.dumps(order.measured))
    assert [again.row_at(i) for i in range(40, 120)] == [*range(40), *loose]  # also the one that is under way


def test_a_column_orders_the_first_epoch_and_a_row_nobody_answered_lies_in_the_middle():
    order = measured_order(n=5, difficulty=[4.0, 3.0, 2.0, 1.0, 0.0], curriculum_epochs=1)
    assert [order.row_at(i) for i in range(5)] == [4, 3, 2, 1, 0]
    for row, difficulty in ((0, 2.0), (1, -1.0), (3, 1.0), (4, -2.0)):
        order.measure(row, difficulty)
    assert [order.row_at(i) for i in range(5, 10)] == [4, 1, 2, 3, 0]


def test_a_row_left_out_is_missing_from_the_epochs_that_had_not_begun():
    """4 rows; after 6 prompts epoch 1 has begun, so row 2 goes from epoch 2 on: lengths 4, 4, 3, 3."""
    order = Order.of_all(4, seed=0, shuffle=True)
    before = [order.row_at(i) for i in range(20)]
    order.leave_out([2], position=6)
    after = [order.row_at(i) for i in range(20)]
    assert order.left_out == {2: 2} and after[:8] == before[:8]
    assert sorted(after[8:11]) == sorted(after[11:14]) == [0, 1, 3]
    order.leave_out([2], position=14)  # a second time changes nothing
    assert order.left_out == {2: 2}
    order.leave_out([0, 3, 1], position=9)
    assert [order.row_at(i) for i in range(11)] == after[:11]
    assert sorted(order.row_at(i) for i in range(11, 15)) == [0, 1, 2, 3]  # none is left: all are back


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_what_was_left_out_is_the_whole_state(data):
    """At any position another process with the recorded rows left out continues with the same rows."""
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 6), st.floats(0.2, 2)), min_size=1, max_size=3))
    one, position = mixture(*sizes), 0
    for _ in range(data.draw(st.integers(1, 8))):
        taken = [one.row_at(i) for i in range(position, position + data.draw(st.integers(1, 9)))]
        seen = [one.row_at(i) for i in range(position + len(taken))]
        position += len(taken)
        one.leave_out(data.draw(st.sets(st.sampled_from(taken))), position)
        assert [one.row_at(i) for i in range(position)] == seen  # the past does not change
        other = mixture(*sizes)
        other.left_out = one.left_out
        ahead = data.draw(st.permutations(range(position, position + 30)))
        assert {i: other.row_at(i) for i in ahead} == {i: one.row_at(i) for i in range(position, position + 30)}


def test_a_far_position_is_found_without_counting_one_by_one():
    order = mixture((1000, 2.0), (10, 1.0))
    assert abs(order.drawn(0, 3_000_000) - 2_000_000) <= 2 + 3_000_000 // BLOCK * 1e-3
    assert 0 <= order.row_at(3_000_000) < 1010
