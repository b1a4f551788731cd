"""Responses of several turns: what the policy writes, what an environment answers, and who wrote which token.

    prompt   [ 12 + 7 = ]
    response [ <calc> 12 + 7 </calc> <eos> | 19 | The answer is 19 <eos> ]
    mask       1      1  1 1 1       1       0    1   1      1  1  1

A response never ends with an observation: the last token is the policy's. Ids are the only truth: an observation is
tokenised by itself, and what is there already is never tokenised again. Which ids come out is a function of (weights,
prompt, seed, ordinal, k) and of the environment, not of who else is written beside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.faults import EnvironmentFault
from core.trajectory import FinishReason, KeptTokens, PromptRequest
from rollout.engines.engine import Begun, Engine, Generation
from rollout.environment import EnvironmentProcess, EnvironmentSpec
from rollout.offsets import OffsetMapper


@dataclass(frozen=True, kw_only=True)
class Written:
    """A response, T tokens: a whole one, or what there is of it yet."""

    response_ids: np.ndarray  # [T] int64
    logprobs: np.ndarray  # [T] float32, 0 where an environment wrote: nothing reads them there
    action_mask: np.ndarray  # [T] bool, False where an environment wrote
    token_offsets: np.ndarray  # [T, 2] int64
    finish_reason: FinishReason | None  # None: it is not over
    kept: KeptTokens | None  # of [T] where the engine filters, no ids where an environment wrote
    values: np.ndarray | None  # [T] float32, with an engine that has a value head
    bootstrap: float | None  # likewise, of a response that was cut: of the state after the last token


class Turns:
    """Writes responses with an engine, and with an environment where the run has one."""

    def __init__(self, engine: Engine, tokenizer: Any, spec: EnvironmentSpec | None) -> None:
        self._engine, self._tokenizer, self._spec = engine, tokenizer, spec
        self._map_offsets = OffsetMapper(tokenizer)
        self._environment: EnvironmentProcess | None = None

    def start(self) -> None:
        """Load the environment, where there is one and it is not there yet. Raises EnvironmentFault."""
        if self._spec is not None and self._environment is None:
            self._environment = EnvironmentProcess(self._spec)

    def write(self, requests: list[PromptRequest]) -> list[Written]:
        """What `stream` gives, in the order of the requests."""
        return [written for _, written in sorted(self.stream(requests), key=lambda pair: pair[0])]

    def stream(
        self, requests: list[PromptRequest], begun: list[Begun | None] | None = None, most: int | None = None
    ) -> Iterator[tuple[int, Written]]:
        """One response to each request, with its place among them, as soon as there is no more to come of it. Raises
        EnvironmentFault, which names the sample.

        `begun`, `most`: as Engine.stream has them, where there is no environment: what that has seen of a response
        does not outlive a call.

        The environment is asked after each turn that ended by a stop token, but for the last of `max_turns`. An
        observation that would leave no room for a token of the policy is not appended: that response ends with what
        the policy wrote, cut (`length`).
        """
        assert self._spec is None or (begun is None and most is None), "responses with an environment are written whole"
        self.start()
        max_turns = 1 if self._spec is None else self._spec.max_turns
        begun = [None] * len(requests) if begun is None else list(begun)
        masks = [np.ones(0 if start is None else len(start.response_ids), dtype=bool) for start in begun]
        said: list[list[str]] = [[] for _ in requests]  # the turns of each response
        alive = list(range(len(requests)))
        for turn in range(1, max_turns + 1):
            going_on: list[int] = []
            for n, g in self._engine.stream([requests[i] for i in alive], [begun[i] for i in alive], most):
                i = alive[n]
                start = len(masks[i])
                masks[i] = np.append(masks[i], np.ones(len(g.response_ids) - start, dtype=bool))
                observation, reason = None, g.finish_reason
                if reason == "stop" and turn < max_turns:
                    said[i].append(self._text_from(g.response_ids, start))
                    observation, reason = self._observe(requests[i], said[i], len(g.response_ids))
                if observation is None:
                    yield i, self._written(g, masks[i], reason)
                    continue
                none = np.zeros(len(observation), dtype=np.float32)
                masks[i] = np.append(masks[i], none.astype(bool))
                begun[i] = Begun(
                    response_ids=np.append(g.response_ids, observation),
                    logprobs=np.append(g.logprobs, none),
                    kept=None if g.kept is None else g.kept.and_undrawn(len(observation)),
                    turn=len(g.response_ids) + len(observation),
                )
                going_on.append(i)
            if not (alive := sorted(going_on)):
                break

    def _observe(
        self, request: PromptRequest, turns: list[str], n_tokens: int
    ) -> tuple[np.ndarray | None, FinishReason]:
        """The ids to go on after ([t] int64), or None and why the response ends. Adds the observation to `turns`."""
        text = self._environment.step(turns, request.columns, request.sample_uid)
        if text is None:
            return None, "stop"
        ids = np.array(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)
        if not len(ids):
            raise EnvironmentFault(
                f"rollout.environment = {self._spec.name}: sample {request.sample_uid}: gave {text!r:.80}, of which the"
                " tokenizer makes no token"
            )
        if n_tokens + len(ids) >= self._spec.max_new_tokens:
            return None, "length"
        turns.append(text)
        return ids, "stop"

    def _text_from(self, ids: np.ndarray, start: int) -> str:
        """What the tokens from `start` on add to the text of all."""
        text, offsets = self._map_offsets(ids)
        return text[int(offsets[start, 0]) :]

    def _written(self, g: Generation, mask: np.ndarray, reason: FinishReason | None) -> Written:
        return Written(
            response_ids=g.response_ids,
            logprobs=g.logprobs,
            action_mask=mask,
            # Of what is not over nobody reads them, and it may end within a character.
            token_offsets=np.zeros((len(mask), 2), np.int64)
            if reason is None
            else self._map_offsets(g.response_ids)[1],
            finish_reason=reason,
            kept=g.kept,
            values=g.values,
            bootstrap=g.bootstrap,
        )
