"""RolloutGroup: the driver's side of the rollout workers. Deals out chunks, replaces workers that die or hang.

    driver (one thread)                               worker i (one call at a time)
      generate(chunks)  --chunk-->                      generate            -> part by part: refs, and a receipt
      wait: any receipt, or the nearest deadline  <---  (dies, hangs, answers)
      yield refs of a part that is ready                the rest of it, then the next chunk
      open_deal, deal --bucket-->                       its digest, for its node   (while buckets are still made)
      update_weights --manifest, digests, buckets-->    begin, receive*, commit -> WeightAck

By a transport of another kind:
      open_update, stage --manifest, ...-->             begin, receive*            (while buckets are still made)
      update_weights --digests, probe-->                commit -> WeightAck

What waits here waits for a receipt or an acknowledgement, with a deadline of `timeout_s`; a worker that misses it is
killed, replaced and what is missing of its chunk dealt out again with attempt + 1. Ray retries nothing by itself: a
retried call could run twice unseen. A replacement gets the latest weights before its first chunk. `close` kills all
workers.

A part is finished when its trajectories lie on the driver's node: until then its worker's node may take them with it.
A worker that no node may have waits for one that joins; if all of them do, for `timeout_s`. One whose node was lost
moves, between two calls of `generate`, to a node that joined later.
"""

import functools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import (
    ActorUnschedulableError,
    GetTimeoutError,
    ObjectLostError,
    OwnerDiedError,
    RayActorError,
    RayTaskError,
)

from core.faults import Fault, ProcessFault, TransitFault
from core.trajectory import PromptRequest, Trajectory
from core.weights import Probe, WeightAck, WeightManifest
from rollout.host_digests import Asked, HostDigests
from rollout.worker import RolloutWorker, WorkerReady

LOOK_S = 1.0  # between two looks for a node that joined
LOCAL_S = 10.0  # to map what lies on this node already
NETWORK = "Look at that node and its network; the same command goes on from the last checkpoint"
LONG = 300  # tensors of a manifest that is put into the object store, not pickled for each worker
LOST = (RayActorError, ActorUnschedulableError, ObjectLostError, GetTimeoutError)  # a worker, or what it wrote


@dataclass(frozen=True)
class WeightUpdate:
    """One version as it lies in the object store: kept for workers that start later."""

    manifest: WeightManifest
    buckets: list[Any]  # ObjectRefs of list of [n] uint8
    digests: tuple[str, ...]  # of each bucket
    probe: Probe
    verify: Callable[[WeightAck], None]  # raises InvariantFault if a worker computes other numbers than the learner

    @functools.cached_property
    def manifest_argument(self) -> Any:
        """The manifest as workers get it: a thousand tensors take 2 ms to pickle, each time."""
        return ray.put(self.manifest) if len(self.manifest.specs) > LONG else self.manifest


@dataclass
class _Slot:
    """A place for a worker. Whoever sits in it changes when a worker is replaced; `incarnation` counts them."""

    index: int
    incarnation: int = -1
    actor: Any = None
    receipt: Any = None  # ObjectRef of the end of what it is doing now: starting (until `ready`), or a part of `chunk`
    ready: bool = False
    node: str = ""  # of the worker, once it is ready: whose object store it maps
    chunk: dict[int, PromptRequest] = field(default_factory=dict)  # what is missing of it, by place
    number: int = -1  # of that chunk in the call of `generate`
    parts: Any = None  # ObjectRefGenerator of results and receipts, in turn
    result: Any = None  # ObjectRef of the trajectories of a part
    coming: list[Any] = field(default_factory=list)  # what is not on this node yet: `parts`, or result and receipt
    deadline: float = 0.0
    lost: str = ""  # of the worker before this one: which, where, when

    def expect(self, receipt: Any, timeout_s: float) -> None:
        self.receipt, self.coming, self.deadline = receipt, [receipt], time.monotonic() + timeout_s

    def expect_parts(self, parts: Any, timeout_s: float) -> None:
        self.parts, self.coming, self.deadline = parts, [parts], time.monotonic() + timeout_s

    def arrived(self, news: list[Any]) -> None:
        """Of what is coming, `news` is there."""
        if self.parts in self.coming and self.parts in news:
            try:
                ref = next(self.parts)
            except StopIteration:  # the last one was an error
                self.receipt, self.coming = self.result, []
                return
            if self.result is None:
                self.result = ref
            else:
                self.receipt, self.coming = ref, [self.result, ref]
            return
        self.coming = [x for x in self.coming if x not in news]

    def vacate(self) -> None:
        self.actor = self.receipt = self.result = self.parts = None
        self.ready, self.chunk, self.coming = False, {}, []

    @property
    def name(self) -> str:
        return f"worker-{self.index}" + (f".{self.incarnation}" if self.incarnation else "")


class RolloutGroup:
    def __init__(
        self,
        workers: list[int],
        make_args: Callable[[str], tuple[tuple, dict]],
        *,
        actor_options: Callable[[int], dict[str, Any] | None],
        timeout_s: float,
        max_losses: int,
        note: Callable[[str], None],
        rest: bool = False,
        where: Callable[[int], tuple[str, bool]] = lambda number: ("", False),
        moves: Callable[[int], bool] = lambda number: False,
    ) -> None:
        """
        Args:
            workers: numbers of the workers in the whole job that this group has.
            make_args: name of a worker -> positional and keyword arguments of its `RolloutWorker`.
            actor_options: number of a worker -> Ray's options for it (num_cpus, runtime_env, the seat of its GPU),
                asked at every start; None where no node may have it, for now. Raises ProcessFault where it can have
                no place any more.
            note: told in one line of each worker that is lost.
            rest: tell the workers when all chunks are written, so that they free their devices until the next call.
            where: number of a worker that was started -> on which node that is, in words, and whether the node is out
                of reach; asked when the worker is lost.
            moves: number of a worker that serves -> whether it is to be started anew, on another node.
        """
        self._make_args, self._actor_options = make_args, actor_options
        self._timeout_s, self._max_losses, self._note, self._rest = timeout_s, max_losses, note, rest
        self._where, self._moves = where, moves
        self._latest: WeightUpdate | None = None
        self._staging: dict[str, Any] = {}  # name -> actor of the workers that get the version on its way early
        self._dealt: HostDigests | None = None  # of the version on its way, where it travels by the object store
        self._slots = [_Slot(i) for i in workers]
        self._closed = False  # who ended the workers wants no successors
        self.pids: dict[str, int] = {}
        self.counters: Counter[str] = Counter()
        for slot in self._slots:
            if not self._spawn(slot):
                slot.lost, slot.deadline = f"worker-{slot.index} has no node", time.monotonic() + timeout_s

    def wait_ready(self) -> None:
        """Until every worker has loaded its model. Deadline `timeout_s` per worker."""
        while starting := [slot for slot in self._slots if not slot.ready and slot.actor is not None]:
            self._await_any(starting)

    def generate(
        self,
        chunks: list[list[PromptRequest]],
        begun: Mapping[str, Trajectory | None] | None = None,
        most: int | None = None,
        at_least: int | None = None,
    ) -> Iterator[tuple[int, Any, list[Trajectory]]]:
        """Yield (place in `chunks`, ObjectRef of list[Trajectory], unfinished ones) of each part as it is finished.
        Only the unfinished are fetched; without `most` there are none, and the workers rest at the end. Without
        `at_least` a part is a whole chunk.

        `begun`, by sample uid, `most` and `at_least`: as RolloutWorker.generate has them.
        """
        for slot in self._slots:
            if slot.ready and self._moves(slot.index):
                self._note(f"{slot.name} moves to a node that joined the cluster")
                self.pids.pop(slot.name, None)
                ray.kill(slot.actor)
                slot.vacate()
        todo = deque(enumerate(chunks))
        while todo or any(slot.chunk for slot in self._slots):
            self._fill()
            for slot in self._slots:
                if todo and slot.ready and not slot.chunk:
                    self._assign(slot, *todo.popleft(), begun or {}, most, at_least)
            if busy := [slot for slot in self._slots if slot.coming]:
                yield from self._await_any(busy, todo)
        if most is None:
            self.let_rest()

    def let_rest(self) -> None:
        """Until every worker that serves has freed its device, where that is configured: the learner wants it next."""
        if not self._rest:
            return
        for slot in self._slots:
            if slot.ready:
                slot.expect(slot.actor.rest.remote(), self._timeout_s)
        while resting := [slot for slot in self._slots if slot.ready and slot.receipt is not None]:
            self._await_any(resting)

    def open_update(self, manifest: WeightManifest) -> list[str]:
        """Tell every worker that serves which version comes; names of those that were told. Waits for nothing."""
        self._staging = {slot.name: slot.actor for slot in self._slots if slot.ready}
        self.stage("begin_update", manifest)
        return list(self._staging)

    def stage(self, method: str, *args: Any, first: dict[str, tuple] | None = None) -> None:
        """Queue a call, for its part of the opened version, at each worker that was told of it. Waits for nothing: what
        goes wrong is in the answer to the commit. `first`: name -> arguments before `args`, of those named there."""
        for name, actor in self._staging.items():
            if first is None or name in first:
                getattr(actor, method).remote(*(first[name] if first else ()), *args)

    def open_deal(self, manifest: WeightManifest) -> None:
        """A version comes by the object store: its buckets will be dealt to the workers that serve. Waits for
        nothing."""
        serving = [slot for slot in self._slots if slot.ready]
        self._dealt = HostDigests(manifest.version, len(manifest.buckets), serving)

    def deal(self, index: int, bucket: Any) -> None:
        """See HostDigests.deal."""
        self._dealt.deal(index, bucket)

    def update_weights(self, update: WeightUpdate, timeout_s: float) -> int:
        """Have every worker commit a version and verify what each one acknowledges; returns how many did.

        A worker that was not told early gets the buckets now, and so does, once, one that they reached damaged or not
        at all. A worker that dies or misses the deadline is replaced, and its replacement acknowledges in `_await_any`
        before it gets a chunk. Raises what a worker raised (an older version, a second damage), or InvariantFault from
        `verify`. Digests, commits and what is sent again have a deadline of `timeout_s` each.
        """
        self._latest = update
        staging, self._staging = self._staging, {}
        starting = [slot for slot in self._slots if slot.actor is not None and not slot.ready]
        taken = {} if staging else self._taken(update, timeout_s)
        if self._closed:
            raise ProcessFault("the rollout workers were ended while weights were sent to them")
        serving = [slot for slot in self._slots if slot.actor is not None and slot.ready]
        pending = {}
        for slot in serving:
            if staging.get(slot.name) is slot.actor:
                pending[slot.index] = slot.actor.commit_update.remote(update.probe, update.digests)
            else:
                pending[slot.index] = self._send(slot, taken.get(slot.node))
        verified = 0
        for again in (False, True):
            deadline, damaged = time.monotonic() + timeout_s, []
            for slot in serving:
                try:
                    update.verify(ray.get(pending[slot.index], timeout=max(0.0, deadline - time.monotonic())))
                    verified += 1
                except RayTaskError as error:
                    fault = self._fault_of_update(error, slot)
                    if again or not isinstance(fault, TransitFault):
                        raise fault from None
                    self.counters["weights_resent"] += 1
                    self._note(f"{slot.name}: {fault}; they are sent again, through the object store")
                    damaged.append(slot)
                except LOST as error:
                    self._lose(slot, f"while weights of version {update.manifest.version} were sent", error)
            pending = {slot.index: self._send(slot) for slot in damaged}
            serving = damaged
        for slot in starting:  # queue this version behind
            slot.expect(self._send(slot), self._timeout_s)
        return verified

    def _taken(self, update: WeightUpdate, timeout_s: float) -> dict[str, list[str | None]]:
        """Node -> the digest of each bucket as one of its workers took it; None where that one was lost, or failed:
        then each takes it for itself. So it is where one read something else than was sent, and is named: what is truly
        damaged each will find so. Waits for the digests, `timeout_s` in all; who is late then is replaced."""
        dealt, self._dealt = self._dealt, None
        if dealt is None:  # nobody was told early
            self.open_deal(update.manifest)
            dealt, self._dealt = self._dealt, None
            for index, bucket in enumerate(update.buckets):
                dealt.deal(index, bucket)
        of_update = dealt.version == update.manifest.version
        asked = [a for a in dealt.asked if of_update and a.bucket == update.buckets[a.index]]
        if asked:
            ray.wait([a.digest for a in asked], num_returns=len(asked), timeout=timeout_s)
        said: list[tuple[Asked, str]] = []
        failed: set[str] = set()
        for a in asked:
            if not a.there or a.slot.name in failed:
                continue
            try:
                said.append((a, ray.get(a.digest, timeout=0)))
            except RayTaskError as error:  # it will say more when it is to commit
                failed.add(a.slot.name)
                cause = f"{type(error.cause).__name__}: {error.cause}"
                self._note(f"{a.slot.name} took no digest of bucket {a.index} for its host: {cause}")
            except LOST as error:
                self._lose(a.slot, f"while weights of version {update.manifest.version} were sent", error)
        taken: dict[str, list[str | None]] = {}
        for a, digest in said:
            of_node = taken.setdefault(a.node, [None] * len(update.buckets))
            if digest != update.digests[a.index]:
                told = f"digest {digest[:12]}, sent {update.digests[a.index][:12]}"
                self._note(f"{a.slot.name} read bucket {a.index} for its host as {told}: each worker reads it itself")
            elif a.there:  # one that was lost since holds nothing in its place any more
                of_node[a.index] = digest
        return taken

    def _fault_of_update(self, error: RayTaskError, slot: _Slot) -> Exception:
        """Of a worker that was to take a version. Ray makes a bucket that is lost look like the worker's own end too:
        whoever tells the two apart asks for a RayTaskError first."""
        lost = f"weights of version {self._latest.manifest.version} are lost" if self._latest else "what it was sent"
        if isinstance(error.cause, OwnerDiedError):
            return ProcessFault(f"{lost}: the process that put them into the object store died")
        if isinstance(error.cause, LOST):
            return TransitFault(f"{lost}: {error.cause}")
        return self._cause(error, slot)

    def close(self) -> None:
        """Kill every worker; what they were writing is lost. May be called while another thread waits for them: that
        one raises ProcessFault."""
        self._closed = True
        for slot in self._slots:
            if slot.actor is not None:
                ray.kill(slot.actor)
                slot.actor = None

    def _fill(self) -> None:
        """Start a worker in each slot that is vacant, where a node may have it now. Raises ProcessFault where all have
        been vacant until their deadline, or were closed."""
        if self._closed:
            raise ProcessFault("the rollout workers were ended while they wrote")
        for slot in self._slots:
            if slot.actor is None:
                self._spawn(slot)
        if any(slot.actor is not None for slot in self._slots):
            return
        last = max(self._slots, key=lambda slot: slot.deadline)
        if time.monotonic() >= last.deadline:
            raise ProcessFault(
                f"{last.lost}; no other node may have it, and none has joined within rollout.timeout_s ="
                f" {self._timeout_s:g} s. {NETWORK}"
            )
        time.sleep(LOOK_S)

    def _spawn(self, slot: _Slot) -> bool:
        """Start the next worker of a slot; False where no node may have it, for now."""
        options = self._actor_options(slot.index)
        if options is None:
            return False
        slot.incarnation += 1
        args, kwargs = self._make_args(slot.name)
        slot.actor = ray.remote(RolloutWorker).options(max_restarts=0, **options).remote(*args, **kwargs)
        slot.ready, slot.chunk = False, {}
        hello = slot.actor.hello.remote()
        slot.expect(hello if self._latest is None else self._send(slot), self._timeout_s)
        return True

    def _send(self, slot: _Slot, of_host: list[str | None] | None = None) -> Any:
        """Queue a whole weight update at a worker; the ObjectRef of its acknowledgement. `of_host`: what a worker of
        its node said of each bucket; without it, this one reads all itself."""
        if slot.actor is None:  # by `close`, in another thread
            raise ProcessFault("the rollout workers were ended while weights were sent to them")
        update = self._latest
        of_host = of_host or [None] * len(update.buckets)
        take = slot.actor.take_update
        return take.remote(update.manifest_argument, update.probe, update.digests, of_host, *update.buckets)

    def _assign(
        self,
        slot: _Slot,
        number: int,
        chunk: list[PromptRequest],
        begun: Mapping[str, Trajectory | None],
        most: int | None,
        at_least: int | None,
    ) -> None:
        slot.number, slot.chunk = number, dict(enumerate(chunk))
        starts = [begun.get(request.sample_uid) for request in chunk] if begun else None
        write = slot.actor.generate.options(num_returns="streaming")
        slot.expect_parts(write.remote(chunk, starts, most, at_least), self._timeout_s)

    def _await_any(self, slots: list[_Slot], todo: deque | None = None) -> list[tuple[int, Any, list[Trajectory]]]:
        """Wait until one of the slots has news or a deadline passes; returns what `generate` yields of parts that are
        finished."""
        timeout = max(0.0, min(slot.deadline for slot in slots) - time.monotonic())
        news, _ = ray.wait([ref for slot in slots for ref in slot.coming], num_returns=1, timeout=timeout)
        finished = []
        for slot in slots:
            slot.arrived(news)
            overdue = time.monotonic() >= slot.deadline
            if slot.coming and not overdue:
                continue
            try:
                answer = self._answer(slot)
            except (RayTaskError, *LOST) as error:
                if isinstance(error, RayTaskError) and not slot.chunk:
                    raise self._fault_of_update(error, slot) from None
                if not isinstance(error, LOST):
                    raise self._cause(error, slot) from None
                if slot.chunk:
                    retry = [replace(request, attempt=request.attempt + 1) for request in slot.chunk.values()]
                    self.counters["prompts_redispatched"] += len(retry)
                    todo.appendleft((slot.number, retry))
                doing = "wrote" if slot.chunk else "freed its device" if slot.ready else "started"
                self._lose(slot, f"while it {doing}", error)
                continue
            slot.receipt = None
            if slot.chunk:
                finished.append((slot.number, slot.result, answer.unfinished))
                for place in answer.places:
                    del slot.chunk[place]
                slot.result, slot.coming = None, [slot.parts] if slot.chunk else []
            elif not slot.ready:
                if isinstance(answer, WeightAck):
                    self._latest.verify(answer)
                self._welcome(slot, answer)
        return finished

    @staticmethod
    def _answer(slot: _Slot) -> Any:
        """What the receipt of a slot holds. Raises what Ray raises, GetTimeoutError where it has not come."""
        if slot.receipt is None:
            raise GetTimeoutError(f"{slot.name} handed on no part of its chunk within its deadline")
        # What was written too, though it is for others: if its node took it along, this is where that shows.
        both = [slot.receipt] if slot.result is None else [slot.receipt, slot.result]
        return ray.get(both, timeout=0 if slot.coming else LOCAL_S)[0]

    def _welcome(self, slot: _Slot, answer: WorkerReady | WeightAck) -> None:
        slot.ready, slot.node = True, answer.node
        self.pids[slot.name] = answer.pid
        if slot.incarnation:
            version = f" with weights of version {self._latest.manifest.version}" if self._latest else ""
            self._note(f"{slot.name} (pid {answer.pid}) serves{version}")

    def _lose(self, slot: _Slot, when: str, error: Exception) -> None:
        """Kill what is left of a worker (it may only hang) and start its successor. Raises ProcessFault if too many."""
        if self._closed:
            raise ProcessFault(f"{slot.name} was ended {when}")
        if getattr(error, "actor_init_failed", False):  # its constructor raised: it would again in any successor
            raise ProcessFault(f"{slot.name} cannot start: {error}")
        place, out_of_reach = self._where(slot.index)
        reason = "missed its deadline" if isinstance(error, GetTimeoutError) else "died"
        slot.lost = f"{slot.name}{f' {place},' if place else ''} {reason} {when}"
        self.counters["worker_lost"] += 1
        self.pids.pop(slot.name, None)
        ray.kill(slot.actor)
        slot.vacate()
        if self.counters["worker_lost"] > self._max_losses:
            remedy = NETWORK if out_of_reach else "Look at its last words above, often: no memory left"
            raise ProcessFault(
                f"{slot.lost}, loss {self.counters['worker_lost']} of a rollout worker; rollout.max_worker_losses is"
                f" {self._max_losses}. {remedy}"
            )
        if self._spawn(slot):
            self._note(f"{slot.lost}; a new one starts and its prompts are dealt out again")
        else:
            slot.deadline = time.monotonic() + self._timeout_s
            self._note(f"{slot.lost}; no other node may have it, and it waits for one to join the cluster")

    @staticmethod
    def _cause(error: RayTaskError, slot: _Slot) -> Exception:
        """An exception of the worker's own code: it would come again on any worker."""
        cause = error.cause
        if isinstance(cause, Fault):
            return cause
        return ProcessFault(f"{slot.name} failed: {type(cause).__name__}: {cause}\n{error}")
