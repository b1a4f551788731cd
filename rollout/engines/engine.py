"""What a rollout worker needs of an engine. transformers_engine.py has the embedded one, vllm_engine.py vLLM."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from core.trajectory import FinishReason, KeptTokens, PromptRequest


@dataclass(frozen=True, kw_only=True)
class Generation:
    response_ids: np.ndarray  # [T] int64, the stop token included
    logprobs: np.ndarray  # [T] float32, of the distribution that was sampled from: after temperature and filters
    finish_reason: FinishReason | None  # None: it is not over, there are only so many tokens of it yet
    kept: KeptTokens | None = None  # which ids each token was drawn from; None: from the whole vocabulary
    values: np.ndarray | None = None  # [T] float32, of the state before each token; None: the engine has no value head
    bootstrap: float | None = None  # of the state after the last token of a response that was cut


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What a response holds already: tokens written before, or put there by an environment. Fewer than a whole one."""

    response_ids: np.ndarray  # [t] int64
    logprobs: np.ndarray  # [t] float32, kept as they are
    kept: KeptTokens | None = None  # of [t] where the engine filters; no ids for tokens that nothing was drawn for
    turn: int = 0  # where the turn that goes on starts: a stop string lies in it whole


class Engine(Protocol):
    def stream(
        self, requests: list[PromptRequest], begun: list[Begun | None] | None = None, most: int | None = None
    ) -> Iterator[tuple[int, Generation]]:
        """One response to each request, with its place among them, as soon as the engine knows it; the ids are a
        function of (weights, prompt, seed, ordinal, k). Nothing else may be asked of the engine until the last one.

        `begun`: for each request what its response starts with, or None; it counts towards the longest response, and
        token t is decided by random number t whoever wrote those before it. The answer holds the whole response.
        `most`: as many more tokens to each at most, at least one; what is not over by then has no finish_reason.
        """
        ...

    def logprobs(self, prompt_ids: np.ndarray, response_ids: np.ndarray) -> np.ndarray:
        """Log-probs of given responses under the weights in use: [B, P], [B, T] int64 without padding -> [B, T].

        After temperature, over the whole vocabulary: the responses were not drawn here.
        """
        ...

    def live_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by the names that the learner has for them: the very objects that the engine reads,
        or that `use_weights` does. A weight sync writes into them on a GPU; on a CPU it gives them other memory,
        read-only: nothing may keep a view of the old or write into it. What is written counts from `use_weights` on."""
        ...

    def use_weights(self) -> None:
        """Put to use what was written into `live_tensors`, and drop what was computed with the old weights."""
        ...

    def rest(self) -> None:
        """No call is near: free what others may use meanwhile. Any call ends it."""
        ...
