"""`tokenppo health`: what is well, and each thing that can be wrong, with real locks held by real processes."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from core.config import load
from core.faults import ProcessFault
from launch import cli, health, run_folder

HOLD = """
import sys, pathlib
from core.config import load
from launch import run_folder
cfg = load(None, {"model.path": "m", "data.path": "d.jsonl", "rewards.a.fn": "r.py:f", "run.dir": sys.argv[1]})
with run_folder.opened(cfg):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path):
    """The folder of a run that another process holds as a learner does, up to the end of the test."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert holder.stdout.readline() == b"held\n"
    yield tmp_path / "run"
    holder.communicate(timeout=30)


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.communicate(timeout=30)


def ended() -> int:
    """The id of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(30)
    return process.pid


def age(folder: Path, seconds: float) -> None:
    for path in folder.iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


def test_a_folder_that_is_not_there_yet_is_well(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["health"]) == 0
    out = capsys.readouterr().out
    assert "is well" in out and "no runs yet" in out and out.count("\n") == 1


def test_a_run_that_gets_on_is_well(run, sleeper):
    (run / "processes.json").write_text(json.dumps({"worker-0": sleeper.pid, "reward-server": ended()}))
    assert "1 runs, 1 at work" in health.report(run.parent, 60)
    assert "1 at work" in health.report(run, 60), "the folder of the run itself"


def test_a_run_whose_processes_are_all_gone_is_not(run, capsys):
    (run / "processes.json").write_text(json.dumps({"worker-0": ended(), "reward-server": ended()}))
    assert cli.main(["health", str(run.parent)]) == 3
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert str(run) in said.err and "worker-0, reward-server" in said.err and "all gone" in said.err


def test_a_process_that_nobody_waited_for_is_gone(run):
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    process.stdout.read()  # it has ended, but is not waited for
    (run / "processes.json").write_text(json.dumps({"worker-0": process.pid}))
    deadline = time.monotonic() + 30
    while True:
        try:
            health.report(run.parent, 60)
        except ProcessFault as error:
            assert "all gone" in str(error)
            break
        assert time.monotonic() < deadline
    process.wait(30)


def test_a_run_that_writes_nothing_any_more_is_not(run, sleeper, capsys):
    (run / "processes.json").write_text(json.dumps({"worker-0": sleeper.pid}))
    (run / "metrics.jsonl").write_text("{}\n")
    age(run, 7200)
    assert cli.main(["health", str(run.parent)]) == 3 and "no progress for 7200 s" in capsys.readouterr().err
    assert cli.main(["health", str(run.parent), "--stale-s", "9000"]) == 0
    (run / "metrics.jsonl").touch()
    assert cli.main(["health", str(run.parent)]) == 0


def test_a_run_that_has_just_begun_has_written_no_processes(run):
    assert "1 at work" in health.report(run.parent, 60)
    (run / "processes.json").write_text('{"worker-0": 1')
    assert "1 at work" in health.report(run.parent, 60)
    age(run, 100)
    with pytest.raises(ProcessFault, match="no progress"):
        health.report(run.parent, 60)


def test_a_run_that_ended_may_be_as_old_as_it_likes(tmp_path):
    folder = tmp_path / "ended"
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    (folder / "processes.json").write_text(json.dumps({"worker-0": ended()}))
    age(folder, 1e6)
    assert "1 runs, 0 at work" in health.report(tmp_path, 60)


def test_a_folder_that_cannot_be_written_to_is_not_well(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", Path("/proc")):  # which refuses root, too
        with pytest.raises(ProcessFault, match="cannot be written to"):
            health.report(folder, 60)
    before = list(tmp_path.iterdir())
    health.report(tmp_path, 60)
    assert list(tmp_path.iterdir()) == before, "it leaves no trace"


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "NEEDED", ("json", "no_such_library"))
    with pytest.raises(ProcessFault, match="cannot import no_such_library"):
        health.report(tmp_path, 60)


def test_looking_does_not_keep_a_run_from_starting(tmp_path):
    """Somebody looks at the very moment in which a run takes its lock."""
    import fcntl

    cfg = load(None, {"model.path": "m", "data.path": "d.jsonl", "rewards.a.fn": "r.py:f", "run.dir": str(tmp_path)})
    cfg.run.folder.mkdir()
    (cfg.run.folder / "config.yaml").write_text("")
    with open(cfg.run.folder / "config.yaml") as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        timer = threading.Timer(run_folder.LOOK_S / 4, fcntl.flock, (looked_at, fcntl.LOCK_UN))
        timer.start()
        with run_folder.opened(cfg) as folder:
            assert run_folder.at_work(folder)
        timer.join()
    assert not run_folder.at_work(cfg.run.folder)
