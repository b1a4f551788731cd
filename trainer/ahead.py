"""Ahead: batches that are being written while the learner works on another (`rollout.max_staleness`).

    step            1           2           3           4
    max_staleness 0 |write 1 learn|write 2 learn|write 3 learn|
    max_staleness 1 |write 1|write 2      |write 3      |
                            |learn 1      |learn 2      |learn 3      |

With k, the batch of step s is asked for at the beginning of step s - k, so the policy after step s - k - 1 writes it:
the first k batches after a start are fresher, none is older. Which policy writes what is thus decided by the
configuration and never by a clock, and no more is written than is trained on.

No batch is asked for across a checkpoint: whoever goes on from it has what the uninterrupted run had, bit for bit, and
the workers rest once in `run.save_every` steps.
"""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from core.schema import Config
from core.trajectory import PromptRequest


class Prompts(Protocol):
    @property
    def state(self) -> dict[str, Any]: ...

    def take(self, n_prompts: int, n_samples_per_prompt: int = 1) -> list[PromptRequest]: ...


class Starts(Protocol):
    def start(self, requests: list[PromptRequest], submit: Any) -> Future: ...


@dataclass(frozen=True, kw_only=True)
class Written:
    """A batch whose responses are all written, and on their way to be scored."""

    requests: list[PromptRequest]  # of all ranks
    pending: list[Any]  # what `submit` gave
    seconds: float  # from the first call of a worker to the last response
    version: int  # of the weights that wrote it


def asked_at(step: int, max_staleness: int, save_every: int) -> int:
    """The step at whose beginning the batch of `step` is asked for; steps count from 1."""
    after_checkpoint = (step - 1) // save_every * save_every + 1
    return max(after_checkpoint, step - max_staleness)


class Ahead:
    def __init__(self, cfg: Config, prompts: Prompts, rollouts: Starts, submit: Any) -> None:
        """`submit`: as Rewards.submit; called with the chunks of a batch as they are finished."""
        self._cfg, self._prompts, self._rollouts, self._submit = cfg, prompts, rollouts, submit
        self._asked: deque[tuple[list[PromptRequest], Future, int]] = deque()
        self._next: int | None = None  # step of the next batch that is to be asked for

    @property
    def prompts_state(self) -> dict[str, Any]:
        """Of the prompts, for a checkpoint: what was asked for ahead when a run ends early is asked for again."""
        state = self._prompts.state
        return state | {"position": state["position"] - len(self._asked) * self._cfg.prompts_per_step}

    def take(self, step: int) -> Written:
        """Ask for what may be asked for at the beginning of `step`, and wait for the last response of its own batch.

        Raises what writing it, or what was to be done before it, raised.
        """
        cfg = self._cfg
        self._next = step if self._next is None else self._next
        while (
            self._next <= cfg.run.steps and asked_at(self._next, cfg.rollout.max_staleness, cfg.run.save_every) <= step
        ):
            requests = self._prompts.take(cfg.prompts_per_step, cfg.rollout.n_samples_per_prompt)
            self._asked.append((requests, self._rollouts.start(requests, self._submit), step - 1))
            self._next += 1
        requests, future, version = self._asked.popleft()
        pending, seconds = future.result()
        return Written(requests=requests, pending=pending, seconds=seconds, version=version)
