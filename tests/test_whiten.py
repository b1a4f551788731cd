"""masked_mean and whiten, on one rank and over several."""

import math
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_cases import HOLE, POISON_MASK, close, f64, few, mask_at, mask_of, ragged, random_rows, seeds
from trainer import ppo


def test_masked_mean_by_hand():
    # rows of 1 and 3 valid tokens: (6 + 1 + 2 + 3) / 4 = 3, where the mean of the row means would be (6 + 2) / 2 = 4
    x = f64([[6.0, HOLE, HOLE], [1.0, 2.0, 3.0]])
    close(ppo.masked_mean(x, mask_of([[1, 0, 0], [1, 1, 1]])), 3.0)


def test_masked_mean_has_no_epsilon():
    assert float(ppo.masked_mean(f64([[3.0, HOLE]]), mask_of([[1, 0]]))) == 3.0


def test_whiten_by_hand():
    # 1, 2, 3, 6: mean 3, squares 4 + 1 + 0 + 9 = 14, variance 14 / 3 (n - 1), deviation 2.160246899469287
    #   -2 / 2.1602469 = -0.9258200997725514, and so on (eps 1e-8 moves the tenth digit)
    x, mask = f64([[1.0, 2.0, HOLE], [3.0, 6.0, HOLE]]), mask_of([[1, 1, 0], [1, 1, 0]])
    close(
        ppo.whiten(x, mask),
        [[-0.9258200997725514, -0.4629100498862757, 0.0], [0.0, 1.3887301496588271, 0.0]],
        2e-9,
    )
    close(
        ppo.whiten(x, mask, center=False),
        [[3 - 0.9258200997725514, 3 - 0.4629100498862757, 0.0], [3.0, 3 + 1.3887301496588271, 0.0]],
        2e-9,
    )


def test_whitening_constants_gives_zeros():
    mask = mask_of([[1, 1, 0], [0, 1, 1]])
    for constant in (0.0, 3.25, -1e4):
        close(ppo.whiten(f64([[constant] * 3] * 2), mask), torch.zeros(2, 3))


def test_whitening_one_valid_token():
    x, mask = f64([[HOLE, 5.0], [HOLE, HOLE]]), mask_of([[0, 1], [0, 0]])
    close(ppo.whiten(x, mask), [[0.0, 0.0], [0.0, 0.0]])
    close(ppo.whiten(x, mask, center=False), [[0.0, 5.0], [0.0, 0.0]])


def test_uncentred_whitening_keeps_constant_positive_rewards_positive():
    mask = mask_of([[1, 1, 0], [0, 1, 1]])
    whitened = ppo.whiten(f64([[0.7] * 3] * 2), mask, center=False)
    assert (whitened[mask] > 0).all()
    close(whitened[mask], [0.7] * 4)


@few
@given(ragged().filter(lambda batch: sum(batch[0]) >= 2), seeds, st.floats(-50, 50), st.floats(0.5, 50))
def test_whitened_tokens_have_mean_0_and_deviation_1(batch, seed, shift, scale):
    lengths, slots, width = batch
    mask = mask_at(slots, width)
    x = shift + scale * random_rows((len(lengths), width), seed)
    tokens = ppo.whiten(x, mask)[mask].tolist()
    mean = math.fsum(tokens) / len(tokens)
    assert abs(mean) < 1e-9
    variance = math.fsum(token**2 for token in tokens) / (len(tokens) - 1)
    spread = float(x[mask].std())
    assert abs(variance - 1) < 1e-12 + 2e-8 / spread**2  # the 1e-8 under the root is felt where the spread is small
    close(ppo.whiten(x, mask, center=False)[mask], f64(tokens) + x[mask].mean(), 1e-11)


def test_whitening_in_float32_survives_a_mean_far_from_zero():
    # E[x^2] - E[x]^2 in float32 has no correct digit left here
    x = (1000.0 + random_rows((8, 64), 1)).float()
    mask = torch.ones(8, 64, dtype=torch.bool)
    got = ppo.whiten(x, mask)
    assert got.dtype == torch.float32
    close(got, ppo.whiten(x.double(), mask), 2e-4)
    close(got.double().std(), 1.0, 1e-5)


def whiten_on_ranks(parts, masks, center=True):
    """`whiten` on one thread per rank, whose all_reduce waits for all ranks and sums what they bring."""
    ranks = len(parts)
    barrier = threading.Barrier(ranks, timeout=20)
    brought: list[torch.Tensor | None] = [None] * ranks
    results: list[torch.Tensor | None] = [None] * ranks
    errors: list[BaseException] = []

    def run(rank):
        def all_reduce(sums):
            assert sums.dim() == 1 and sums.dtype == torch.float64
            brought[rank] = sums.clone()
            barrier.wait()
            total = torch.stack(brought).sum(dim=0)  # raises if the ranks brought different lengths
            barrier.wait()
            return total

        try:
            by = ppo.whitening(parts[rank], masks[rank], all_reduce=all_reduce)
            results[rank] = ppo.whiten(parts[rank], masks[rank], by, center=center)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    # a broken barrier is only the echo of the first error on another rank
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return results


@pytest.mark.parametrize("center", [True, False])
@few
@given(ragged(), seeds, st.data())
def test_whitening_on_two_ranks_equals_the_union(center, batch, seed, data):
    lengths, slots, width = batch
    cut = data.draw(st.integers(0, len(lengths)))
    x, mask = random_rows((len(lengths), width), seed), mask_at(slots, width)
    x[cut:] = 100.0 + 30.0 * x[cut:]  # another scale on the second rank: whitening each alone would be far off
    parts = whiten_on_ranks([x[:cut], x[cut:]], [mask[:cut], mask[cut:]], center)
    close(torch.cat(parts), ppo.whiten(x, mask, center=center), 1e-10)


def test_whitening_on_ranks_of_unequal_width():
    # B21: ragged batches have another width on every rank
    narrow, wide = random_rows((2, 5), 1), random_rows((3, 9), 2)
    union = ppo.whiten(torch.cat([narrow.reshape(1, -1), wide.reshape(1, -1)], dim=1), torch.ones(1, 37).bool())
    first, second = whiten_on_ranks([narrow, wide], [torch.ones(2, 5).bool(), torch.ones(3, 9).bool()])
    close(torch.cat([first.flatten(), second.flatten()]), union.flatten(), 1e-10)


@pytest.mark.parametrize("center", [True, False])
def test_a_rank_without_valid_tokens_takes_part_in_the_reduction(center):
    x, mask = f64([[1.0, 2.0, 6.0]]), mask_of([[1, 1, 1]])
    empty = torch.zeros(1, 3, dtype=torch.bool)
    first, second = whiten_on_ranks([x, torch.full_like(x, math.nan)], [mask, empty], center)
    close(first, ppo.whiten(x, mask, center=center), 1e-10)
    close(second, torch.zeros(1, 3))
    for nothing in whiten_on_ranks([x, x], [empty, empty], center):
        close(nothing, torch.zeros(1, 3))


def test_one_valid_token_over_all_ranks():
    x = f64([[5.0, 7.0]])
    first, second = whiten_on_ranks([x, x], [mask_of([[0, 1]]), mask_of([[0, 0]])], center=False)
    close(first, [[0.0, 7.0]])
    close(second, [[0.0, 0.0]])


def test_whitening_on_ranks_in_float32_stays_float32():
    x = (1000.0 + random_rows((4, 8), 3)).float()
    mask = torch.ones(4, 8, dtype=torch.bool)
    parts = whiten_on_ranks([x[:2], x[2:]], [mask[:2], mask[2:]])
    assert all(part.dtype == torch.float32 for part in parts)
    close(torch.cat(parts), ppo.whiten(x.double(), mask), 2e-4)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("poison", [1e6, math.nan, math.inf])
def test_poison_does_not_reach_another_rank(poison, center):
    x = random_rows((2, 6), 11)
    mask = POISON_MASK[2:4]
    dirty = x.masked_fill(~mask, poison)
    parts = whiten_on_ranks([dirty[:1], dirty[1:]], [mask[:1], mask[1:]], center)
    close(torch.cat(parts), ppo.whiten(x, mask, center=center), 1e-10)
