"""RunLog: what a run says about itself, in three places at once: metrics.jsonl, the trackers, and the terminal.

    with RunLog(run_dir, total_steps=32, trackers=accelerator.log) as log:      # RunLog.silent() on other ranks
        for step in range(1, 33):
            with log.time("rollout"):
                ...
            log.step(step, {"reward/total": 2.41}, samples=256)

The file comes first: a step is one line, appended whole by one write, before anything that can fail is shown or sent.
On a terminal a panel is redrawn twice a second by a thread of rich, which only reads; elsewhere each step is one line.
All methods but `note` belong to the thread that made the log.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from time import time as wall_clock
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from core.diagnosis import Diagnosis, Verdict
from core.faults import StorageFault
from core.metrics import PHASES, lookup
from core.plain_text import one_line
from trainer.panel import View, can_draw, eval_line, panel, step_line

Trackers = Callable[[dict[str, float], int], None]  # takes the finite numbers of one step
Alert = Callable[[Verdict], None]


class AlreadySaid(Exception):
    """Raised by trackers that told the user of their failure themselves: counted, not said again."""


_SPENT = tuple(phase for phase in PHASES if phase not in ("other", "total"))


class RunLog:
    """The log of one run, on rank 0. A context manager: entering opens the file and the panel, leaving closes both.

    Args:
        run_dir: the run folder; made if need be. An existing metrics.jsonl is continued, its rows are the past.
        total_steps: for progress and time left.
        trackers: takes the finite metrics of a step and its number. If it raises, that is named once and counted in
            faults/tracker_errors, and training goes on: metrics.jsonl has everything.
        console: where to print; standard output if None.
        title: head of the panel, plain text.
        before: the evaluation before the first step, where this log goes on with a run; see `baseline`.
        diagnosis: judges each row; a new verdict is shown, and `alert` is told of it. Rows that are there already are
            judged too, in silence.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        trackers: Trackers | None,
        console: Console | None = None,
        title: str = "",
        before: dict[str, float] | None = None,
        diagnosis: Diagnosis | None = None,
        alert: Alert | None = None,
    ) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        self._trackers = trackers
        self._tracker_errors = 0
        self._console = Console() if console is None else console
        self._view = View(title=title, total_steps=total_steps)
        self._view.baseline = dict(before or {})
        self._diagnosis, self._alert = diagnosis, alert
        self._live: Live | None = None
        self._fd: int | None = None
        self._named_null: set[str] = set()
        self._clock = _Clock()

    @staticmethod
    def silent() -> "RunLog":
        """The same methods, doing nothing: for the ranks that do not report."""
        return _SilentLog()

    def __enter__(self) -> "RunLog":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        for row in map(json.loads, self.path.read_text(encoding="utf-8").splitlines()):
            numbers = {name: math.nan if value is None else value for name, value in row.items()}
            step = numbers.pop("step")
            self._view.add(step, numbers, wrote_at=perf_counter())
            self._judge(step, numbers)
        self._clock.restart()
        if can_draw(self._console):
            self._live = Live(
                console=self._console, get_renderable=self._draw, refresh_per_second=2, vertical_overflow="ellipsis"
            )
            self._live.start(refresh=True)
        elif self._view.title:
            self._print(Text(one_line(self._view.title), style="bold"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def time(self, phase: str) -> AbstractContextManager[None]:
        """Charges the seconds inside the block to `phase`; a block inside another interrupts the outer one.

        Raises:
            KeyError: no such phase in core/metrics.py.
        """
        if phase not in _SPENT:
            raise KeyError(f"phase {phase!r} is not one of {', '.join(_SPENT)} (core/metrics.py)")
        return self._timed(phase)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        self._clock.push(phase)
        try:
            yield
        finally:
            self._clock.pop()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the whole run by phase, with `other` and `total`."""
        return self._clock.run_seconds()

    def baseline(self, metrics: dict[str, float]) -> None:
        """The evaluation before the first step: shown, sent to the trackers as step 0, in no line of metrics.jsonl.

        The seconds up to here belong to no step.
        """
        self._check(metrics)
        self._view.baseline = dict(metrics)
        self._clock.restart()
        with self.time("log"):
            self._track(metrics, 0)
            if self._live is None:
                self._print(eval_line(metrics))

    def step(
        self,
        step: int,
        metrics: dict[str, float],
        *,
        samples: int | None = None,
        learner_tokens: int | None = None,
    ) -> None:
        """Writes, shows and sends one step; adds time/<phase> and, from the counts given, perf/<rate>.

        Args:
            step: from 1, rising.
            metrics: every name but those under time/.
            samples, learner_tokens: what all ranks did in this step.
        Raises:
            KeyError: a name that is not in core/metrics.py; nothing was written.
            StorageFault: the line could not be written.
        """
        assert self._fd is not None, "the log is not open"
        assert step > self._view.step, f"step {step} after step {self._view.step}"
        assert not any(name.startswith("time/") for name in metrics), "time/ is measured here"
        self._check(metrics)
        seconds = self._clock.cut()
        with self.time("log"):
            row = dict(metrics)
            for name, amount, phase in (
                ("perf/samples_per_s", samples, "total"),
                ("perf/learner_tokens_per_s", learner_tokens, "update"),
            ):
                if amount is not None and seconds.get(phase, 0.0) > 0:
                    row[name] = amount / seconds[phase]
            row |= {f"time/{phase}": spent for phase, spent in seconds.items()}
            if self._trackers is not None:
                row["faults/tracker_errors"] = self._tracker_errors
            self._write(step, row)
            self._view.add(step, row, wrote_at=perf_counter())
            new = self._judge(step, row)
            if self._live is None:
                self._print(step_line(step, self._view.total_steps, row))
            else:
                self._live.refresh()
            self._track(row, step)
            for verdict in new:
                self.note(verdict.text)
                if self._alert is not None:
                    self._alert(verdict)

    def note(self, text: str) -> None:
        """Prints one line, above the panel where there is one; from any thread. Markup and controls in it are inert."""
        self._print(Text(one_line(text), style="yellow" if self._live else ""))

    def close(self) -> None:
        """Leaves the last state of the panel on the screen and closes the file. May be called twice."""
        if self._fd is None:
            return
        os.close(self._fd)
        self._fd = None
        self._view.closed_after_s = self._clock.run_seconds()["total"]
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._tracker_errors:
            self.note(f"warning: the trackers failed on {self._tracker_errors} steps; {self.path} has them all")

    def _check(self, metrics: dict[str, float]) -> None:
        for name in metrics:
            lookup(name)

    def _write(self, step: int, row: dict[str, float]) -> None:
        line: dict[str, float | None] = {"step": step, "timestamp": wall_clock()}
        for name, value in row.items():
            line[name] = value if isinstance(value, int) else float(value)
            if not math.isfinite(value):
                line[name] = None
                if name not in self._named_null:
                    self._named_null.add(name)
                    self.note(f"warning: {name} is {float(value)} at step {step}; written as null, said once")
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        # One write to a file opened for appending: a kill leaves the whole line or none of it.
        try:
            written = os.write(self._fd, data)
        except OSError as error:
            raise StorageFault(f"{self.path}: step {step} could not be written ({error.strerror})") from None
        if written != len(data):
            raise StorageFault(f"{self.path}: step {step} was not written whole; is the disk full?")

    def _track(self, metrics: dict[str, float], step: int) -> None:
        if self._trackers is None:
            return
        try:
            self._trackers({name: float(value) for name, value in metrics.items() if math.isfinite(value)}, step)
        except Exception as error:  # any client of any service: none of them is worth a run
            self._tracker_errors += 1
            if self._tracker_errors == 1 and not isinstance(error, AlreadySaid):
                self.note(
                    f"warning: a tracker failed at step {step}, training goes on: {type(error).__name__}: {error}"
                )

    def _judge(self, step: int, row: dict[str, float]) -> list[Verdict]:
        """The verdicts that this row brings."""
        if self._diagnosis is None:
            return []
        new = self._diagnosis.add(step, row)
        self._view.verdicts = [verdict.title for verdict in self._diagnosis.active]
        return new

    def _print(self, text: Text) -> None:
        encoding = self._console.encoding
        text.plain = text.plain.encode(encoding, "backslashreplace").decode(encoding)
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _draw(self) -> RenderableType:
        return panel(self._view, self._clock, width=self._console.width, height=self._console.height)


class _SilentLog(RunLog):
    def __init__(self) -> None:
        pass

    def __enter__(self) -> "RunLog":
        return self

    def time(self, phase: str) -> AbstractContextManager[None]:
        return nullcontext()

    @property
    def seconds(self) -> dict[str, float]:
        return {}

    def baseline(self, metrics: dict[str, float]) -> None:
        pass

    def step(
        self,
        step: int,
        metrics: dict[str, float],
        *,
        samples: int | None = None,
        learner_tokens: int | None = None,
    ) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class _Clock:
    """A stack of phases. Every second goes to the innermost open one, so that phases never overlap."""

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.since = self._began = self._window = perf_counter()
        self._step = dict.fromkeys(_SPENT, 0.0)
        self._run = dict.fromkeys(_SPENT, 0.0)

    def _charge(self) -> float:
        now = perf_counter()
        if self.stack:
            self._step[self.stack[-1]] += now - self.since
            self._run[self.stack[-1]] += now - self.since
        self.since = now
        return now

    def push(self, phase: str) -> None:
        self._charge()
        self.stack = [*self.stack, phase]  # never changed in place: the panel's thread may be reading it

    def pop(self) -> None:
        self._charge()
        self.stack = self.stack[:-1]

    def restart(self) -> None:
        """Forgets the seconds since the last step, but not that they belong to the run."""
        self._window = self._charge()
        self._step = dict.fromkeys(_SPENT, 0.0)

    def cut(self) -> dict[str, float]:
        """Seconds by phase since the last cut, those that were used, then other and total."""
        before = self._window
        now = self._charge()
        spent = {phase: s for phase, s in self._step.items() if s > 0}
        self._window, self._step = now, dict.fromkeys(_SPENT, 0.0)
        return _with_rest(spent, now - before)

    def run_seconds(self) -> dict[str, float]:
        return _with_rest({phase: s for phase, s in self._run.items() if s > 0}, self._charge() - self._began)


def _with_rest(spent: dict[str, float], total: float) -> dict[str, float]:
    return {**spent, "other": max(0.0, total - math.fsum(spent.values())), "total": total}
