"""`tokenppo watch RUN`: the panel of a run that somebody else started, from the files of its folder.

Reads `metrics.jsonl` as it grows and judges it by the same rules as the run itself (core/diagnosis.py). Ends when the
run does, with its exit code; leaving it (Ctrl-C) disturbs nothing. Where its processes lie on another machine the files
may be all there is: the run is taken to be at work as long as it holds the lock of its folder.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from core.diagnosis import Diagnosis, Facts, Verdict
from core.faults import ProcessFault
from core.plain_text import one_line
from core.schema import Config
from launch import run_folder
from trainer.panel import View, can_draw, panel, step_line

EVERY_S = 0.5


class Rows:
    """The rows of a metrics.jsonl that somebody else appends to, each given once."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def new(self) -> tuple[bool, list[tuple[int, dict[str, float], float]]]:
        """(Whether it begins anew, rows as (step, numbers, seconds since the epoch)). A run that goes on from a
        checkpoint cuts rows off, and all of them come again."""
        size = self._path.stat().st_size if self._path.exists() else 0
        anew, self._read = size < self._read, 0 if size < self._read else self._read
        if size == self._read:
            return anew, []
        with open(self._path, "rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]  # the last may be half written
        self._read += len(whole) + 1 if whole else 0
        rows = []
        for line in whole.splitlines():
            row = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
            rows.append((row.pop("step"), row, row.pop("timestamp")))
        return anew, rows


class Watched:
    """What is shown of a run; `look` reads what is new."""

    def __init__(self, folder: Path, cfg: Config) -> None:
        self.folder, self._cfg = folder, cfg
        self._rows = Rows(folder / "metrics.jsonl")
        # As the panel reads a clock: what goes on inside a step is known to the run alone.
        self.stack, self.since = ["next step"], perf_counter()
        self._begin()

    def _begin(self) -> None:
        title = f"{self._cfg.run.name}: {Path(self._cfg.model.path).name} on "
        title += ", ".join(Path(path).name for path in self._cfg.data.sources)
        self.view = View(title=title, total_steps=self._cfg.run.steps)
        self._diagnosis = Diagnosis(Facts.of(self._cfg))

    def look(self) -> Iterator[tuple[int, dict[str, float], list[Verdict]]]:
        """Take in what is new; yields each new row with the verdicts that it brings."""
        anew, rows = self._rows.new()
        if anew:
            self._begin()
        for step, row, written in rows:
            self.since = perf_counter() - max(0.0, time.time() - written)
            self.view.add(step, row, wrote_at=self.since)
            verdicts = self._diagnosis.add(step, row)
            self.view.verdicts = [verdict.title for verdict in self._diagnosis.active]
            yield step, row, verdicts

    def close(self, summary: dict[str, Any]) -> None:
        """The run has ended."""
        before = summary.get("eval", {}).get("before", {})
        self.view.baseline = {f"eval/{name}": x for name, x in before.items() if name != "step"}
        self.view.closed_after_s = summary.get("seconds", {}).get("whole_run", 0.0)

    def picture(self, console: Console) -> RenderableType:
        return panel(self.view, self, width=console.width, height=console.height)


def watch(folder: Path, *, once: bool = False, console: Console | None = None) -> int:
    """Show a run until it ends; `once`: as it is now.

    Returns the exit code of the run, 0 with `once`. Raises UserError where there is no run, ProcessFault for one that
    was killed without a word.
    """
    console = console or Console()
    watched = Watched(folder, run_folder.configuration(folder))
    plain = {"markup": False, "highlight": False, "soft_wrap": True}
    if once:
        for _ in watched.look():
            pass
        summary = run_folder.read_summary(folder)
        if summary and not run_folder.at_work(folder):
            watched.close(summary)
        console.print(watched.picture(console))
        return 0
    live = None
    if can_draw(console):
        draw = {"get_renderable": lambda: watched.picture(console), "refresh_per_second": 2}
        live = Live(console=console, vertical_overflow="ellipsis", **draw)
        live.start(refresh=True)
    try:
        while True:
            at_work = run_folder.at_work(folder)  # before the look: what it wrote until it ended is seen
            for step, row, verdicts in watched.look():
                if live is None:
                    console.print(step_line(step, watched.view.total_steps, row), **plain)
                for verdict in verdicts:
                    console.print(Text(one_line(verdict.text), style="yellow" if live else ""), **plain)
            if not at_work:
                break
            time.sleep(EVERY_S)
        summary = run_folder.read_summary(folder)
        watched.close(summary)
    finally:
        if live is not None:
            live.stop()
    if "exit" not in summary:
        raise ProcessFault(
            f"{folder}: it was killed: nobody works on it, and it left no summary; train goes on from it"
        )
    how = f": {one_line(summary['error'])}" if summary.get("error") else ""
    console.print(f"ended at step {summary.get('steps', 0)} with exit code {summary['exit']}{how}", **plain)
    return summary["exit"]
