"""TrainBatch: alignment, order, trimming, and the cutting into mini- and micro-batches."""

import dataclasses

import numpy as np
import pytest
import torch

from core.trajectory import PromptRequest, Trajectory, sample_uid
from trainer.batch import TrainBatch


def trajectory(ordinal: int, prompt: list[int], response: list[int], k: int = 0, **changes: object) -> Trajectory:
    n = len(response)
    values: dict = {
        "request": PromptRequest(
            ordinal=ordinal,
            k=k,
            sample_uid=sample_uid("t", ordinal, k),
            prompt_ids=np.array(prompt),
            columns={"prompt": ""},
            seed=0,
        ),
        "response_ids": np.array(response),
        "rollout_logprobs": -np.arange(1.0, n + 1, dtype=np.float32),
        "action_mask": np.ones(n, dtype=bool),
        "token_offsets": np.zeros((n, 2), dtype=np.int64),
        "policy_version": np.full(n, 3),
        "finish_reason": "stop",
        "finished_at": 0.0,
        "component_rewards": {"a": np.array(response, dtype=np.float64) / 10},
        "component_mask": {"a": np.ones(n, dtype=bool)},
    }
    return Trajectory(**values | changes)


@pytest.fixture
def batch() -> TrainBatch:
    return TrainBatch.collate(
        [
            trajectory(5, [7, 8, 9], [11, 12], finish_reason="length"),
            trajectory(2, [6], [21, 22, 23, 0], action_mask=np.array([1, 0, 1, 1], dtype=bool)),
        ]
    )


def test_collate_by_hand(batch):
    assert batch.order.tolist() == [[2, 0], [5, 0]]  # sorted, not as they arrived
    assert batch.input_ids.tolist() == [[0, 0, 6, 21, 22, 23, 0], [7, 8, 9, 11, 12, 0, 0]]
    assert batch.response_mask.tolist() == [[True, False, True, True], [True, True, False, False]]
    assert batch.rollout_logprobs.tolist() == [[-1, -2, -3, -4], [-1, -2, 0, 0]]
    assert batch.component_rewards["a"].tolist() == [[2.1, 2.2, 2.3, 0], [1.1, 1.2, 0, 0]]
    assert batch.cut.tolist() == [False, True] and batch.prompt_width == 3


@pytest.mark.parametrize("reason", ["abort", None])
def test_what_is_not_over_is_not_trained_on(reason):
    with pytest.raises(AssertionError, match="was aborted, or is not over"):
        TrainBatch.collate([trajectory(5, [7], [11], finish_reason=reason)])


def test_a_last_token_of_id_0_is_a_token(batch):
    """eos is 0 here, as padding is: lengths decide, never ids."""
    assert batch.response_mask[0, 3] and not batch.response_mask[1, 3]


def test_rows_are_trimmed_to_what_they_need(batch):
    second, first = batch.rows(np.array([1])), batch.rows(np.array([0]))
    assert second.input_ids.tolist() == [[7, 8, 9, 11, 12]] and second.rollout_logprobs.tolist() == [[-1, -2]]
    assert first.input_ids.tolist() == [[6, 21, 22, 23, 0]] and first.prompt_width == 1
    assert batch.rows(np.array([1, 0])).input_ids.tolist() == [[7, 8, 9, 11, 12, 0, 0], [0, 0, 6, 21, 22, 23, 0]]


def test_a_stream_is_written_once(batch):
    filled = batch.fill(values=torch.zeros(2, 4))
    assert batch.values is None
    with pytest.raises(AssertionError, match="values is written twice"):
        filled.fill(values=torch.zeros(2, 4))


def test_an_aborted_response_is_never_trained_on():
    with pytest.raises(AssertionError, match="aborted"):
        TrainBatch.collate([trajectory(0, [1], [2], finish_reason="abort")])


def many(n: int) -> TrainBatch:
    rng = np.random.default_rng(0)
    return TrainBatch.collate(
        [trajectory(i // 2, [1] * (1 + i // 2 % 5), [2] * int(rng.integers(1, 9)), k=i % 2) for i in range(n)]
    )


def test_mini_batches_part_the_batch_anew_in_each_epoch():
    batch = many(24)
    parts = [
        [index.tolist() for index in batch.mini_batches(4, seed=1, step=s, epoch=e, orders=[batch.order])]
        for s, e in ((1, 0), (1, 1), (2, 0), (1, 0))
    ]
    for minis in parts:
        assert [len(m) for m in minis] == [6, 6, 6, 6]
        assert sorted(i for m in minis for i in m) == list(range(24))
    assert parts[0] == parts[3] and parts[0] != parts[1] and parts[0] != parts[2] and parts[1] != parts[2]


def test_membership_is_a_function_of_the_sample_not_of_the_rank():
    whole = many(24)
    want = [
        {tuple(whole.order[i]) for i in m} for m in whole.mini_batches(4, seed=1, step=1, epoch=0, orders=[whole.order])
    ]
    # Uneven shards, one of them empty.
    shards = [whole.rows(rows) for rows in (np.arange(3, 24), np.arange(3))] + [TrainBatch.collate([], ["a"])]
    orders = [shard.order for shard in shards]
    got: list[set] = [set() for _ in range(4)]
    for rank, shard in enumerate(shards):
        minis = list(shard.mini_batches(4, seed=1, step=1, epoch=0, orders=orders, rank=rank))
        for members, index in zip(got, minis, strict=True):
            members |= {tuple(shard.order[i]) for i in index}
    assert got == want


def test_an_idle_row_has_every_field_of_the_batch_and_no_valid_token():
    batch = many(4)
    batch = batch.fill(
        **{name: torch.ones(batch.response_mask.shape) for name in ("old_logprobs", "values", "advantages", "returns")}
    )
    idle = batch.idle()
    assert len(idle) == 1 and idle.input_ids.shape == (1, 2) and not idle.response_mask.any()
    assert idle.prompt_lengths.tolist() == [1] and idle.response_lengths.tolist() == [0] and idle.prompt_width == 1
    for field in dataclasses.fields(batch):
        assert (getattr(idle, field.name) is None) == (getattr(batch, field.name) is None), field.name


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("size", "tokens"), [(1, None), (5, None), (24, None), (24, 30), (5, 12), (24, 1)])
def test_pieces_hold_every_row_once_within_their_bounds(size, tokens, packed):
    batch = many(24)
    pieces = batch.pieces(np.arange(3, 20), size, tokens=tokens, packed=packed)
    assert sorted(i for piece in pieces for i in piece) == list(range(3, 20)) and max(map(len, pieces)) <= size
    for piece in pieces:
        n_prompt, n_response = batch.prompt_lengths[piece], batch.response_lengths[piece]
        once = {int(batch.order[i, 0]): int(batch.prompt_lengths[i]) for i in piece}
        cost = len(piece) * int(n_prompt.max() + n_response.max())
        if packed:
            cost = sum(once.values()) + int(n_response.sum())
        assert len(piece) == 1 or tokens is None or cost <= tokens


def test_pieces_keep_samples_of_one_prompt_together_and_count_it_once():
    """Prompts of 10 tokens, four samples of 1 token each: 14 tokens for a prompt, so a budget of 28 holds two."""
    rows = [trajectory(ordinal, [1] * 10, [2], k=k) for k in range(4) for ordinal in range(4)]
    batch = TrainBatch.collate(rows)
    pieces = batch.pieces(np.arange(16), 16, tokens=28, packed=True)
    assert [sorted({int(batch.order[i, 0]) for i in piece}) for piece in pieces] == [[0, 1], [2, 3]]
    assert [len(p) for p in batch.pieces(np.arange(16), 16, tokens=28)] == [2] * 8


def test_every_per_token_field_of_a_trajectory_has_its_length():
    good = trajectory(0, [1], [2, 3])
    with pytest.raises(AssertionError, match="action_mask has 1 of 2"):
        dataclasses.replace(good, action_mask=np.ones(1, dtype=bool))
    with pytest.raises(AssertionError, match="scored twice"):
        good.scored({}, {}, scored_at=0.0)
