"""What a run looks like while it goes on: a panel on a terminal, one line per step elsewhere. Only draws."""

import math
from time import perf_counter
from typing import Protocol

import numpy as np
from rich import box
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from core.metrics import PHASES, SHARE, lookup
from core.plain_text import one_line

_EVAL_TOTAL = "eval/reward/total"
_MOST_VERDICTS = 3  # that the panel shows
_RECENT_STEPS = 8  # the time left is estimated from these


class PhaseClock(Protocol):
    """The clock of the log, as the panel's thread reads it."""

    stack: list[str]  # the open phases, the innermost last
    since: float  # when the innermost began, by perf_counter


class View:
    """What the panel shows: the last step whole, and the past of the few numbers that are drawn over time."""

    def __init__(self, *, title: str, total_steps: int) -> None:
        self.title, self.total_steps = title, total_steps
        self.step = 0
        self.wrote_at = perf_counter()
        self.closed_after_s: float | None = None
        self.baseline: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.verdicts: list[str] = []  # titles of those that hold
        self.past: dict[str, list[float]] = {}  # name -> one value per step in which it was measured

    def add(self, step: int, row: dict[str, float], *, wrote_at: float) -> None:
        for name, value in row.items():
            if name.startswith(("reward/", "eval/")) or name == "time/total":
                self.past.setdefault(name, []).append(float(value))
        self.step, self.last, self.wrote_at = step, row, wrote_at

    def components(self) -> list[str]:
        """In the order of the first step that had them."""
        return [name.split("/")[1] for name in list(self.past) if name.endswith("/raw") and name.startswith("reward/")]

    def evals(self) -> list[str]:
        """The measures that no reward sees, then the held-out reward."""
        names = dict.fromkeys([*self.baseline, *list(self.past)])
        plain = [name for name in names if name.startswith("eval/") and name.count("/") == 1]
        return plain + [name for name in (_EVAL_TOTAL,) if name in names]

    def seconds_left(self) -> float | None:
        if not (recent := self.past.get("time/total", [])[-_RECENT_STEPS:]) or self.step >= self.total_steps:
            return None
        left = (self.total_steps - self.step) * sum(recent) / len(recent)
        return max(0.0, left - (perf_counter() - self.wrote_at))


# ------------------------------------------------------------------------------------------------------------- words


def _number(name: str, value: float | None) -> str:
    """At most seven characters for what is usual; per cent where the table says that it is a share."""
    if value is None or not math.isfinite(value):
        return "-"
    unit = lookup(name).unit
    if unit == SHARE:
        return f"{100 * value:.1f}%"
    size = abs(value)
    if size >= 1e6 or 0 < size < 0.005:
        return f"{value:.1e}"
    if size >= 1000 or unit == "events":
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 100 or unit == "tokens" else f"{value:.2f}"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def _faults(row: dict[str, float]) -> str:
    counts = [(name.removeprefix("faults/"), value) for name, value in row.items() if name.startswith("faults/")]
    return ", ".join(f"{one_line(name)} {value:g}" for name, value in counts if value)


def _eval_words(row: dict[str, float]) -> str:
    plain = [name for name in row if name.startswith("eval/") and name.count("/") == 1]
    shown = plain + [name for name in (_EVAL_TOTAL,) if name in row]
    return "  ".join(f"{one_line(name.removeprefix('eval/'))} {_number(name, row[name])}" for name in shown)


def eval_line(row: dict[str, float]) -> Text:
    return Text(f"before training  {_eval_words(row)}")


def step_line(step: int, total_steps: int, row: dict[str, float]) -> Text:
    """One line per step; what comes only now and then stands at the end, so that the columns stay columns."""
    words = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    for label, name, width in (
        ("reward", "reward/total", 6),
        ("kl", "objective/kl", 6),
        ("clip", "ppo/pg_clipfrac", 5),
        ("length", "response/length_mean", 5),
        ("cut", "response/truncated_frac", 5),
    ):
        words.append(f"{label} {_number(name, row.get(name)):>{width}}")
    words.append(f"{row['time/total']:5.1f} s")
    if any(name.startswith("eval/") for name in row):
        words.append(f"held-out: {_eval_words(row)}")
    if faults := _faults(row):
        words.append(f"faults: {faults}")
    return Text("  ".join(words))


# ------------------------------------------------------------------------------------------------------------- panel

# Okabe and Ito's colours, which people with any colour vision tell apart; glyphs repeat the difference without colour.
_PHASE_STYLES = dict(
    zip(
        PHASES,
        ("#0072b2", "#e69f00", "#56b4e9", "#d55e00", "#cc79a7", "#009e73", "#f0e442", "#999999", "bright_black", ""),
        strict=True,
    )
)
_PHASE_GLYPHS = dict(zip(PHASES, "█░▒▓▚▞▌▐· ", strict=True))
_SPARK_GLYPHS = "▁▂▃▄▅▆▇█"
_SPARK_STYLE = "#56b4e9"


def can_draw(console: Console) -> bool:
    """A terminal that can move its cursor and show block characters."""
    return console.is_terminal and not console.is_dumb_terminal and not console.options.ascii_only


class _Spark:
    """A line of block characters over all values so far, lowest to highest; a blank where nothing was finite."""

    def __init__(self, values: list[float]) -> None:
        self.values = np.array(values, dtype=np.float64)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, max(1, options.max_width))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.line(options.max_width), style=_SPARK_STYLE, no_wrap=True, overflow="crop")

    def line(self, width: int) -> str:
        """At most `width` characters; more steps than that are averaged in equal shares."""
        n = len(self.values)
        if n == 0 or width < 1:
            return ""
        edges = np.linspace(0, n, min(n, width) + 1).astype(int)[:-1]
        finite = np.isfinite(self.values)
        sums = np.add.reduceat(np.where(finite, self.values, 0.0), edges)
        counts = np.add.reduceat(finite.astype(np.float64), edges)
        means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
        if np.isnan(means).all():
            return " " * len(means)
        low, high = np.nanmin(means), np.nanmax(means)
        if not high > low:
            return "".join(" " if np.isnan(m) else _SPARK_GLYPHS[3] for m in means)
        top = len(_SPARK_GLYPHS) - 1
        return "".join(" " if np.isnan(m) else _SPARK_GLYPHS[round((m - low) / (high - low) * top)] for m in means)


class _Shares:
    """A bar over the whole width, cut in proportion to the seconds of each phase."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        total = sum(self.seconds.values())
        done, drawn = 0.0, 0
        for phase, spent in self.seconds.items():
            done += spent
            upto = round(options.max_width * done / total) if total else 0
            yield Segment(_PHASE_GLYPHS[phase] * (upto - drawn), Style.parse(_PHASE_STYLES[phase]))
            drawn = upto
        yield Segment.line()


def panel(view: View, clock: PhaseClock, *, width: int, height: int) -> Panel:
    """The whole picture, readable from 60 columns on; its rows fit 24 lines with three components."""
    name_width = 20 if width >= 72 else 15
    parts: list[RenderableType] = [_progress(view, clock)]
    if view.last:
        parts += [Text(), _ledger(view, rows=max(3, height - 20), name_width=name_width)]
    if view.evals():
        parts += [Text(), _held_out(view, name_width=name_width)]
    if view.last:
        parts += [Text(), _signals(view.last), Text(), *_speed(view.last)]
        if faults := _faults(view.last):
            parts.append(Text(f"faults so far: {faults}", style="bold #d55e00"))
        for title in view.verdicts[:_MOST_VERDICTS]:
            parts.append(Text(f"! {title}", style="bold #d55e00", no_wrap=True, overflow="ellipsis"))
        if (more := len(view.verdicts) - _MOST_VERDICTS) > 0:
            parts.append(Text(f"! {more} more", style="bold #d55e00"))
    title = Text(one_line(view.title) or "tokenppo", style="bold default")
    return Panel(Group(*parts), title=title, title_align="left", box=box.ROUNDED, border_style="bright_black")


def _progress(view: View, clock: PhaseClock) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, justify="right")
    if view.closed_after_s is not None:
        state = f"{'done' if view.step >= view.total_steps else 'stopped'} in {_duration(view.closed_after_s)}"
    elif (left := view.seconds_left()) is not None:
        state = f"{_duration(left)} left"
    else:
        state = "starting" if not view.step else "finishing"
    bar = ProgressBar(total=max(1, view.total_steps), completed=view.step, complete_style="#0072b2")
    bar.finished_style = "#0072b2"
    grid.add_row(Text(f"step {view.step}/{view.total_steps}", style="bold"), bar, Text(state))
    now, since = clock.stack[-1:], clock.since
    if view.closed_after_s is None:
        doing = (
            f"{now[0]} {perf_counter() - since:.0f} s"
            if now
            else "between phases"
            if view.step
            else "before the first step"
        )
        return Group(grid, Text(f"now: {doing}", style="dim"))
    return grid


def _table(*heads: str, name_width: int) -> Table:
    """Name, two numbers, and a line over time that takes the room that is left."""
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    name, *numbers, spark = heads
    table.add_column(name, no_wrap=True, overflow="ellipsis", width=name_width)
    for head in numbers:
        table.add_column(head, justify="right", no_wrap=True, min_width=8)
    table.add_column(spark, ratio=1, no_wrap=True, overflow="ellipsis")
    return table


def _ledger(view: View, *, rows: int, name_width: int) -> Table:
    """Components, with their raw values over time, and below them the sum of the weighted ones, with its own."""
    components = view.components()
    table = _table("reward/response", "raw", "weighted", f"up to step {view.step}", name_width=name_width)
    for component in components[:rows]:
        raw, weighted = f"reward/{component}/raw", f"reward/{component}/weighted"
        table.add_row(
            Text(one_line(component)),
            _number(raw, view.last.get(raw)),
            _number(weighted, view.last.get(weighted)),
            _Spark(view.past.get(raw, [])),
        )
    if len(components) > rows:
        table.add_row(Text(f"+ {len(components) - rows} more", style="dim"), "", "", "")
    total = _number("reward/total", view.last.get("reward/total"))
    table.add_row(Text("total", style="bold"), "", Text(total, style="bold"), _Spark(view.past.get("reward/total", [])))
    return table


def _held_out(view: View, *, name_width: int) -> Table:
    table = _table("held-out", "before", "last", "all evaluations", name_width=name_width)
    for name in view.evals()[:4]:
        past = view.past.get(name, [])
        before = view.baseline.get(name)
        table.add_row(
            Text(one_line(name.removeprefix("eval/"))),
            _number(name, before),
            Text(_number(name, past[-1] if past else None), style="bold"),
            _Spark(([] if before is None else [before]) + past),
        )
    return table


def _signals(row: dict[str, float]) -> RenderableType:
    cells = [
        Text.assemble((f"{label} ", "dim"), (_number(name, row[name]), ""), (unit, "dim"))
        for label, name, unit in (
            ("kl", "objective/kl", " nats/response"),
            ("entropy", "objective/entropy", " nats/token"),
            ("length", "response/length_mean", " tokens"),
            ("clipped", "ppo/pg_clipfrac", ""),
            ("explained variance", "value/explained_variance", ""),
            ("cut", "response/truncated_frac", ""),
        )
        if name in row
    ]
    return Columns(cells, padding=(0, 3), column_first=False)


def _speed(row: dict[str, float]) -> list[RenderableType]:
    seconds = {
        name.removeprefix("time/"): value
        for name, value in row.items()
        if name.startswith("time/") and name != "time/total"
    }
    legend = [
        Text.assemble((f"{_PHASE_GLYPHS[phase]} ", _PHASE_STYLES[phase]), (f"{phase} ", "dim"), f"{spent:.2f}")
        for phase, spent in seconds.items()
    ]
    rates = [
        Text.assemble(_number(name, row[name]), (f" {unit}", "dim"))
        for name, unit in (
            ("perf/rollout_tokens_per_s", "tok/s written"),
            ("perf/learner_tokens_per_s", "tok/s learned"),
            ("perf/samples_per_s", "samples/s"),
        )
        if name in row
    ]
    head = Text.assemble((f"{row['time/total']:.2f} s", "bold"), ("/step", "dim"))
    return [_Shares(seconds), Columns(legend, padding=(0, 3)), Columns([head, *rates], padding=(0, 3))]
