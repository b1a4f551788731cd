"""The real W&B offline and the real TensorBoard. W&B keeps state per process, so each job here is one of its own."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from threading import Event

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.diagnosis import Verdict
from core.schema import Config
from launch import trackers as module
from launch.shown import HIDDEN, shown
from launch.trackers import Trackers
from launch.wandb_login import logged_in
from tests import exhibits, wandb_file
from tests.tracker_job import JOB, ROOT, ids, jobs_in, notes, scalars, settings, steps
from trainer.run_log import AlreadySaid, RunLog


@pytest.fixture
def job(tmp_path):
    return jobs_in(tmp_path)


def test_one_run_offline_without_a_login_asks_nothing_and_is_all_there(job):
    """One process, one file, the names of metrics.jsonl, the settings; nothing in the home or temporary folder."""
    done = job("tensorboard", "wandb", steps=[1, 2, 3], options={"api_key": "hunter2", "url": "https://me:hunter2@h/"})
    (file,) = wandb_file.files(job.folder)
    hint = f"note: no W&B login: recorded in the run folder; upload with: wandb sync {file.parent}"
    assert notes(done) == [hint]
    assert done.stderr == ""
    rest = [line for line in done.stdout.splitlines() if not line.startswith(("note:", "ids:", "step", "before"))]
    assert rest == ["wandb loaded: False", "closed; wandb loaded: True"]

    got = wandb_file.read(file)
    assert (got.run_id, got.project, got.name) == (ids(done)["wandb"], "tests", "a-run")
    assert got.exit_code == 0
    assert steps(got) == [0, 1, 2, 3] == [row["step"] for row in got.rows]
    written = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    for row, line in zip(got.rows[1:], written, strict=True):
        sent = {name: value for name, value in row.items() if not name.startswith("_")}
        assert sent == {name: value for name, value in line.items() if name != "timestamp"}
    assert got.metrics["*"].step_metric == "step"
    assert got.summary["eval/reward/total"] == {"max": 9.0, "last": -3.0} and got.summary["reward/total"] == 0.75
    assert got.config["rollout.batch_size"] == 256 and got.config["optim.betas"] == [0.9, 0.95]
    assert got.config["rewards.quality.options.api_key"] == HIDDEN

    assert scalars(job.folder, "reward/total") == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert len(list(job.folder.rglob("events.out.tfevents.*"))) == 1
    for path in job.folder.rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path
    for outside in (job.home, job.temporary, job.cwd):
        assert list(outside.rglob("*")) == []


@pytest.mark.slow
def test_a_verdict_is_an_alert_and_a_text_once(job):
    """A run that goes on judges the rows that are there, and sends nothing again."""
    bad = {"ppo/first_ratio_error": 0.5}
    first = job("tensorboard", "wandb", steps=[1, 2, 3], rows={"2": bad})
    job("tensorboard", "wandb", steps=[3, 4], rows={"3": bad, "4": bad}, resumed_from=2, ids=ids(first))
    alerts = [alert for file in wandb_file.files(job.folder) for alert in wandb_file.read(file).alerts]
    title = "old and new log-probs of one policy differ"
    assert [(title_of, text.split(":")[0]) for title_of, text in alerts] == [(title, "step 2")]
    assert "ppo/first_ratio_error is 0.5 (bound 0.0001)" in alerts[0][1]
    reader = EventAccumulator(str(job.folder / "tests"))
    reader.Reload()
    (event,) = reader.Tensors("diagnosis/first-ratio/text_summary")
    assert (event.step, event.tensor_proto.string_val[0].decode()) == (2, alerts[0][1])


def test_a_secret_on_the_command_line_is_not_recorded(job):
    argv = ("--rewards.quality.options.api_key", "hunter2")
    job("wandb", steps=[1], options={"api_key": "hunter2"}, argv=argv)
    (file,) = wandb_file.files(job.folder)
    assert b"hunter2" not in file.read_bytes()


@pytest.mark.slow
def test_after_a_kill_the_same_run_goes_on_and_has_each_step_once(job):
    first = job("tensorboard", "wandb", steps=[1, 2, 3, 4, 5], die=True, returncode=-signal.SIGKILL)
    second = job("tensorboard", "wandb", steps=[3, 4, 5, 6, 7], ids=ids(first), resumed_from=2)
    assert ids(second) == ids(first)
    one, two = (wandb_file.read(file) for file in wandb_file.files(job.folder))
    assert one.run_id == two.run_id == ids(first)["wandb"]
    assert steps(one) == [0, 1, 2, 3, 4, 5] and steps(two) == [6, 7]
    assert one.exit_code is None and two.exit_code == 0
    assert any("holds steps up to 5" in line for line in notes(second))
    assert [step for step, _ in scalars(job.folder, "reward/total")] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, _ in scalars(job.folder, "eval/reward/total")] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert len(list((job.folder / "tests").iterdir())) == 2


def test_a_run_that_failed_is_recorded_as_failed(job):
    job("wandb", steps=[1], exit=3)
    (file,) = wandb_file.files(job.folder)
    assert wandb_file.read(file).exit_code == 3


@pytest.mark.parametrize("broken", ["mode", "folder", "key"])
def test_tensorboard_works_where_wandb_does_not(job, broken):
    env = {"mode": {"WANDB_MODE": "nonsense"}, "folder": {}, "key": {"WANDB_API_KEY": "too short"}}[broken]
    if broken == "folder":
        (job.folder / "wandb").write_text("in the way")
    done = job("wandb", "tensorboard", steps=[1, 2], env=env)
    (line,) = notes(done)
    assert line.startswith("note: warning: wandb could not be opened, training goes on without it: ")
    assert done.stdout.count("warning") == 2 and "the trackers failed on 3 steps" in done.stdout
    assert [step for step, _ in scalars(job.folder, "reward/total")] == [1, 2]
    assert list(job.home.rglob("*")) == []


def test_a_login_without_a_network_costs_the_deadline_and_no_more(job):
    env = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = job("wandb", "tensorboard", steps=[1, 2], env=env, init_s=2.0)
    (line,) = notes(done)
    assert "wandb could not be opened" in line and "127.0.0.1" in line
    assert done.stderr == "" and [step for step, _ in scalars(job.folder, "reward/total")] == [1, 2]


def test_wandb_works_where_tensorboard_does_not(job):
    (job.folder / "tests").write_text("in the way")
    done = job("tensorboard", "wandb", steps=[1, 2])
    assert "tensorboard could not be opened" in notes(done)[0]
    (file,) = wandb_file.files(job.folder)
    assert steps(wandb_file.read(file)) == [0, 1, 2]


def test_an_agent_of_a_sweep_finds_its_run_under_the_id_that_it_gave(job):
    done = job("wandb", steps=[1], env={"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r1"})
    (file,) = wandb_file.files(job.folder)
    assert ids(done) == {"wandb": "r1"} and wandb_file.read(file).run_id == "r1"


def test_disabled_by_the_user_is_obeyed(job):
    done = job("wandb", steps=[1], env={"WANDB_MODE": "disabled"})
    assert notes(done) == ["note: W&B is disabled by its settings: nothing is recorded"]
    assert wandb_file.files(job.folder) == []


def test_a_service_that_does_not_answer_costs_the_deadline_and_no_more(job):
    """Frozen, W&B's own process would hold `finish` and the exit of the interpreter for ever."""
    done = job("wandb", "tensorboard", steps=[1, 2], freeze=True, close_s=2.0)
    assert any("wandb did not close well" in line and "no end after 2 s" in line for line in notes(done))
    assert [step for step, _ in scalars(job.folder, "reward/total")] == [1, 2]


@pytest.mark.slow
def test_a_service_that_hangs_costs_the_loop_nothing(job):
    """What waits for W&B's own process is its thread; TensorBoard, whose thread waits for nobody, has it all."""
    done = job("wandb", "tensorboard", steps=[1], freeze=True, more=3000, room=4000, close_s=10.0)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("frozen for")]
    assert float(line.split()[-1]) < 60  # 3000 rows of a file and of TensorBoard; of W&B's deadlines none is shorter
    assert [step for step, _ in scalars(job.folder, "reward/total")] == list(range(1, 3002))


def test_without_a_login_a_terminal_is_not_asked_either(job, tmp_path):
    """Standard input, output and error are a terminal on which nobody types."""
    spec = {"cfg": settings(job.folder, "wandb"), "folder": str(job.folder), "steps": [1]}
    env = {"HOME": str(job.home), "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "TERM": "dumb"}
    env |= {"WANDB_MODE": "online", "OMP_NUM_THREADS": "1"}
    leader, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", JOB, json.dumps(spec)],
        env=env,
        cwd=job.cwd,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    said = b""
    try:
        while chunk := os.read(leader, 4096):
            said += chunk
    except OSError:  # how Linux says that nobody holds the terminal any more
        pass
    os.close(leader)
    assert process.wait(timeout=60) == 0, said.decode()
    assert b"no W&B login" in said and b"choice" not in said and b"API key" not in said


def test_tensorboard_alone_never_loads_wandb(job):
    done = job("tensorboard", steps=[1])
    assert "closed; wandb loaded: False" in done.stdout and notes(done) == [] and ids(done) == {}
    assert not (job.folder / "wandb").exists()


class Broken:
    def __init__(self):
        self.closed = None

    def log(self, values, step):
        raise ConnectionError("no route\nto host")

    def close(self, exit_code):
        self.closed = exit_code
        raise ConnectionError("still none")


class Works(Broken):
    def __init__(self):
        self.got, self.closed = [], None

    def log(self, values, step):
        self.got.append(step)

    def close(self, exit_code):
        self.closed = exit_code


def test_one_that_fails_keeps_no_other_from_its_values_and_is_said_once(tmp_path):
    said = []
    trackers = Trackers(ids={}, resumed_from=None, note=said.append)
    broken, works = Broken(), Works()
    trackers._open = {"wandb": broken, "tensorboard": works}
    with RunLog(tmp_path, total_steps=3, trackers=trackers) as log:
        for step in (1, 2, 3):
            log.step(step, {"faults/tracker_errors": 0})
        assert log._tracker_errors == 3
    trackers.close(5)
    assert works.got == [1, 2, 3] and works.closed == broken.closed == 5
    assert said == ["warning: wandb failed at step 1, training goes on without it: ConnectionError: no route to host"]


class Slow(Works):
    """Sends nothing before it may."""

    def __init__(self):
        super().__init__()
        self.may = Event()

    def log(self, values, step):
        assert self.may.wait(30)
        super().log(values, step)

    def show(self, exhibit):
        self.got.append(exhibit)

    def alert(self, verdict):
        self.got.append(verdict)


def test_nothing_waits_for_a_slow_tracker_and_its_order_is_kept():
    slow, said = Slow(), []
    behind = module._Behind(slow, lambda what, error: said.append(what))
    began = time.monotonic()
    for step in (1, 2, 3):
        behind.show(exhibits.exhibit(step))
        behind.log({}, step)
        behind.alert(Verdict("rule", step, "loss/policy", 1.0, 0.5, "title", "remedy"))
    assert time.monotonic() - began < 5 and len(slow.got) <= 1
    slow.may.set()
    behind.close(4)
    kinds = [(type(x).__name__, x if isinstance(x, int) else x.step) for x in slow.got]
    assert kinds == [(kind, step) for step in (1, 2, 3) for kind in ("Exhibit", "int", "Verdict")]
    assert slow.closed == 4 and said == []


def test_what_finds_no_room_is_said_and_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "ROOM", 3)
    slow, said = Slow(), []
    trackers = Trackers(ids={}, resumed_from=None, note=said.append)
    trackers._open = {"wandb": module._Behind(slow, lambda what, error: trackers._say("wandb", what, error))}
    with RunLog(tmp_path, total_steps=9, trackers=trackers) as log:
        for step in range(1, 10):
            log.step(step, {"faults/tracker_errors": 0})
        slow.may.set()
        trackers.close(0)
        missed = 9 - len(slow.got)
        assert 4 <= missed <= 6 and log._tracker_errors == missed
    assert len(said) == 1 and "things before it are waiting to be sent" in said[0]


def test_what_fails_behind_is_counted_with_the_next_step():
    said = []
    trackers = Trackers(ids={}, resumed_from=None, note=said.append)
    behind = module._Behind(Broken(), lambda what, error: trackers._say("wandb", what, error))
    trackers._open = {"wandb": behind}
    trackers({}, 1)
    while not behind._missed:
        time.sleep(0.001)
    with pytest.raises(AlreadySaid):
        trackers({}, 2)
    assert said == ["warning: wandb failed at step 1, training goes on without it: ConnectionError: no route to host"]


def test_a_tracker_that_hangs_in_close_does_not_keep_the_next_from_closing(monkeypatch):
    monkeypatch.setattr(module, "CLOSE_S", 0.2)
    said, works, hangs = [], Works(), Works()
    never = Event()
    hangs.close = lambda exit_code: never.wait(30)
    trackers = Trackers(ids={}, resumed_from=None, note=said.append)
    trackers._open = {"wandb": hangs, "tensorboard": works}
    trackers.close(0)
    never.set()
    assert works.closed == 0 and len(said) == 1 and "no end after 0.2 s" in said[0]


def test_what_trackers_see_of_the_settings(tmp_path):
    options = {
        "api_key": "x",
        "apiKey": "x",
        "headers": {"Authorization": "Bearer x", "Accept": "json"},
        "servers": [{"password": "x", "url": "http://u:x@host/path"}],
        "max_tokens": 3,
        "token": None,
    }
    cfg = settings(tmp_path, **options)
    cfg["rewards"]["key"] = {"fn": "mine:key"}
    got = shown(Config(**cfg))
    option = "rewards.quality.options."
    assert {name.removeprefix(option): value for name, value in got.items() if name.startswith(option)} == {
        "api_key": HIDDEN,
        "apiKey": HIDDEN,
        "headers.Authorization": HIDDEN,
        "headers.Accept": "json",
        "servers": [{"password": HIDDEN, "url": f"http://{HIDDEN}@host/path"}],
        "max_tokens": 3,
        "token": None,
    }
    assert got["rewards.key.fn"] == "mine:key" and got["data.max_prompt_tokens"] == 1024


def test_where_a_login_is_looked_for(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not logged_in(tmp_path)
    (tmp_path / ".netrc").write_text("machine example.org login me password x\n")
    assert not logged_in(tmp_path)  # an entry, but for another host
    monkeypatch.setenv("WANDB_BASE_URL", "https://example.org")
    assert logged_in(tmp_path)
    monkeypatch.delenv("WANDB_BASE_URL")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    assert logged_in(tmp_path)
    (tmp_path / ".netrc").write_text("no netrc at all {")
    assert not logged_in(tmp_path)
    (tmp_path / ".config" / "wandb").mkdir(parents=True)
    (tmp_path / ".config" / "wandb" / "settings").write_text("[default]\napi_key = x\n")
    assert logged_in(tmp_path)
    (tmp_path / ".config" / "wandb" / "settings").write_text("no section\n")
    assert not logged_in(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert logged_in(tmp_path)
