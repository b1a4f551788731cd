"""RewardClient: passes references of finished chunks on to the reward server and fetches only what is scored.

`submit` waits for nothing of its own (it consumes an iterator of the rollout group, which does); `collect` waits for
scores, with a deadline per chunk. A server that died is started again and given the same references.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from core.faults import Fault, ProcessFault, RewardFault
from core.schema import RewardConfig
from core.trajectory import Trajectory
from reward_server.server import RewardServer, ScoreFailure

MAX_SERVER_LOSSES = 3


@dataclass(frozen=True)
class PendingScores:
    """A chunk on its way: if `server` dies, `chunk` is sent again."""

    chunk: Any  # ObjectRef of list[Trajectory], or the list
    server: Any
    answer: Any  # ObjectRef of what RewardServer.score returns


class RewardClient:
    def __init__(
        self,
        components: dict[str, RewardConfig],
        load_tokenizer: Callable[[], Any],
        *,
        functions: dict[str, Callable] | None,
        timeout_s: float,
        max_dropped_frac: float,
        note: Callable[[str], None],
    ) -> None:
        self._args, self._functions = (components, load_tokenizer), functions
        self._timeout_s, self._max_dropped_frac, self._note = timeout_s, max_dropped_frac, note
        self.counters: Counter[str] = Counter()
        self._server = self._spawn()

    def _spawn(self) -> Any:
        # Actors take no CPU of Ray's count: on a small host the last one would wait for ever.
        remote = ray.remote(RewardServer).options(num_cpus=0, max_restarts=0)
        return remote.remote(*self._args, functions=self._functions)

    def wait_ready(self) -> int:
        """Until tokenizer and components are loaded; returns the server's process id. Raises what they raised."""
        try:
            return ray.get(self._server.hello.remote(), timeout=self._timeout_s)
        except RayTaskError as error:
            raise self._cause(error) from None
        except RayActorError as error:
            raise self._start_failure(error) from None
        except GetTimeoutError:
            raise ProcessFault(
                f"the reward server was not ready within resources.reward_timeout_s = {self._timeout_s:g} s"
            ) from None

    def submit(self, chunks: Iterable[Any]) -> list[PendingScores]:
        """Send each chunk (an ObjectRef of trajectories) to be scored the moment it is finished."""
        return [self._send(chunk) for chunk in chunks]

    def _send(self, chunk: Any) -> PendingScores:
        return PendingScores(chunk, self._server, self._server.score.remote(chunk))

    def collect(self, pending: list[PendingScores]) -> list[Trajectory]:
        """The scored trajectories, sorted by (ordinal, k), each once.

        A sample that a component failed on is tried once more, alone, then dropped and counted.
        Raises RewardFault above `run.max_dropped_frac`, ProcessFault if the server keeps dying or misses its deadline.
        """
        scored: dict[str, Trajectory] = {}
        failures: list[ScoreFailure] = []
        for scores in pending:
            failures += self._fetch(scores, scored)
        if failures:
            if not self.counters["scores_retried"]:
                self._note(f"{len(failures)} samples have no reward yet; the first: {failures[0].reason}")
            again = [self._send([failure.trajectory]) for failure in failures if failure.try_alone]
            self.counters["scores_retried"] += len(again)
            failures = [failure for failure in failures if not failure.try_alone]
            failures += [failure for scores in again for failure in self._fetch(scores, scored)]
            self._drop(failures, len(scored) + len(failures))
        return sorted(scored.values(), key=lambda t: t.order)

    def close(self) -> None:
        ray.kill(self._server)

    def _fetch(self, scores: PendingScores, scored: dict[str, Trajectory]) -> list[ScoreFailure]:
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                trajectories, failures = ray.get(scores.answer, timeout=max(0.0, deadline - time.monotonic()))
                break
            except RayTaskError as error:
                raise self._cause(error) from None
            except (RayActorError, GetTimeoutError) as error:
                if scores.server is self._server:  # else it was replaced already, for another chunk
                    self._replace(error)
                scores = self._send(scores.chunk)
                deadline = time.monotonic() + self._timeout_s
        for trajectory in trajectories:
            uid = trajectory.request.sample_uid
            if uid in scored:
                self.counters["duplicates_dropped"] += 1
            else:
                scored[uid] = trajectory
        return failures

    def _replace(self, error: Exception) -> None:
        hung = isinstance(error, GetTimeoutError)
        self.counters["worker_lost"] += 1
        if self.counters["worker_lost"] > MAX_SERVER_LOSSES:
            raise ProcessFault(
                f"the reward server was lost {MAX_SERVER_LOSSES + 1} times; "
                + (
                    f"a chunk took longer than resources.reward_timeout_s = {self._timeout_s:g} s"
                    if hung
                    else str(error)
                )
            )
        self._note(f"the reward server {'missed its deadline' if hung else 'died'}; a new one starts and scores again")
        ray.kill(self._server)
        self._server = self._spawn()
        self.wait_ready()

    def _drop(self, failures: list[ScoreFailure], n_samples: int) -> None:
        if not failures:
            return
        self.counters["samples_dropped"] += len(failures)
        first = failures[0]
        if len(failures) > self._max_dropped_frac * n_samples:
            raise RewardFault(
                f"{len(failures)} of {n_samples} samples have no reward (run.max_dropped_frac ="
                f" {self._max_dropped_frac:g}); the first: {first.reason}"
            )
        self._note(f"{len(failures)} samples dropped, no reward after two tries; the first: {first.reason}")

    @staticmethod
    def _cause(error: RayTaskError) -> Exception:
        cause = error.cause
        return cause if isinstance(cause, Fault) else ProcessFault(f"the reward server failed: {error}")

    @staticmethod
    def _start_failure(error: RayActorError) -> Exception:
        return ProcessFault(f"the reward server could not start: {error}")
