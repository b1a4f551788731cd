"""RewardServer: the Ray actor that turns responses into raw component rewards, one number per token.

It waits for calls only; the client's thread feeds it while workers still write. It works on one batch at a time: a
chunk, or with `batch_size` all the chunks that wait, up to so many responses.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from core.faults import UserError
from core.schema import RewardConfig
from core.trajectory import Trajectory
from reward_server.components import NotPerCompletion, ScoreRequest
from reward_server.reference import Reference, ReferenceSpec
from reward_server.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class ScoreFailure:
    """A sample without a reward: it is never given a number in its place."""

    trajectory: Trajectory  # unscored, to be tried again
    component: str
    reason: str
    try_alone: bool  # the call failed, maybe because of another sample; not so with components.NotPerCompletion


Scores = tuple[list[Trajectory], list[ScoreFailure]]


@dataclass
class _Ticket:
    """A call that waits to be scored together with others."""

    trajectories: list[Trajectory]
    scores: Scores | BaseException | None = None


class RewardServer:
    def __init__(
        self,
        components: dict[str, RewardConfig],
        load_tokenizer: Callable[[], Any],
        *,
        functions: dict[str, Callable] | None = None,
        device: str = "cpu",
        batch_size: int | None = None,
        reference: ReferenceSpec | None = None,
    ) -> None:
        """`functions`: callables of the user's script by component name; they win over `fn`. `reference`: the model
        whose log-probs go with the rewards."""
        torch.set_num_threads(1)
        self._batch_size = batch_size
        self._lane, self._queue = threading.Lock(), deque()
        self._tokenizer = load_tokenizer()
        self._scorer, self._device, self._is_set_up = Scorer(components, functions), device, False
        self._reference = Reference(reference) if reference is not None else None

    def hello(self) -> int:
        """Process id; answers once tokenizer and components are loaded. Raises UserError where they cannot be."""
        self._set_up()
        return os.getpid()

    def _set_up(self) -> None:
        # Not at birth: what an actor's constructor raises reaches nobody but as text.
        if not self._is_set_up:
            self._scorer.setup(self._device)
            if self._reference is not None:
                try:
                    self._reference.setup(self._device, self._scorer.parts)
                except (OSError, ValueError) as error:
                    raise UserError(f"model.reference = reward_server: {str(error).splitlines()[0]}") from None
            self._is_set_up = True

    def close(self) -> None:
        """Have the components let go of what they hold."""
        self._scorer.close()
        if self._reference is not None:
            self._reference.close()

    def score(self, trajectories: list[Trajectory]) -> Scores:
        """Raw rewards of every component for each response; samples that a component failed on come back apart."""
        if self._batch_size is None:
            return self._score(trajectories)
        mine = _Ticket(trajectories)
        self._queue.append(mine)
        while mine.scores is None:
            with self._lane:  # whoever has it scores for all that wait, in the order in which they came
                if mine.scores is None:
                    self._score_waiting(self._batch_size)
        if isinstance(mine.scores, BaseException):
            raise mine.scores
        return mine.scores

    def _score_waiting(self, most: int) -> None:
        """Score the first ticket, and with it as many as fit into `most` responses."""
        tickets = [self._queue.popleft()]
        room = most - len(tickets[0].trajectories)
        while self._queue and len(self._queue[0].trajectories) <= room:
            tickets.append(self._queue.popleft())
            room -= len(tickets[-1].trajectories)
        torch.set_num_threads(1)  # a setting of each thread
        try:
            scored, failures = self._score([t for ticket in tickets for t in ticket.trajectories])
        except BaseException as error:  # of the server itself: every call that waited for it raises it
            for ticket in tickets:
                ticket.scores = error
            return
        for ticket in tickets:
            uids = {t.request.sample_uid for t in ticket.trajectories}
            ticket.scores = (
                [t for t in scored if t.request.sample_uid in uids],
                [f for f in failures if f.trajectory.request.sample_uid in uids],
            )

    def _score(self, trajectories: list[Trajectory]) -> Scores:
        self._set_up()
        texts = [
            self._tokenizer.decode(
                t.response_ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            for t in trajectories
        ]
        request = ScoreRequest.from_trajectories(trajectories, texts)
        if self._reference is not None:
            self._reference.begin(trajectories)
        answers = self._scorer.score(request)
        references = self._reference.of(request) if self._reference is not None else [None] * len(trajectories)
        scored, failures = [], []
        for i, trajectory in enumerate(trajectories):
            failed = [(name, a[i]) for name, a in answers.items() if isinstance(a[i], Exception)]
            if isinstance(references[i], Exception):
                failed.append(("reference", references[i]))
            if failed:
                name, error = failed[0]
                alone = not isinstance(error, NotPerCompletion)
                failure = ScoreFailure(trajectory=trajectory, component=name, reason=str(error), try_alone=alone)
                failures.append(failure)
                continue
            rewards = {name: a[i][0] for name, a in answers.items()}
            applies = {name: a[i][1] for name, a in answers.items()}
            scored.append(trajectory.scored(rewards, applies, scored_at=time.time(), ref_logprobs=references[i]))
        return scored, failures
