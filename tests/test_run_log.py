import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from core.diagnosis import Diagnosis, Facts
from core.faults import StorageFault
from trainer import panel, run_log
from trainer.run_log import RunLog

ROOT = Path(__file__).parents[1]


def a_terminal(width: int = 80, height: int = 30, **options) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, _environ={}, **options)


def a_file(encoding: str = "utf-8") -> Console:
    return Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding), force_terminal=False, width=80, _environ={})


def printed(console: Console) -> str:
    if isinstance(console.file, io.StringIO):
        return console.file.getvalue()
    console.file.flush()
    return console.file.buffer.getvalue().decode(console.file.encoding)


def rows(run_dir: Path) -> list[dict]:
    def refuse(literal):
        raise AssertionError(f"{literal} is no JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def a_row(components: tuple[str, ...] = ("quality",), **more: float) -> dict[str, float]:
    row = {
        "reward/total": 2.41,
        "objective/kl": 0.8,
        "objective/entropy": 1.2,
        "ppo/pg_clipfrac": 0.13,
        "value/explained_variance": 0.71,
        "response/length_mean": 21.3,
        "response/truncated_frac": 0.004,
    }
    for name in components:
        row |= {f"reward/{name}/raw": -0.2, f"reward/{name}/weighted": -0.1}
    return row | {name.replace("__", "/"): value for name, value in more.items()}


class FakeClock:
    """perf_counter that moves only when told: binary fractions, so that sums are exact."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in (run_log, panel):
            monkeypatch.setattr(module, "perf_counter", lambda: self.now)

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


def test_a_step_is_one_object_with_its_metrics_and_seconds(tmp_path, monkeypatch):
    clock = FakeClock(monkeypatch)
    with RunLog(tmp_path / "new" / "run", total_steps=2, trackers=None, console=a_file()) as log:
        for step in (1, 2):
            with log.time("rollout"):
                clock.pass_s(4.0)
            clock.pass_s(0.5)
            with log.time("update"):
                clock.pass_s(2.0)
            log.step(step, a_row(faults__worker_lost=3), samples=13, learner_tokens=400)
    first, second = rows(tmp_path / "new" / "run")
    assert list(first)[:2] == ["step", "timestamp"]
    assert (first["step"], second["step"]) == (1, 2)
    assert abs(first["timestamp"] - time.time()) < 60
    assert {k: v for k, v in first.items() if k in a_row()} == a_row()
    assert first["faults/worker_lost"] == 3
    assert {k: v for k, v in first.items() if k.startswith("time/")} == {
        "time/rollout": 4.0,
        "time/update": 2.0,
        "time/other": 0.5,
        "time/total": 6.5,
    }
    assert first["perf/samples_per_s"] == 2.0
    assert first["perf/learner_tokens_per_s"] == 200.0


def test_a_phase_inside_a_phase_interrupts_it_and_repeats_add_up(tmp_path, monkeypatch):
    clock = FakeClock(monkeypatch)
    with RunLog(tmp_path, total_steps=1, trackers=None, console=a_file()) as log:
        with log.time("rollout"):
            clock.pass_s(1.0)
            with log.time("reward"):
                clock.pass_s(0.25)
            clock.pass_s(1.0)
        with pytest.raises(ZeroDivisionError), log.time("reward"):
            clock.pass_s(0.5)
            raise ZeroDivisionError
        log.step(1, a_row())
        assert log.seconds == {"rollout": 2.0, "reward": 0.75, "other": 0.0, "total": 2.75}
    (row,) = rows(tmp_path)
    assert (row["time/rollout"], row["time/reward"], row["time/other"], row["time/total"]) == (2.0, 0.75, 0.0, 2.75)


def test_writing_a_step_is_charged_to_the_next_so_that_no_second_is_lost(tmp_path, monkeypatch):
    clock = FakeClock(monkeypatch)

    def slow_tracker(metrics, step):
        clock.pass_s(0.5)

    with RunLog(tmp_path, total_steps=2, trackers=slow_tracker, console=a_file()) as log:
        clock.pass_s(1.0)
        log.step(1, a_row())
        clock.pass_s(1.0)
        log.step(2, a_row())
        assert log.seconds == {"log": 1.0, "other": 2.0, "total": 3.0}
    first, second = rows(tmp_path)
    assert (first.get("time/log"), first["time/total"]) == (None, 1.0)
    assert (second["time/log"], second["time/other"], second["time/total"]) == (0.5, 1.0, 1.5)


def test_the_evaluation_before_training_belongs_to_no_step(tmp_path, monkeypatch):
    clock, sent = FakeClock(monkeypatch), []
    console = a_file()
    with RunLog(tmp_path, total_steps=1, trackers=lambda m, s: sent.append((s, m)), console=console) as log:
        with log.time("evaluate"):
            clock.pass_s(8.0)
        log.baseline({"eval/slot_error": 0.437})
        clock.pass_s(1.0)
        log.step(1, a_row())
        assert log.seconds["evaluate"] == 8.0
    (row,) = rows(tmp_path)
    assert row["time/total"] == 1.0 and "time/evaluate" not in row and "eval/slot_error" not in row
    assert sent[0] == (0, {"eval/slot_error": 0.437})
    assert "before training  slot_error 43.7%" in printed(console)


def test_what_is_not_finite_is_null_in_the_file_and_named_once(tmp_path):
    console, sent = a_file(), []
    with RunLog(tmp_path, total_steps=3, trackers=lambda m, s: sent.append(m), console=console) as log:
        log.step(1, a_row(loss__value=math.nan, optim__grad_norm=math.inf))
        log.step(2, a_row(loss__value=math.nan, optim__grad_norm=-math.inf))
        log.step(3, a_row(loss__value=0.5, optim__grad_norm=np.float32(2.0)))
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert [row["loss/value"] for row in rows(tmp_path)] == [None, None, 0.5]
    assert [row["optim/grad_norm"] for row in rows(tmp_path)] == [None, None, 2.0]
    text = printed(console)
    assert text.count("loss/value is nan at step 1") == 1 and text.count("loss/value") == 1
    assert text.count("optim/grad_norm is inf at step 1") == 1 and text.count("optim/grad_norm") == 1
    assert "loss/value" not in sent[0] and sent[2]["loss/value"] == 0.5
    assert all(type(value) is float for value in sent[2].values())


def test_an_unknown_metric_is_refused_and_leaves_no_trace(tmp_path):
    sent = []
    with RunLog(tmp_path, total_steps=1, trackers=lambda m, s: sent.append(m), console=a_file()) as log:
        with pytest.raises(KeyError, match="nearest is 'reward/quality/raw'"):
            log.step(1, {"reward/quality/rwa": 1.0})
        with pytest.raises(KeyError, match="nearest is 'eval/reward/total'"):
            log.baseline({"eval/reward/totl": 1.0})
        with pytest.raises(KeyError, match="phase 'rolout' is not one of rollout, reward"):
            log.time("rolout")
        with pytest.raises(KeyError):
            log.time("total")
        assert rows(tmp_path) == [] and sent == []
        log.step(1, a_row())
    assert len(rows(tmp_path)) == 1


def test_a_killed_run_leaves_whole_lines_and_the_next_one_continues_the_file(tmp_path):
    code = f"""
import sys
from pathlib import Path
from trainer.run_log import RunLog
with RunLog(Path({str(tmp_path)!r}), total_steps=10**6, trackers=None) as log:
    for step in range(1, 10**6):
        log.step(step, {{"reward/c%03d/raw" % i: i / 7 for i in range(200)}})
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        deadline = time.monotonic() + 60
        path = tmp_path / "metrics.jsonl"
        while not path.exists() or path.stat().st_size < 200_000:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    killed = rows(tmp_path)
    assert [row["step"] for row in killed] == list(range(1, len(killed) + 1))
    assert all(len(row) > 200 for row in killed)
    with RunLog(tmp_path, total_steps=len(killed) + 1, trackers=None, console=a_file()) as log:
        log.step(len(killed) + 1, a_row())
    assert len(rows(tmp_path)) == len(killed) + 1


def test_each_line_is_in_the_file_when_step_returns(tmp_path):
    with RunLog(tmp_path, total_steps=2, trackers=None, console=a_file()) as log:
        log.step(1, a_row())
        assert len(rows(tmp_path)) == 1


def test_a_disk_that_takes_half_a_line_is_an_error(tmp_path, monkeypatch):
    with RunLog(tmp_path, total_steps=2, trackers=None, console=a_file()) as log:
        monkeypatch.setattr(run_log.os, "write", lambda fd, data: len(data) // 2)
        with pytest.raises(StorageFault, match="step 1 was not written whole"):
            log.step(1, a_row())


def test_a_failing_tracker_is_named_once_and_counted_and_training_goes_on(tmp_path):
    def broken(metrics, step):
        raise ConnectionError("no [bold]route[/]\nto host")

    console = a_file()
    with RunLog(tmp_path, total_steps=3, trackers=broken, console=console) as log:
        for step in (1, 2, 3):
            log.step(step, a_row())
    assert [row["faults/tracker_errors"] for row in rows(tmp_path)] == [0, 1, 2]
    lines = printed(console).splitlines()
    assert sum("ConnectionError: no [bold]route[/]\\nto host" in line for line in lines) == 1
    assert "the trackers failed on 3 steps" in lines[-1]


def test_ctrl_c_inside_a_tracker_is_not_a_failing_tracker(tmp_path):
    def interrupted(metrics, step):
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        RunLog(tmp_path, total_steps=1, trackers=interrupted, console=a_file()) as log,
    ):
        log.step(1, a_row())
    assert len(rows(tmp_path)) == 1


def test_elsewhere_than_on_a_terminal_steps_are_plain_lines_in_columns(tmp_path, monkeypatch):
    clock, console = FakeClock(monkeypatch), a_file()
    with RunLog(tmp_path, total_steps=32, trackers=None, console=console, title="demo [b]cards") as log:
        for step in range(1, 11):
            clock.pass_s(2.125)
            more = {"eval__slot_error": 0.1234, "eval__reward__total": 2.0} if step == 10 else {}
            log.step(step, a_row(**more, faults__worker_lost=int(step == 10)))
    text = printed(console)
    assert "\x1b" not in text
    assert text.isascii()
    title, *steps = text.splitlines()
    assert title == "demo [b]cards"
    assert steps[0] == "step  1/32  reward   2.41  kl   0.80  clip 13.0%  length  21.3  cut  0.4%    2.1 s"
    assert steps[9] == (
        "step 10/32  reward   2.41  kl   0.80  clip 13.0%  length  21.3  cut  0.4%    2.1 s"
        "  held-out: slot_error 12.3%  reward/total 2.00  faults: worker_lost 1"
    )
    assert max(len(line) for line in steps[:9]) <= 100


def test_a_step_without_the_usual_numbers_still_prints(tmp_path):
    console = a_file()
    with RunLog(tmp_path, total_steps=1, trackers=None, console=console) as log:
        log.step(1, {})
    assert printed(console).startswith("step 1/1  reward      -  kl      -")


def test_a_verdict_is_said_once_told_to_the_alert_and_shown_while_it_holds(tmp_path):
    told, console = [], a_terminal(height=40, color_system=None)
    settings = {"total_steps": 9, "trackers": None}
    with RunLog(
        tmp_path, console=console, diagnosis=Diagnosis(Facts()), alert=lambda v: told.append(v.step), **settings
    ) as log:
        for step in range(1, 5):
            log.step(step, a_row(ppo__pg_clipfrac=0.5))
    assert told == [3]
    assert printed(console).count("step 3: steps are too large: many tokens are clipped: ppo/pg_clipfrac is 0.5") == 1
    assert "! steps are too large: many tokens are clipped" in printed(console)[printed(console).rindex("╭") :]
    again = Diagnosis(Facts())
    with RunLog(tmp_path, console=a_file(), diagnosis=again, alert=lambda v: told.append(v.step), **settings) as log:
        assert [v.step for v in again.verdicts] == [3]  # of the rows that are there
        log.step(5, a_row(ppo__pg_clipfrac=0.5))
        assert log._view.verdicts == ["steps are too large: many tokens are clipped"]
        for step in range(6, 9):
            log.step(step, a_row())
        assert log._view.verdicts == []
    assert told == [3]


def test_a_note_is_one_harmless_line_on_any_terminal(tmp_path):
    evil = "said [red]x[/nope] \x1b[2J\r\nsecond line \u202e \ud800 你"
    for console in (a_file(), a_file("ascii"), a_terminal()):
        with RunLog(tmp_path, total_steps=1, trackers=None, console=console) as log:
            log.note(evil)
        (line,) = [line for line in printed(console).splitlines() if "said" in line]
        assert "[red]x[/nope] \\x1b[2J\\r\\nsecond line \\u202e \\ud800" in line
        assert ("\\u4f60" if console.encoding == "ascii" else "你") in line


def test_a_terminal_without_block_characters_or_cursor_gets_plain_lines(tmp_path):
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    ascii_only = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), force_terminal=True, _environ={})
    for name, console in (("dumb", dumb), ("ascii", ascii_only)):
        with RunLog(tmp_path / name, total_steps=1, trackers=None, console=console) as log:
            log.step(1, a_row(("qualité",)))
        assert "step 1/1  reward   2.41" in printed(console)
        assert "╭" not in printed(console)


ODD = (
    "[red]x",
    "[[bold]",
    "质量",
    "a_component_with_a_name_that_never_ends_and_never_ends",
    "\x1b[2Jclear",
    "two\nlines",
)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_panel_is_whole_at_every_width_whatever_components_are_called(tmp_path, width):
    console = a_terminal(width=width, height=40, color_system=None)
    with RunLog(tmp_path, total_steps=30, trackers=None, console=console, title="[blink]t\x1b[2J") as log:
        log.baseline({"eval/slot_error": 0.437, "eval/[b]odd": 1.0})
        for step in range(1, 4):
            with log.time("rollout"):
                pass
            log.step(step, a_row(ODD, eval__slot_error=0.1, faults__worker_lost=1), samples=4)
    last = printed(console)[printed(console).rindex("╭") :]
    lines = last[: last.index("╯") + 1].splitlines()
    assert {cell_len(line) for line in lines} == {width}
    text = "\n".join(lines)
    for words in (
        "step 3/30",
        "stopped in",
        "[red]x",
        "[[bold]",
        "质量",
        "a_component_w",
        "\\x1b[2Jclear",
        "two\\nlines",
    ):
        assert words in text, words
    for words in (
        "total",
        "2.41",
        "slot_error",
        "43.7%",
        "10.0%",
        "kl 0.80",
        "explained variance 0.71",
        "worker_lost 1",
    ):
        assert words in text, words
    assert "[blink]t\\x1b[2J" in lines[0] and "\x1b" not in text


@pytest.mark.parametrize("components", [0, 3, 12])
def test_the_panel_fits_a_terminal_of_24_lines(components, monkeypatch):
    view, clock = panel.View(title="", total_steps=100), run_log._Clock()
    view.baseline = {"eval/slot_error": 0.437, "eval/reward/total": -0.9}
    row = a_row(tuple(f"c{i}" for i in range(components))) | {"time/total": 2.0, "perf/samples_per_s": 99.0}
    row |= {f"time/{phase}": 0.2 for phase in run_log._SPENT}
    view.add(1, row, wrote_at=run_log.perf_counter())
    console = a_terminal(color_system=None)
    console.print(panel.panel(view, clock, width=80, height=24))
    lines = printed(console).splitlines()
    assert len(lines) <= 24
    assert ("+ 8 more" in printed(console)) == (components == 12)
    assert "total" in printed(console)


def test_the_panel_before_the_first_step_and_after_the_last(tmp_path):
    console = a_terminal(color_system=None)
    with RunLog(tmp_path, total_steps=1, trackers=None, console=console) as log:
        assert "step 0/1" in printed(console) and "starting" in printed(console)
        log.step(1, a_row())
    assert "done in 0:00" in printed(console)
    log.close()
    log.note("afterwards")
    assert printed(console).rstrip().endswith("afterwards")


def test_notes_stand_above_the_panel(tmp_path):
    console = a_terminal(color_system=None)
    with RunLog(tmp_path, total_steps=2, trackers=None, console=console) as log:
        log.step(1, a_row())
        log.note("worker 1 was lost and came back")
    text = printed(console)
    assert text.index("worker 1 was lost") < text.rindex("╭")


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 10, ""),
        ([5.0], 10, "▄"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 10, "▁▂▃▄▅▆▇█"),
        ([0, 0, 0, 0, 7, 7, 7, 7], 2, "▁█"),
        ([0, math.nan, 7], 10, "▁ █"),
        ([math.inf, -math.inf], 10, "  "),
        ([0, math.nan, 7, 7], 2, "▁█"),
        ([3, 3, math.nan], 10, "▄▄ "),
        ([1, 2, 3], 0, ""),
    ],
)
def test_sparklines(values, width, line):
    assert panel._Spark(values).line(width) == line


def test_the_bar_of_phases_fills_the_width_in_proportion():
    console = Console(file=io.StringIO(), width=20, color_system=None)
    console.print(panel._Shares({"rollout": 3.0, "update": 1.0, "other": 0.0}))
    assert printed(console) == "█" * 15 + "▓" * 5 + "\n"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("reward/total", 2.414, "2.41"),
        ("reward/total", -0.0004, "-4.0e-04"),
        ("reward/total", 0.0, "0.00"),
        ("reward/total", 123.45, "123.5"),
        ("reward/total", -12345.6, "-12,346"),
        ("reward/total", 2.5e7, "2.5e+07"),
        ("reward/total", math.nan, "-"),
        ("reward/total", None, "-"),
        ("eval/slot_error", 0.0345, "3.5%"),
        ("response/length_mean", 21.34, "21.3"),
    ],
)
def test_numbers_are_short(name, value, text):
    assert panel._number(name, value) == text


def test_time_left_comes_from_recent_steps(monkeypatch):
    clock = FakeClock(monkeypatch)
    view = panel.View(title="", total_steps=20)
    assert view.seconds_left() is None
    for step in range(1, 11):
        view.add(step, {"time/total": 100.0 if step <= 2 else 3.0}, wrote_at=clock.now)
    assert view.seconds_left() == 30.0
    clock.pass_s(2.0)
    assert view.seconds_left() == 28.0
    assert panel._duration(28.0) == "0:28" and panel._duration(3725) == "1:02:05"


def test_the_silent_log_has_every_method_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with RunLog.silent() as log:
        assert isinstance(log, RunLog)
        with log.time("rollout"):
            log.note("x")
        log.baseline({"eval/slot_error": 1.0})
        log.step(1, a_row(), samples=1, learner_tokens=1)
        assert log.seconds == {}
    log.close()
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []
    mine, public = vars(type(log)), [name for name in vars(RunLog) if not name.startswith("_") and name != "silent"]
    assert [name for name in public if name not in mine] == []
