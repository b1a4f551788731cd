"""Watching a run from outside: every whole row once, its verdicts, its end; and nothing of the run is touched."""

import io
import json
import threading
from pathlib import Path

import pytest
from rich.console import Console

from core.config import load, to_yaml
from core.faults import ProcessFault, UserError
from launch import cli, run_folder
from launch.watch import Rows, Watched, watch
from trainer.run_log import RunLog


def numbers(step: int) -> dict[str, float]:
    return {
        "reward/total": 1.0 + step,
        "reward/quality/raw": 0.5 * step,
        "reward/quality/weighted": 0.5 * step,
        "objective/kl": 0.25,
        "ppo/pg_clipfrac": 0.0,
        "response/length_mean": 10.0,
        "response/truncated_frac": 0.0,
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    cfg = load(Path("configs/cards.yaml"), {"run.steps": 5, "run.name": "seen"})
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    return tmp_path


def log_of(folder: Path) -> RunLog:
    return RunLog(folder, total_steps=5, trackers=None, console=Console(file=io.StringIO()))


def summary(folder: Path, **values: object) -> None:
    (folder / "summary.json").write_text(json.dumps(values))


def test_each_whole_row_comes_once_and_a_run_that_goes_on_begins_anew(folder):
    path = folder / "metrics.jsonl"
    rows = Rows(path)
    assert rows.new() == (False, [])
    path.write_bytes(b'{"step": 1, "timestamp": 5.0, "a": null}\n{"step": 2, "time')
    anew, ((step, row, written),) = rows.new()
    assert (anew, step, written) == (False, 1, 5.0) and row["a"] != row["a"]  # nan
    assert rows.new() == (False, [])
    with open(path, "ab") as file:
        file.write(b'stamp": 6.0}\n')
    assert rows.new() == (False, [(2, {}, 6.0)])
    path.write_bytes(b'{"step": 1, "timestamp": 7.0}\n')
    assert rows.new() == (True, [(1, {}, 7.0)])


def test_it_shows_what_the_run_writes_while_it_writes_and_ends_with_it(folder):
    seen, go_on, out = threading.Event(), threading.Event(), io.StringIO()

    class Seen(io.StringIO):
        def write(self, text: str) -> int:
            n = out.write(text)
            if "step 1/5" in out.getvalue():
                seen.set()
            return n

    def run() -> None:
        with run_folder.opened(
            run_folder.configuration(folder, {"run.dir": str(folder.parent), "run.name": folder.name})
        ):
            with log_of(folder) as log:
                started.set()
                log.step(1, numbers(1))
                assert go_on.wait(60)
                log.step(2, numbers(2))
            summary(folder, exit=4, steps=2, error="RewardFault: quality failed", seconds={"whole_run": 3})

    started = threading.Event()
    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(60)
    ended: list[int] = []
    watcher = threading.Thread(target=lambda: ended.append(watch(folder, console=Console(file=Seen()))))
    watcher.start()
    assert seen.wait(60) and not ended  # the first step is shown while the run is at work
    go_on.set()
    thread.join(60)
    watcher.join(60)
    assert ended == [4]
    lines = out.getvalue().splitlines()
    assert [line[:8] for line in lines[:2]] == ["step 1/5", "step 2/5"]
    assert lines[-1] == "ended at step 2 with exit code 4: RewardFault: quality failed"


def test_verdicts_are_those_of_the_rows(folder):
    with log_of(folder) as log:
        for step in range(1, 6):
            log.step(step, numbers(step) | {"response/truncated_frac": 1.0})
    watched = Watched(folder, run_folder.configuration(folder))
    told = [verdict for _, _, verdicts in watched.look() for verdict in verdicts]
    assert told and watched.view.verdicts and watched.view.step == 5
    assert list(watched.look()) == []


def test_once_draws_the_panel(folder, capsys, monkeypatch):
    with log_of(folder) as log:
        log.step(1, numbers(1))
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["watch", str(folder), "--once"]) == 0
    said = capsys.readouterr().out
    assert "seen: base on train.jsonl" in said and "step 1/5" in said and "quality" in said


def test_a_killed_run_and_no_run_are_named(folder, tmp_path_factory):
    with log_of(folder) as log:
        log.step(1, numbers(1))
    with pytest.raises(ProcessFault, match="it was killed"):
        watch(folder, console=Console(file=io.StringIO()))
    with pytest.raises(UserError, match="there is no run in this folder"):
        watch(tmp_path_factory.mktemp("empty"))
