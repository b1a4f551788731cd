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
from typing import Any, Protocol

from core.schema import Config
from core.trajectory import PromptRequest
from core.under_way import Written


class Prompts(Protocol):
    position: int  # prompts taken so far

    @property
    def state(self) -> dict[str, Any]: ...

    def take(self, n_prompts: int, n_samples_per_prompt: int = 1) -> list[PromptRequest]: ...


class Starts(Protocol):
    def start_batch(self, requests: list[PromptRequest], submit: Any) -> Future: ...


def asked_at(step: int, max_staleness: int, save_every: int) -> int:
    """The step at whose beginning the batch of `step` is asked for; steps count from 1."""
    after_checkpoint = (step - 1) // save_every * save_every + 1
    return max(after_checkpoint, step - max_staleness)


def taken_until(cfg: Config, step: int) -> int:
    """How many prompts are taken when the batch of `step` is asked for: those of all steps up to it, and
    `rollout.extra_prompts` besides; the last steps use these up."""
    return min(cfg.run.steps * cfg.prompts_per_step, step * cfg.prompts_per_step + cfg.rollout.extra_prompts)


class Ahead:
    def __init__(self, cfg: Config, prompts: Prompts, rollouts: Starts, submit: Any) -> None:
        """`submit`: as Rewards.submit; called with the chunks of a batch as they are finished."""
        self._cfg, self._prompts, self._rollouts, self._submit = cfg, prompts, rollouts, submit
        # Of each batch that is asked for: the version that writes it, and where the prompts stood after it was.
        self._asked: deque[tuple[Future, int, int]] = deque()
        self._next: int | None = None  # step of the next batch that is to be asked for
        self._position = prompts.position

    @property
    def prompts_state(self) -> dict[str, Any]:
        """Of the prompts, for a checkpoint: what was asked for ahead when a run ends early is asked for again."""
        return self._prompts.state | {"position": self._position}

    def take(self, step: int) -> tuple[Written, int]:
        """Ask for what may be asked for at the beginning of `step`, and wait for the last response of its own batch.

        Returns it, and the version of the weights that wrote its last tokens. Raises what writing it, or what was to be
        done before it, raised.
        """
        cfg = self._cfg
        self._next = step if self._next is None else self._next
        while (
            self._next <= cfg.run.steps and asked_at(self._next, cfg.rollout.max_staleness, cfg.run.save_every) <= step
        ):
            n_prompts = max(0, taken_until(cfg, self._next) - self._prompts.position)
            requests = self._prompts.take(n_prompts, cfg.rollout.n_samples_per_prompt)
            future = self._rollouts.start_batch(requests, self._submit)
            self._asked.append((future, step - 1, self._prompts.position))
            self._next += 1
        future, version, self._position = self._asked.popleft()
        return future.result(), version
