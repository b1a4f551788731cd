"""Trackers: the numbers of a run to TensorBoard and W&B, through the tracker classes of Accelerate.

    trackers = Trackers.open(cfg, folder, ids={}, resumed_from=None, note=print)    # the main process only
    trackers({"reward/total": 2.41}, 1)                                             # what RunLog calls
    trackers.show(exhibit)                                                          # what Gallery calls, before its row
    trackers.ids                                                                    # into every checkpoint
    trackers.close(exit_code)                                                       # waits CLOSE_S per tracker at most

One run and one writer per job: other ranks never make one of these. No tracker is worth a run, nor another tracker:
what fails is said once in one line, and RunLog counts the step that some tracker did not get. Nor is one worth a
second: each has a thread of its own, which takes from a queue what the loop puts into it.

    loop  --> queue of ROOM things --> thread --> client     full: the thing is left out, said, and its step counted

**TensorBoard** (launch/tensorboard_tracker.py) writes `<folder>/<log.project>/`, one file per process with the settings
in it. After a resume the new file begins with a mark (`purge_step`) that hides what the lost process wrote after the
checkpoint. **W&B**: launch/wandb_tracker.py.
"""

import os
import queue
import uuid
from collections.abc import Callable
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Protocol

import psutil

from core.diagnosis import Verdict
from core.peer_names import with_peer_names
from core.schema import Config
from launch.tensorboard_tracker import TensorBoard
from launch.wandb_tracker import SERVICE, WandB
from trainer.gallery import Exhibit
from trainer.run_log import AlreadySaid

INIT_S = 60.0  # for W&B to answer; its client adds up to 10 s before it gives up
CLOSE_S = 60.0  # for a tracker to write or upload what it still holds
CLOSE_MODELS_S = 1800.0  # the same where models are among it
ROOM = 512  # things that may wait for a tracker


class _Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...

    def alert(self, verdict: Verdict) -> None: ...

    def show(self, exhibit: Exhibit) -> None: ...

    def checkpoint(self, folder: Path, step: int) -> None: ...

    def close(self, exit_code: int) -> None: ...


class _Behind:
    """A tracker whose calls return at once: its thread makes them, in their order.

    `log` raises AlreadySaid once for each earlier step that the tracker did not get.
    """

    def __init__(self, tracker: _Tracker, say: Callable[[str, Exception], None]) -> None:
        """`say`: told of what failed, from either thread."""
        self._tracker, self._say = tracker, say
        self._queue: queue.Queue[tuple[str, str, tuple[Any, ...]] | None] = queue.Queue(ROOM)
        self._lock, self._missed = Lock(), 0
        self._thread = Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def log(self, values: dict[str, float], step: int) -> None:
        self._put("log", f"failed at step {step}", values, step)
        with self._lock:
            missed, self._missed = self._missed, max(0, self._missed - 1)
        if missed:
            raise AlreadySaid("an earlier step")

    def alert(self, verdict: Verdict) -> None:
        self._put("alert", f"did not take the verdict of step {verdict.step}", verdict)

    def show(self, exhibit: Exhibit) -> None:
        self._put("show", f"did not show the responses of step {exhibit.step}", exhibit)

    def checkpoint(self, folder: Path, step: int) -> None:
        self._put("checkpoint", f"did not keep the checkpoint of step {step}", folder, step)

    def close(self, exit_code: int) -> None:
        """Waits for what is in the queue, and for the tracker: whoever calls has a deadline of his own."""
        self._queue.put(None)
        self._thread.join()
        self._tracker.close(exit_code)

    def _put(self, call: str, failed: str, *arguments: Any) -> None:
        try:
            self._queue.put_nowait((call, failed, arguments))
        except queue.Full:
            self._fail(call, failed, TimeoutError(f"{ROOM} things before it are waiting to be sent"))

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            call, failed, arguments = item
            try:
                getattr(self._tracker, call)(*arguments)
            except Exception as error:  # of any client of any service
                self._fail(call, failed, error)

    def _fail(self, call: str, failed: str, error: Exception) -> None:
        self._say(failed, error)
        with self._lock:
            self._missed += call == "log"


class Trackers:
    """The trackers of one job. Callable as RunLog wants it; steps up to `resumed_from` are there already and ignored.

    Attributes:
        ids: tracker name -> run id, to be saved in checkpoints and given back when the run is resumed.
    """

    def __init__(
        self,
        *,
        ids: dict[str, str],
        resumed_from: int | None,
        note: Callable[[str], None],
        peer_names: str = "none",
        close_s: float | None = None,
    ) -> None:
        self.ids = dict(ids)
        self._after = -1 if resumed_from is None else resumed_from
        self._note = note
        self._peer_names = peer_names
        self._close_s = CLOSE_S if close_s is None else close_s
        self._open: dict[str, _Tracker] = {}
        self._failed: set[str] = set()  # each is named once
        self._absent = 0  # asked for, but could not be opened

    @classmethod
    def open(
        cls,
        cfg: Config,
        folder: Path,
        *,
        ids: dict[str, str],
        resumed_from: int | None,
        note: Callable[[str], None],
    ) -> "Trackers":
        """Open what `cfg.log.trackers` names. A tracker that cannot be opened is said, and missing.

        Args:
            folder: the run folder; nothing is written outside it.
            ids: `ids` of the process that this one continues, {} for a new run.
            resumed_from: the last step in the checkpoint that training continues from, None for a new run.
            note: says one line to the user, from any thread.
        """
        close_s = CLOSE_S if {*cfg.log.artifacts} <= {"record"} else CLOSE_MODELS_S
        self = cls(ids=ids, resumed_from=resumed_from, note=note, peer_names=cfg.log.peer_names, close_s=close_s)
        folder = Path(folder).absolute()
        if "wandb" in cfg.log.trackers:
            # An agent of a W&B sweep waits for the run that it named itself.
            given = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
            self.ids.setdefault("wandb", given or uuid.uuid4().hex[:12])
        makers: dict[str, Callable[[], _Tracker]] = {
            "tensorboard": lambda: TensorBoard(cfg, folder, resumed_from),
            # W&B gives up before `close` gives up on its process, so that there is an exit code.
            "wandb": lambda: WandB(
                cfg, folder, self.ids["wandb"], self._after, note, init_s=INIT_S, finish_s=close_s / 2
            ),
        }
        for name in dict.fromkeys(cfg.log.trackers):
            try:
                tracker = makers[name]()
            except Exception as error:  # of any client of any service
                self._absent += 1
                self._say(name, "could not be opened", error)
                continue
            self._open[name] = _Behind(tracker, lambda what, error, name=name: self._say(name, what, error))
        return self

    def __call__(self, values: dict[str, float], step: int) -> None:
        """Every tracker gets the values, whatever the others do.

        Raises:
            AlreadySaid: some tracker did not get them, or earlier ones; RunLog counts it.
        """
        if step <= self._after:
            return
        values = with_peer_names(self._peer_names, values)
        missed = self._absent
        for name, tracker in self._open.items():
            try:
                tracker.log(values, step)
            except AlreadySaid:
                missed += 1
            except Exception as error:
                missed += 1
                self._say(name, f"failed at step {step}", error)
        if missed:
            raise AlreadySaid(f"{missed} of the trackers did not get step {step}")

    def alert(self, verdict: Verdict) -> None:
        """W&B sends it to whoever asked for alerts, TensorBoard shows it under its texts."""
        if verdict.step > self._after:
            self._each(lambda tracker: tracker.alert(verdict), f"did not take the verdict of step {verdict.step}")

    def show(self, exhibit: Exhibit) -> None:
        """Responses and histograms of a step, before its numbers."""
        if exhibit.step > self._after:
            self._each(lambda tracker: tracker.show(exhibit), f"did not show the responses of step {exhibit.step}")

    def checkpoint(self, folder: Path, step: int) -> None:
        """A checkpoint that was written whole; who keeps files may take a copy."""
        self._each(lambda tracker: tracker.checkpoint(folder, step), f"did not keep the checkpoint of step {step}")

    def close(self, exit_code: int) -> None:
        """Write or upload the rest; W&B shows a run with another exit code than 0 as failed. May be called twice."""
        for name, tracker in self._open.items():
            try:
                _within(self._close_s, lambda tracker=tracker: tracker.close(exit_code))
            except Exception as error:
                self._say(name, "did not close well", error)
        self._open = {}

    def _each(self, call: Callable[[_Tracker], None], failed: str) -> None:
        for name, tracker in self._open.items():
            try:
                call(tracker)
            except Exception as error:
                self._say(name, failed, error)

    def _say(self, name: str, what: str, error: Exception) -> None:
        if name not in self._failed:
            self._failed.add(name)
            words = " ".join(f"{type(error).__name__}: {error}".split())
            self._note(f"warning: {name} {what}, training goes on without it: {words}")


def _within(deadline_s: float, close: Callable[[], None]) -> None:
    """Run `close` and raise what it raises, or TimeoutError after the deadline.

    What has missed it would keep the interpreter from exiting as well: W&B's client waits for its process there. So
    that process is ended; it is found among our own children.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            close()
        except BaseException as error:
            raised.append(error)

    thread = Thread(target=run, name="close-tracker", daemon=True)
    thread.start()
    thread.join(deadline_s)
    if thread.is_alive():
        for child in psutil.Process().children():
            try:
                if child.name().startswith(SERVICE):
                    child.kill()
            except psutil.NoSuchProcess:
                pass
        thread.join(1.0)  # it now learns that nobody will answer
        raise TimeoutError(f"no end after {deadline_s:g} s; what was not written is lost")
    if raised:
        raise raised[0]
