"""The reward server without Ray: chunks that wait are scored together, each call gets its own, in its order."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from core.schema import RewardConfig
from core.trajectory import PromptRequest, Trajectory
from reward_server.server import RewardServer


class Words:
    """A tokenizer in which an id is a word."""

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


class Recorder:
    """A component that notes the batches it was given, and holds the first one until the others wait."""

    batches: list[list[int]]
    go: threading.Event

    def score(self, batch):
        Recorder.batches.append([ids[0] for ids in batch.completion_ids])
        if len(Recorder.batches) == 1:
            assert Recorder.go.wait(30)
        if any(ids[0] == 99 for ids in batch.completion_ids):
            raise SystemExit("the server itself fails")
        return [float(ids[0]) for ids in batch.completion_ids]


def chunk(*words: int) -> list[Trajectory]:
    return [
        Trajectory(
            request=PromptRequest(
                ordinal=word, k=0, sample_uid=f"u{word}", prompt_ids=np.array([1]), columns={"prompt": "p"}, seed=0
            ),
            response_ids=np.array([word]),
            rollout_logprobs=np.zeros(1, dtype=np.float32),
            action_mask=np.ones(1, dtype=bool),
            token_offsets=np.array([[0, len(str(word))]]),
            policy_version=np.zeros(1, dtype=np.int64),
            finish_reason="stop",
            finished_at=0.0,
        )
        for word in words
    ]


def scored_beside_each_other(chunks: list[list[Trajectory]], batch_size: int | None) -> list:
    """What each call came to: the first is under way before the others come, in their order."""
    Recorder.batches, Recorder.go = [], threading.Event()
    spec = RewardConfig(fn="handed_over:Recorder")
    server = RewardServer({"c": spec}, Words, functions={"c": Recorder}, batch_size=batch_size)
    with ThreadPoolExecutor(len(chunks)) as pool:
        calls = []
        for i, trajectories in enumerate(chunks):
            calls.append(pool.submit(server.score, trajectories))
            wait_for(lambda: bool(Recorder.batches))
            wait_for(lambda i=i: len(server._queue) == i)
        Recorder.go.set()
        return [call.exception(30) or call.result() for call in calls]


def wait_for(what) -> None:
    deadline = threading.Event()
    for _ in range(3000):
        if what():
            return
        deadline.wait(0.01)
    raise AssertionError("nothing after 30 s")


def test_chunks_that_wait_are_scored_together_and_go_back_to_their_callers():
    chunks = [chunk(1, 2), chunk(3, 4), chunk(5), chunk(6, 7, 8), chunk(9)]
    answers = scored_beside_each_other(chunks, batch_size=5)
    assert Recorder.batches == [[1, 2], [3, 4, 5], [6, 7, 8, 9]]  # 6 7 8 did not fit beside 3 4 5
    for trajectories, (scored, failures) in zip(chunks, answers, strict=True):
        assert [t.request.sample_uid for t in scored] == [t.request.sample_uid for t in trajectories]
        assert [t.component_rewards["c"].tolist() for t in scored] == [[float(t.response_ids[0])] for t in trajectories]
        assert failures == []


def test_a_chunk_larger_than_the_batch_is_scored_by_itself():
    scored_beside_each_other([chunk(1), chunk(2, 3, 4), chunk(5)], batch_size=2)
    assert Recorder.batches == [[1], [2, 3, 4], [5]]


def test_what_ends_the_server_reaches_every_call_that_waited_for_it():
    answers = scored_beside_each_other([chunk(1), chunk(99), chunk(3), chunk(4, 5, 6, 7)], batch_size=4)
    assert Recorder.batches == [[1], [99, 3], [4, 5, 6, 7]]
    assert isinstance(answers[1], SystemExit) and isinstance(answers[2], SystemExit)
    assert len(answers[3][0]) == 4  # those behind it are scored


def test_without_a_batch_size_each_chunk_is_a_batch():
    Recorder.batches, Recorder.go = [[]], threading.Event()  # nothing is held back
    server = RewardServer({"c": RewardConfig(fn="handed_over:Recorder")}, Words, functions={"c": Recorder})
    for trajectories in (chunk(1, 2), chunk(3)):
        scored, _ = server.score(trajectories)
        assert len(scored) == len(trajectories)
    assert Recorder.batches[1:] == [[1, 2], [3]]


@pytest.mark.parametrize("batch_size", [None, 4])
def test_components_are_closed_with_the_server(batch_size):
    closed = []

    class Held(Recorder):
        def close(self):
            closed.append(True)

    server = RewardServer(
        {"c": RewardConfig(fn="handed_over:Held")}, Words, functions={"c": Held}, batch_size=batch_size
    )
    server.close()
    assert closed == [True]
