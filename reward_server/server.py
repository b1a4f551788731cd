"""RewardServer: the Ray actor that turns responses into raw component rewards, one number per token.

It waits for calls only, and works on one chunk at a time; the client's thread feeds it while workers still write.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from core.schema import RewardConfig
from core.trajectory import Trajectory
from reward_server.components import NotPerCompletion, ScoreRequest
from reward_server.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class ScoreFailure:
    """A sample without a reward: it is never given a number in its place."""

    trajectory: Trajectory  # unscored, to be tried again
    component: str
    reason: str
    try_alone: bool  # the call failed, maybe because of another sample; not so with components.NotPerCompletion


class RewardServer:
    def __init__(
        self,
        components: dict[str, RewardConfig],
        load_tokenizer: Callable[[], Any],
        *,
        functions: dict[str, Callable] | None = None,
        device: str = "cpu",
    ) -> None:
        """`functions`: callables of the user's script by component name; they win over `fn`."""
        torch.set_num_threads(1)
        self._tokenizer = load_tokenizer()
        self._scorer = Scorer(components, functions)
        self._scorer.setup(device)

    def hello(self) -> int:
        """Process id; answers once tokenizer and components are loaded."""
        return os.getpid()

    def close(self) -> None:
        """Have the components let go of what they hold."""
        self._scorer.close()

    def score(self, trajectories: list[Trajectory]) -> tuple[list[Trajectory], list[ScoreFailure]]:
        """Raw rewards of every component for each response; samples that a component failed on come back apart."""
        texts = [
            self._tokenizer.decode(
                t.response_ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            for t in trajectories
        ]
        answers = self._scorer.score(ScoreRequest.from_trajectories(trajectories, texts))
        scored, failures = [], []
        for i, trajectory in enumerate(trajectories):
            failed = [(name, a[i]) for name, a in answers.items() if isinstance(a[i], Exception)]
            if failed:
                name, error = failed[0]
                alone = not isinstance(error, NotPerCompletion)
                failure = ScoreFailure(trajectory=trajectory, component=name, reason=str(error), try_alone=alone)
                failures.append(failure)
                continue
            rewards = {name: a[i][0] for name, a in answers.items()}
            applies = {name: a[i][1] for name, a in answers.items()}
            scored.append(trajectory.scored(rewards, applies, scored_at=time.time()))
        return scored, failures
