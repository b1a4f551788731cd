"""Responses of a chunk are handed on in parts while others are written: which, whole prompts, and the same ids."""

from dataclasses import replace

import pytest

import tiny_models
from core.config import load
from core.faults import UserError
from core.trajectory import PromptRequest, Trajectory, sample_uid
from rollout.engines.transformers_engine import TransformersEngine
from rollout.worker import RolloutWorker

STOP = tuple(range(30))  # often, so that lengths differ


def engine(slots: int = 4) -> TransformersEngine:
    return TransformersEngine(tiny_models.make_model("gpt2"), STOP, temperature=1.0, max_new_tokens=24, slots=slots)


def asked() -> list[PromptRequest]:
    """Two samples of each of six prompts."""
    prompts = tiny_models.make_requests(6)
    return [replace(r, k=k, sample_uid=sample_uid("t", r.ordinal, k)) for r in prompts for k in range(2)]


@pytest.mark.parametrize("in_slots", [True, False])
def test_a_response_is_given_when_it_is_over(in_slots):
    """All begin together: so they come by their lengths, and those of one length by their places."""
    it, requests = engine(slots=64), asked()
    it.in_slots = in_slots
    came = list(it.stream(requests))
    assert [i for i, _ in came] == [i for i, _ in sorted(came, key=lambda pair: (len(pair[1].response_ids), pair[0]))]
    assert len({len(g.response_ids) for _, g in came}) > 3
    for want, got in zip(it.generate(requests), [g for _, g in sorted(came, key=lambda pair: pair[0])], strict=True):
        assert want.response_ids.tolist() == got.response_ids.tolist() and want.finish_reason == got.finish_reason
        assert want.logprobs.tobytes() == got.logprobs.tobytes()


def test_places_are_taken_while_others_are_written():
    """With fewer places than responses the first ones are there before the last have begun."""
    first, _ = next(iter(engine(slots=2).stream(asked())))
    assert first < 4


def parts_of(requests: list[PromptRequest], at_least: int | None) -> list[tuple[list[Trajectory], list[int]]]:
    worker = RolloutWorker("w", engine, tiny_models.make_tokenizer, threads=1, deterministic=False)
    values = list(worker.generate(requests, None, None, at_least))
    receipts = values[1::2]
    assert not any(receipt.unfinished for receipt in receipts)
    return list(zip(values[::2], [receipt.places for receipt in receipts], strict=True))


@pytest.mark.parametrize("at_least", [1, 3, 4, 6])
def test_parts_are_of_whole_prompts_and_together_the_chunk(at_least):
    requests = asked()
    ((whole, all_places),) = parts_of(requests, None)
    assert all_places == [*range(12)]
    parts = parts_of(requests, at_least)
    assert len(parts) > 1 and sorted(place for _, places in parts for place in places) == all_places
    for trajectories, places in parts:
        assert [t.request.sample_uid for t in trajectories] == [requests[i].sample_uid for i in places]
        for t, place in zip(trajectories, places, strict=True):
            assert t.response_ids.tobytes() == whole[place].response_ids.tobytes()
            assert t.rollout_logprobs.tobytes() == whole[place].rollout_logprobs.tobytes()
    sizes = [len(places) for _, places in parts]
    assert all(size >= at_least for size in sizes[:-1]) and all(size % 2 == 0 for size in sizes)
    for trajectories, _ in parts:
        ordinals = [t.request.ordinal for t in trajectories]
        assert all(ordinals.count(ordinal) == 2 for ordinal in ordinals)


def test_a_size_that_does_nothing_is_refused():
    settings = {**tiny_models.LEARNER_SETTINGS, "rollout.chunk_size": 8}
    assert load(None, settings | {"rollout.stream_size": 7}).rollout.stream_size == 7
    with pytest.raises(UserError, match="rollout.stream_size = 8: does nothing: a worker has rollout.chunk_size = 8"):
        load(None, settings | {"rollout.stream_size": 8})
