"""The process of an environment: its answers, and what becomes of a worker's question when there is none.

Each test starts the process, so all are slow; what turns do with the answers is in test_turns.py.
"""

import functools
import importlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from core import config
from core.faults import EnvironmentFault, UserError
from launch import environment as named
from launch.build import environment_spec
from launch.shown import shown
from rollout.environment import ROOT, EnvironmentProcess, EnvironmentSpec

SOURCE = """
import ctypes, os, re, sys, time

class Environment:
    def __init__(self, kind="echo"):
        self.kind, self.calls = kind, 0
        if kind == "cannot be made":
            raise OSError("no such game")

    def step(self, turns, columns):
        self.calls += 1
        print("a word on standard output is no answer", flush=True)
        return getattr(self, self.kind)(turns, columns)

    def echo(self, turns, columns):
        return f"{len(turns)} {columns['n']} {turns[-1]}" if turns[-1] else None

    def raises(self, turns, columns):
        return columns["nothing"]

    def sleeps(self, turns, columns):
        time.sleep(600)

    def holds_the_lock(self, turns, columns):
        ctypes.PyDLL(None).sleep(600)  # as a loop in C does that never lets Python in

    def leaves(self, turns, columns):
        os._exit(7)

    def ends(self, turns, columns):
        sys.exit("enough")

    def counts(self, turns, columns):
        return str(self.calls)

    def number(self, turns, columns):
        return 4

    def nothing(self, turns, columns):
        return ""

    def half(self, turns, columns):
        return "\\ud800"

    def hashes(self, turns, columns):
        return " ".join({str(i) for i in range(50)})
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("environment") / "turns_game.py"
    path.write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        yield path


def started(file: Path, kind: str = "echo", timeout_s: float = 30.0) -> EnvironmentProcess:
    spec = EnvironmentSpec(
        name=f"{file}:Environment",
        load=functools.partial(importlib.import_module(file.stem).Environment, kind),  # no library to import with it
        timeout_s=timeout_s,
        start_timeout_s=60.0,
        max_turns=4,
        max_new_tokens=8,
    )
    return EnvironmentProcess(spec)


@pytest.mark.slow
def test_it_answers_with_what_it_is_given_and_large_rows_go_through(file):
    it = started(file)
    try:
        assert it.step(["hé \U0001f600"], {"n": 1}, "u1") == "1 1 hé \U0001f600"
        long = "x" * 3_000_000  # more than any pipe holds
        assert it.step(["a", "b", long], {"n": 2, "more": [long]}, "u2") == f"3 2 {long}"
        assert it.step(["a", "b", ""], {"n": 2}, "u2") is None
    finally:
        it.close()
    assert not psutil.pid_exists(it.pid)


FAULTS = {
    "raises": r"raised KeyError: 'nothing' \(.*turns_game.py:\d+, in raises\)",
    "leaves": "its process ended with exit code 7",
    "ends": "raised SystemExit: enough",
    "counts": r"asked again it answers '2', not '1'",
    "number": r"gave 4 \(int\)",
    "nothing": r"gave '' \(str\)",
    "half": r"gave .*, which is no text: surrogates not allowed",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
def test_what_goes_wrong_is_a_fault_with_environment_sample_and_turn(file, kind):
    it = started(file, kind)
    with pytest.raises(EnvironmentFault, match=rf"turns_game.py:Environment: sample u7, turn 2: {FAULTS[kind]}"):
        it.step(["a", "b", "c"], {"n": 1}, "u7")
    assert not psutil.pid_exists(it.pid)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sleeps", "holds_the_lock"])
def test_a_call_that_hangs_ends_at_its_deadline_wherever_it_hangs(file, kind):
    it = started(file, kind, timeout_s=0.5)
    began = time.monotonic()
    with pytest.raises(EnvironmentFault, match=r"sample u7, turn 1: no answer within 0.5 s"):
        it.step(["a"], {"n": 1}, "u7")
    assert time.monotonic() - began < 20 and not psutil.pid_exists(it.pid)


@pytest.mark.slow
def test_it_ends_with_its_worker_even_in_a_call_that_hangs(file):
    """A worker that is killed can end nobody: the child has asked the kernel to."""
    worker = f"""
import functools, sys
sys.path[:0] = {[str(file.parent), ROOT]!r}
import turns_game
from rollout.environment import EnvironmentProcess, EnvironmentSpec
it = EnvironmentProcess(EnvironmentSpec(
    name="e", load=functools.partial(turns_game.Environment, "sleeps"), timeout_s=600, start_timeout_s=60, max_turns=2,
    max_new_tokens=8))
print(it.pid, flush=True)
it.step(["a"], {{}}, "u")
"""
    with subprocess.Popen([sys.executable, "-c", worker], stdout=subprocess.PIPE, text=True) as process:
        child = psutil.Process(int(process.stdout.readline()))
        assert "a word" in process.stdout.readline()  # it has entered `step`, which prints
        process.kill()
    child.wait(timeout=60)


@pytest.mark.slow
def test_one_that_cannot_be_made_says_why(file):
    with pytest.raises(EnvironmentFault, match=r"its start: raised OSError: no such game \(.*turns_game.py"):
        started(file, "cannot be made")


@pytest.mark.slow
def test_the_order_of_a_set_is_the_same_in_every_worker(file):
    answers = []
    for _ in range(2):
        it = started(file, "hashes")
        answers.append(it.step(["a"], {}, "u"))
        it.close()
    assert answers[0] == answers[1]


def configured(**overrides: object) -> config.Config:
    given = {"model.path": "m", "data.path": "d.jsonl", "rewards.a.fn": "r.py:f"}
    return config.load(None, given | overrides, folder=Path("/nowhere"))


def test_the_class_is_looked_at_before_anything_is_started(file, tmp_path):
    def check(name: str, **options: object) -> None:
        named.refuse_missing(cfg := configured(**{"rollout.environment": name, "rollout.environment_options": options}))
        named.check(cfg)

    check(f"{file}:Environment", kind="echo")
    (tmp_path / "e.py").write_text("class Old:\n    def step(self, turns): ...\nclass No: ...\ndef step(): ...\n")
    for name, words in {
        "http://host:1": "must be `path/file.py:Class`",
        "verl:e.py:f": "must be `path/file.py:Class`",
        "nonsense": "must be `path/file.py:Class`",
        f"{tmp_path}/none.py:E": "there is no file",
        f"{tmp_path}/e.py:Older": "has no `Older`",
        f"{tmp_path}/e.py:Old": "its step takes \\(turns, columns\\)",
        f"{tmp_path}/e.py:No": "must be a class with a method step",
        f"{tmp_path}/e.py:step": "must be a class with a method step",
    }.items():
        with pytest.raises(UserError, match=rf"^rollout.environment.*{words}"):
            check(name)
    with pytest.raises(UserError, match="unexpected keyword argument 'colour'"):
        check(f"{file}:Environment", colour="red")


def test_settings_without_an_environment_and_deadlines_that_never_come_are_refused():
    assert environment_spec(configured()) is None
    for key, value in {"max_turns": 3, "environment_options": {"a": 1}, "environment_timeout_s": 5}.items():
        with pytest.raises(UserError, match=rf"rollout.{key} = .*does nothing without rollout.environment"):
            configured(**{f"rollout.{key}": value})
    with pytest.raises(UserError, match="environment_timeout_s = 30: must be less than rollout.timeout_s = 20"):
        configured(**{"rollout.environment": "e.py:E", "rollout.timeout_s": 20})
    spec = environment_spec(configured(**{"rollout.environment": "e.py:E", "rollout.environment_options.depth": 3}))
    assert spec.name == "/nowhere/e.py:E" and spec.load.args == ("/nowhere/e.py:E", {"depth": 3})
    assert spec.start_timeout_s < 600 and spec.max_turns == 8


def test_trackers_see_no_secret_among_its_options():
    """What is a secret for sure is refused (tests/test_security.py); this only may be one."""
    options = {"key_of_user": "s3cret", "depth": 3}
    seen = shown(configured(**{"rollout.environment": "e.py:E", "rollout.environment_options": options}))
    assert "s3cret" not in str(seen) and seen["rollout.environment_options.depth"] == 3
