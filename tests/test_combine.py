"""Raw component rewards -> token rewards, worked by hand."""

import pytest
import torch

from core.combine import RunningMoments, combine
from core.config import RewardConfig

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
