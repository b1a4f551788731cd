"""Raw component rewards -> token rewards, worked by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.combine import Combined, RunningMoments, attribution, combine, next_multipliers, total_std, weights_at
from core.config import from_tree
from core.faults import UserError
from core.schema import RewardConfig

MASK = torch.tensor([[True, True, True], [True, True, False]])
A = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 99.0]], dtype=torch.float64)  # 99 is masked
B = torch.tensor([[0.0, 0.0, -1.0], [0.0, 5.0, 99.0]], dtype=torch.float64)


def spec(**values: object) -> RewardConfig:
    return RewardConfig(fn="f.py:f", **values)


def run(components: dict[str, RewardConfig], running=None, applies=None):
    raw = {"a": A, "b": B}
    applies = {name: MASK for name in raw} | (applies or {})
    running = {} if running is None else running
    return combine(
        {n: raw[n] for n in components},
        {n: applies[n] for n in components},
        MASK,
        components,
        running,
    )


def test_weighted_sum_by_hand():
    got = run({"a": spec(weight=0.5), "b": spec(weight=-2)})
    assert got.token_rewards.tolist() == [[0.5, 1.0, 3.5], [2.0, -10.0, 0.0]]
    assert got.weighted["b"].tolist() == [[0.0, 0.0, 2.0], [0.0, -10.0, 0.0]]
    assert got.token_rewards.dtype == torch.float32


def test_a_component_of_weight_0_is_as_if_absent():
    assert torch.equal(run({"a": spec(), "b": spec(weight=0)}).token_rewards, run({"a": spec()}).token_rewards)


def test_batch_normalisation_divides_by_the_unbiased_deviation_and_moves_no_mean():
    # valid values of a: 1 2 3 4 0: mean 2, squares 10, unbiased variance 10 / 4, deviation 1.5811
    got = run({"a": spec(normalize="batch")}).token_rewards
    want = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]) / 2.5**0.5
    torch.testing.assert_close(got, want)
    assert (got >= 0).all()  # rewards that were bonuses stay bonuses


def test_running_normalisation_is_the_deviation_of_everything_so_far():
    running: dict[str, RunningMoments] = {}
    for _ in range(2):
        got = run({"a": spec(normalize="running")}, running).token_rewards
    # ten values, 1 2 3 4 0 twice: squares 20 over 9
    torch.testing.assert_close(got, torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]) / (20 / 9) ** 0.5)
    assert (running["a"].count, running["a"].mean) == (10, 2)


def test_moments_merge_as_if_they_came_at_once():
    values = torch.randn(50, dtype=torch.float64) * 3 + 100
    moments = RunningMoments()
    for part in values.split([1, 20, 29]):
        moments.merge(len(part), float(part.mean()), float((part - part.mean()).square().sum()))
    assert moments.std == pytest.approx(float(values.std()), rel=1e-12)


def test_clip_comes_after_the_normaliser_and_before_the_weight():
    got = run({"a": spec(normalize="batch", clip=1.5, weight=2)}).token_rewards
    scale = 2.5**-0.5
    torch.testing.assert_close(got, torch.tensor([[2 * scale, 4 * scale, 3.0], [3.0, 0.0, 0.0]]))


def test_a_component_that_does_not_apply_counts_for_nothing():
    only_second = torch.tensor([[False] * 3, [True] * 3])
    got = run({"a": spec(normalize="batch")}, applies={"a": only_second}).token_rewards
    # its deviation is that of 4 and 0 alone: squares 8 over 1
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]]) / 8**0.5)


def test_constant_rewards_are_not_divided_by_zero():
    ones = torch.ones_like(A)
    got = combine({"a": ones}, {"a": MASK}, MASK, {"a": spec(normalize="batch")}, {})
    assert torch.equal(got.token_rewards, MASK.float())


def test_nan_at_a_masked_position_reaches_nothing():
    raw = A.clone()
    raw[1, 2] = torch.nan
    got = combine({"a": raw}, {"a": MASK}, MASK, {"a": spec(normalize="batch")}, {})
    assert torch.isfinite(got.token_rewards).all()


def test_moments_over_two_ranks_are_those_of_the_union():
    whole = run({"a": spec(normalize="batch")}).token_rewards
    sums: list[list[torch.Tensor]] = [[], []]
    # Three passes: each lets a rank see what the other contributed to one more collective.
    for _ in range(3):
        seen = [list(s) for s in sums]
        halves = []
        for rank in range(2):
            calls = iter(seen[1 - rank])
            fresh: list[torch.Tensor] = []

            def reduce(x, calls=calls, fresh=fresh):
                fresh.append(x)
                return x + next(calls, torch.zeros_like(x))

            rows = slice(rank, rank + 1)
            one = {"a": spec(normalize="batch")}
            halves.append(combine({"a": A[rows]}, {"a": MASK[rows]}, MASK[rows], one, {}, all_reduce=reduce))
            sums[rank] = fresh
    torch.testing.assert_close(torch.cat([h.token_rewards for h in halves]), whole)


def test_other_components_than_configured_are_refused():
    with pytest.raises(ValueError, match="scored"):
        combine({"x": A}, {"x": MASK}, MASK, {"a": spec()}, {})


SCHEDULE = {0: 1.0, 100: 0.5, 300: 0.0}


@pytest.mark.parametrize(("step", "weight"), [(0, 1), (1, 0.995), (50, 0.75), (200, 0.25), (300, 0), (999, 0)])
def test_a_schedule_is_straight_between_its_points(step, weight):
    assert spec(weight=SCHEDULE).weight_at(step) == pytest.approx(weight, abs=1e-15)


def test_a_schedule_that_begins_late_holds_its_first_weight_until_then():
    assert [spec(weight={5: 2.0, 7: 4.0}).weight_at(step) for step in (1, 5, 6, 7, 8)] == [2, 2, 3, 4, 4]


def test_the_weights_of_a_step_are_what_the_sum_is_made_with():
    components = {"a": spec(weight={0: 0.0, 10: 1.0}), "b": spec(weight=-2)}
    weights = weights_at(5, components, {})
    got = combine({"a": A, "b": B}, {"a": MASK, "b": MASK}, MASK, components, {}, weights=weights)
    assert weights == {"a": 0.5, "b": -2}
    assert got.token_rewards.tolist() == [[0.5, 1.0, 3.5], [2.0, -10.0, 0.0]]
    assert got.normalized["a"].tolist() == [[1, 2, 3], [4, 0, 0]]


def test_a_multiplier_rises_while_its_constraint_is_broken_and_falls_to_0_while_it_is_kept():
    components = {"fun": spec(), "safe": spec(weight=0.1, at_least=2.0, multiplier_lr=0.5)}
    multipliers: dict[str, float] = {}
    seen = []
    for mean in (1.0, 1.5, 2.0, 3.0, 3.0, 0.0):
        seen.append(weights_at(1, components, multipliers)["safe"])
        multipliers = next_multipliers({"fun": 9.0, "safe": mean}, components, multipliers)
    # 0.1 + 0.5 * (2 - 1), + 0.25, + 0, - 0.5, - 0.5 stops at 0, + 1
    assert seen == pytest.approx([0.1, 0.6, 0.85, 0.85, 0.35, 0.0]) and multipliers == {"safe": 1.0}


def test_a_multiplier_without_a_mean_stays():
    components = {"safe": spec(at_least=2.0)}
    assert next_multipliers({}, components, {"safe": 0.3}) == {"safe": 0.3}


def test_the_dual_finds_the_constrained_optimum():
    """max x(2 - x) s.t. x >= 1.5 by a policy that is best for each Lagrangian: x = 1 + w/2; the multiplier is 1."""
    components = {"safe": spec(weight=0.0, at_least=1.5, multiplier_lr=0.2)}
    multipliers: dict[str, float] = {}
    for _ in range(200):
        x = 1 + weights_at(1, components, multipliers)["safe"] / 2
        multipliers = next_multipliers({"safe": x}, components, multipliers)
    assert multipliers["safe"] == pytest.approx(1.0, abs=1e-6) and x == pytest.approx(1.5, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"weight": {}}, "rewards.a.weight = {}: a schedule has at least one step"),
        ({"weight": {-1: 1.0}}, "none below 0"),
        ({"weight": {0: 1.0}, "at_least": 1}, "at_least wants one number"),
        ({"weight": -1, "at_least": 1}, "at_least wants one number"),
        ({"weight": {0: 0.0, 9: 0.0}}, "weight 0"),
    ],
)
def test_weights_that_mean_nothing_are_refused(values, says):
    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "rewards": {"a": {"fn": "f.py:f"} | values}}
    with pytest.raises(UserError) as error:
        from_tree(tree)
    assert says in str(error.value)


def test_attribution_by_hand():
    # sums of responses: a 1 2 6, b 3 0 0; total 4 2 6; lengths 1 2 3
    weighted = {"a": torch.tensor([[1.0], [2.0], [6.0]]), "b": torch.tensor([[3.0], [0.0], [0.0]])}
    combined = Combined(token_rewards=torch.zeros(3, 1), weighted=weighted)
    got = attribution(combined, torch.tensor([1, 2, 3]))
    # centred: a -2 -1 3, b 2 -1 -1, total 0 -2 2 (squares 8), lengths -1 0 1
    assert got["variance_share"] == {"a": pytest.approx(8 / 8), "b": pytest.approx(0.0)}
    assert got["length_corr"] == {"a": pytest.approx(5 / (14 * 2) ** 0.5), "b": pytest.approx(-3 / (6 * 2) ** 0.5)}


def test_attribution_leaves_out_what_has_no_variance():
    combined = Combined(token_rewards=torch.zeros(2, 1), weighted={"a": torch.ones(2, 1)})
    assert attribution(combined, torch.tensor([1, 2])) == {"variance_share": {}, "length_corr": {}}


def test_the_deviation_of_totals_is_over_the_responses_of_all_ranks():
    totals = [torch.tensor([[1.0, 3.0], [2.0, 0.0]]), torch.tensor([[6.0, 0.0]]), torch.zeros(0, 2)]  # 4, 2 | 6 |
    ranks = [Combined(token_rewards=t, weighted={}) for t in totals]
    assert total_std(ranks[0]) == pytest.approx(1.0)
    assert total_std(ranks[1]) == 0.0
    assert math.isnan(total_std(ranks[2]))
    sums = [
        torch.tensor([3.0, 12.0], dtype=torch.float64),
        torch.tensor([8.0], dtype=torch.float64),
    ]  # mean 4: 0 + 4 + 4
    for rank in ranks:
        answers = iter(sums)
        assert total_std(rank, all_reduce=lambda _, answers=answers: next(answers)) == pytest.approx((8 / 3) ** 0.5)


values = st.integers(-(10**9), 10**9).map(lambda i: i / 1e6)  # no float32 below its normal range can come of them
rows = st.lists(st.lists(values, min_size=3, max_size=3), min_size=2, max_size=2)


@settings(max_examples=150, deadline=None)
@given(a=rows, b=rows, weight=st.integers(-80, 80), how=st.sampled_from(["none", "running", "batch"]))
def test_weight_0_is_absence_and_a_doubled_weight_doubles_exactly_its_part(a, b, weight, how):
    raw = {"a": torch.tensor(a, dtype=torch.float64), "b": torch.tensor(b, dtype=torch.float64)}

    def total(**weights):
        components = {name: spec(weight=w, normalize=how) for name, w in weights.items()}
        return combine({n: raw[n] for n in weights}, {n: MASK for n in weights}, MASK, components, {})

    assert torch.equal(total(a=weight / 7, b=0.0).token_rewards, total(a=weight / 7).token_rewards)
    once, twice = total(a=weight / 7, b=1.0), total(a=2 * weight / 7, b=1.0)
    assert torch.equal(twice.weighted["a"], 2 * once.weighted["a"])
    assert torch.equal(twice.weighted["b"], once.weighted["b"])


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.lists(values, min_size=1, max_size=5), min_size=1, max_size=6),
    padding=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_order_and_padding_of_a_batch_change_no_bit(rows, padding, seed):
    """Without a normaliser; with one, moments add up in the order of the batch, which the loop has sorted."""

    def run(order, width):
        raw = torch.full((len(rows), width), math.nan, dtype=torch.float64)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for place, i in enumerate(order):
            raw[place, : len(rows[i])] = torch.tensor(rows[i], dtype=torch.float64)
            mask[place, : len(rows[i])] = True
        out = combine({"a": raw}, {"a": mask}, mask, {"a": spec(weight=0.3, clip=10.0)}, {}).token_rewards
        return {i: out[place, : len(rows[i])].tolist() for place, i in enumerate(order)}

    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    width = max(map(len, rows))
    assert run(range(len(rows)), width) == run(order, width + padding)
