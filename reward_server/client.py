"""RewardClient: passes references of finished chunks on to the reward servers and fetches only what is scored.

`submit` waits for nothing of its own (it consumes an iterator of the rollout group, which does); `collect` waits for
scores, with a deadline per chunk: that of chunks which wait before it at the same server is theirs. A server that died
is started again and given the same references. Where batches are written ahead, `submit` is called by another thread.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from core.faults import Fault, ProcessFault, RewardFault
from core.schema import RewardConfig
from core.trajectory import Trajectory
from reward_server.reference import ReferenceSpec
from reward_server.server import RewardServer, ScoreFailure

MAX_SERVER_LOSSES = 3
MAX_WAITING_CHUNKS = 64  # calls that a server which joins chunks holds at a time
CLOSE_S = 1.0


@dataclass(frozen=True, eq=False)  # each is itself: arrays in a chunk have no one answer to ==
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
        servers: int = 1,
        device: str = "cpu",
        actor_options: Callable[[int], dict[str, Any]] = lambda number: {},
        batch_size: int | None = None,
        reference: ReferenceSpec | None = None,
    ) -> None:
        """`servers` replicas, which join chunks to `batch_size` responses, or none; each has the `reference` too, if
        there is one. `actor_options`: number of a replica -> Ray's options for the seat of its GPU, if `device` is
        cuda."""
        self._args = (components, load_tokenizer)
        self._kwargs = {"functions": functions, "device": device, "batch_size": batch_size}
        self._kwargs["reference"] = reference
        # Actors take no CPU of Ray's count: on a small host the last one would wait for ever.
        self._actor = {"num_cpus": 0, "num_gpus": 0, "max_restarts": 0}
        if batch_size is not None:
            self._actor["max_concurrency"] = MAX_WAITING_CHUNKS
        self._timeout_s, self._max_dropped_frac, self._note = timeout_s, max_dropped_frac, note
        self.counters: Counter[str] = Counter()
        self.dropped: set[str] = set()
        """Uids of the samples that were dropped, in this process."""
        self._seat = actor_options
        self._servers = [self._spawn(number) for number in range(servers)]
        self._sent = 0
        self._unanswered: list[PendingScores] = []  # in the order in which they were sent

    def _spawn(self, number: int) -> Any:
        options = self._actor | self._seat(number)
        return ray.remote(RewardServer).options(**options).remote(*self._args, **self._kwargs)

    def wait_ready(self) -> list[int]:
        """Until tokenizer and components are loaded; the process ids of the servers. Raises what they raised."""
        return [self._greet(server) for server in self._servers]

    def _greet(self, server: Any) -> int:
        try:
            return ray.get(server.hello.remote(), timeout=self._timeout_s)
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
        server = self._servers[self._sent % len(self._servers)]
        self._sent += 1
        scores = PendingScores(chunk, server, server.score.remote(chunk))
        self._unanswered.append(scores)
        return scores

    def collect(self, pending: list[PendingScores], at_least: int = 0) -> list[Trajectory]:
        """The scored trajectories, sorted by (ordinal, k), each once. `run.max_dropped_frac` is a share of them, or of
        `at_least` samples where there are fewer: of those of a step, of which only a part may have been written now.

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
            self._drop(failures, max(at_least, len(scored) + len(failures)))
        return sorted(scored.values(), key=lambda t: t.order)

    def close(self) -> None:
        """Have the components let go of what they hold, then end the servers."""
        # One that hangs or died cannot; it is ended all the same.
        ray.wait([server.close.remote() for server in self._servers], num_returns=len(self._servers), timeout=CLOSE_S)
        for server in self._servers:
            ray.kill(server)

    def _fetch(self, scores: PendingScores, scored: dict[str, Trajectory]) -> list[ScoreFailure]:
        while True:
            try:
                self._wait_for_those_before(scores)
                trajectories, failures = ray.get(scores.answer, timeout=self._timeout_s)
                break
            except RayTaskError as error:
                raise self._cause(error) from None
            except (RayActorError, GetTimeoutError) as error:
                if scores.server in self._servers:  # else it was replaced already, for another chunk
                    self._replace(scores.server, error)
                self._unanswered.remove(scores)
                scores = self._send(scores.chunk)
        self._unanswered.remove(scores)
        for trajectory in trajectories:
            uid = trajectory.request.sample_uid
            if uid in scored:
                self.counters["duplicates_dropped"] += 1
            else:
                scored[uid] = trajectory
        return failures

    def _wait_for_those_before(self, scores: PendingScores) -> None:
        """Chunks of a batch that is written ahead may stand before this one at its server; each has a deadline of its
        own. Raises GetTimeoutError. What they answered is read by whoever collects them."""
        for other in list(self._unanswered):
            if other is scores:
                return
            if other.server is scores.server:
                ready, _ = ray.wait([other.answer], timeout=self._timeout_s, fetch_local=False)
                if not ready:
                    raise GetTimeoutError("a chunk before this one was not scored within its deadline")

    def _replace(self, server: Any, error: Exception) -> None:
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
        ray.kill(server)
        number = self._servers.index(server)
        fresh = self._servers[number] = self._spawn(number)
        self._greet(fresh)

    def _drop(self, failures: list[ScoreFailure], n_samples: int) -> None:
        if not failures:
            return
        self.counters["samples_dropped"] += len(failures)
        self.dropped.update(failure.trajectory.request.sample_uid for failure in failures)
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
