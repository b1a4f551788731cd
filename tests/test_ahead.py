"""Which batch is asked for when, which policy writes it, and that asked-for calls happen in order."""

import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

import tiny_models
from core.config import load
from core.faults import InvariantFault
from core.under_way import Written
from rollout.in_order import InOrder
from rollout.shares import Rollouts, Shares
from trainer.ahead import Ahead, asked_at, taken_until


@pytest.mark.parametrize(
    ("max_staleness", "save_every", "want"),
    [
        (0, 4, [1, 2, 3, 4, 5, 6, 7, 8]),
        (1, 100, [1, 1, 2, 3, 4, 5, 6, 7]),
        (1, 4, [1, 1, 2, 3, 5, 5, 6, 7]),  # nothing is in flight at the checkpoint after step 4
        (3, 100, [1, 1, 1, 1, 2, 3, 4, 5]),
        (3, 2, [1, 1, 3, 3, 5, 5, 7, 7]),
    ],
)
def test_when_a_batch_is_asked_for(max_staleness, save_every, want):
    assert [asked_at(step, max_staleness, save_every) for step in range(1, 9)] == want


@dataclass
class _Recorder:
    """Prompts and rollouts that note what was asked of them, in order; nothing is written."""

    events: list[tuple] = field(default_factory=list)
    taken: int = 0

    @property
    def position(self) -> int:
        return self.taken * 8

    def take(self, n_prompts: int, n_samples_per_prompt: int = 1) -> list:
        assert n_prompts == 8
        self.taken += 1
        return [self.taken]

    @property
    def state(self) -> dict[str, int]:
        return {"position": self.position, "left_out": 3}

    def start_batch(self, requests: list, submit: object) -> Future:
        self.events.append(("asked", requests[0]))
        future: Future = Future()
        future.set_result(Written(requests=requests, pending=[], seconds=1.5))
        return future


def configured(**more: object) -> object:
    return load(None, {**tiny_models.LEARNER_SETTINGS, **more}, folder=tiny_models.Path("/nowhere"))


def test_extra_prompts_are_taken_once_and_used_up_by_the_last_steps():
    sizes = {"rollout.batch_size": 8, "rollout.n_samples_per_prompt": 2, "ppo.mini_batch_size": 8, "run.steps": 4}
    how = {"rollout.round_tokens": 4, "rollout.extra_prompts": 3, "rollout.chunk_size": 2}
    assert [taken_until(configured(**sizes, **how), step) for step in range(1, 5)] == [7, 11, 15, 16]
    assert [taken_until(configured(**sizes), step) for step in range(1, 5)] == [4, 8, 12, 16]


@pytest.mark.parametrize("first", [1, 5])
def test_batches_come_in_order_and_no_more_than_are_trained_on(first):
    """From the start, and from the checkpoint after step 4: the weights that write are as old as configured at most."""
    cfg = configured(
        **{
            "rollout.max_staleness": 2,
            "rollout.batch_size": 8,
            "ppo.mini_batch_size": 8,
            "run.steps": 8,
            "run.save_every": 4,
        }
    )
    recorder = _Recorder(taken=first - 1)
    ahead = Ahead(cfg, recorder, recorder, None)
    for step in range(first, 9):
        written, version = ahead.take(step)
        assert written.requests == [step] and written.seconds == 1.5
        assert version == asked_at(step, 2, 4) - 1 and 0 <= step - 1 - version <= 2
        recorder.events.append(("learnt", step))
        # Ended here, whoever goes on asks for the batch behind this one, whatever is being written.
        assert ahead.prompts_state == {"position": step * cfg.prompts_per_step, "left_out": 3}
    want = ["asked 1", "asked 2", "asked 3", "learnt 1", "asked 4", "learnt 2", "learnt 3", "learnt 4"]
    want += ["asked 5", "asked 6", "asked 7", "learnt 5", "asked 8", "learnt 6", "learnt 7", "learnt 8"]
    assert [f"{what} {step}" for what, step in recorder.events] == want[0 if first == 1 else 8 :]


def test_calls_in_the_background_happen_in_order_while_their_asker_goes_on():
    gate, done = threading.Event(), []
    calls = InOrder(in_background=True)
    first = calls.run(lambda: (gate.wait(10), done.append("first")))
    second = calls.run(lambda: done.append("second") or "answer")
    assert not first.done() and not second.done() and done == []
    gate.set()
    assert second.result(10) == "answer" and done == ["first", "second"]
    calls.close()


def test_after_a_call_that_failed_none_is_done():
    """Weights that did not arrive: no batch is written with the old ones."""
    done, calls = [], InOrder(in_background=True)

    def fail() -> None:
        raise ValueError("no weights")

    failed, behind = calls.run(fail), calls.run(lambda: done.append("written"))
    for future in (failed, behind, calls.run(lambda: done.append("later"))):
        with pytest.raises(ValueError, match="no weights"):
            future.result(10)
    assert not done
    calls.close()


def test_without_a_thread_a_call_is_done_at_once_and_raises_where_it_is_asked_for():
    calls = InOrder(in_background=False)
    assert calls.run(lambda: threading.current_thread()).result(0) is threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        calls.run(lambda: 1 / 0)
    assert calls.run(lambda: 2).result(0) == 2


class _Exchange:
    def __init__(self) -> None:
        self.posted: list[tuple] = []

    def post(self, box: tuple[str, int], item: list) -> None:
        self.posted.append((box, item))


class _Broken:
    """A group whose workers cannot be given weights."""

    counters: Counter = Counter()

    def update_weights(self, update: object, timeout_s: float) -> int:
        raise InvariantFault("other bytes")


@pytest.mark.parametrize("ahead", [False, True])
def test_guests_hear_of_weights_that_did_not_arrive(ahead):
    """They wait for chunks that nobody will write: behind a failed call none is done."""
    exchange = _Exchange()
    rollouts = Rollouts(Shares(rank=0, n_ranks=3, n_workers=2), _Broken(), exchange, ahead=ahead)
    if ahead:
        assert rollouts.update_weights(None, 1.0) is None
        with pytest.raises(InvariantFault, match="other bytes"):
            rollouts.start([], list).result(10)
        with pytest.raises(InvariantFault, match="other bytes"):  # the last weights: no batch comes of them
            rollouts.finish()
    else:
        with pytest.raises(InvariantFault, match="other bytes"):
            rollouts.update_weights(None, 1.0)
        rollouts.finish()
    assert exchange.posted == [(("chunks", 2), [])]
