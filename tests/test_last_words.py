"""SIGTERM, with which a launcher ends the other ranks of a failed job, and the words of rank 0 about what failed."""

import ctypes
import os
import signal
import threading

import pytest

import tiny_models
from core.config import load
from core.faults import TERMINATED, ProcessFault
from launch import learners, run, train
from launch.last_words import on_sigterm, raise_terminated


@pytest.fixture
def argv(tmp_path, monkeypatch) -> list[str]:
    """A run that fails while its parts are started."""

    def fail(cfg, stack, note):
        raise ProcessFault("what failed")

    monkeypatch.setattr(learners, "join", fail)
    tiny_models.save_model(tmp_path / "model")
    (tmp_path / "rewards.py").write_text("def f(completions, **_):\n    return [0.0] * len(completions)\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n')
    values = {"model.path": "model", "data.path": "prompts.jsonl", "rewards.a.fn": "rewards.py:f", "run.dir": "runs"}
    values |= {"rollout.max_new_tokens": "8"}
    monkeypatch.chdir(tmp_path)
    return [word for key, value in values.items() for word in (f"--{key}", value)]


@pytest.fixture(autouse=True)
def handler():
    before = signal.getsignal(signal.SIGTERM)
    yield before
    signal.signal(signal.SIGTERM, before)


def test_a_sigterm_after_the_fault_does_not_take_the_words(argv, monkeypatch, capsys):
    """Another rank that ended first has the launcher send it while this one has still to say why."""
    say = train._say

    def late(error):
        os.kill(os.getpid(), signal.SIGTERM)
        say(error)

    monkeypatch.setattr(train, "_say", late)
    assert train.main(argv) == ProcessFault.exit_code
    assert capsys.readouterr().err.splitlines()[-1] == "tokenppo: what failed"


def test_a_sigterm_that_meets_a_finalizer_is_heard_behind_it(capsys):
    """What is raised in one is printed and forgotten: the rank would go on as if nothing had been said."""
    signal.signal(signal.SIGTERM, raise_terminated)
    behind = []

    class Ended:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            behind.append("the end of the finalizer")

    with pytest.raises(SystemExit) as ended:
        Ended()
        threading.Event().wait(30)
    assert ended.value.code == TERMINATED and behind and capsys.readouterr().err == ""


def test_a_process_that_lives_on_hears_sigterm_again(argv, handler):
    values = dict(zip([key.removeprefix("--") for key in argv[::2]], argv[1::2], strict=True))
    with pytest.raises(ProcessFault, match="what failed"):
        run.run(load(None, values))
    assert signal.getsignal(signal.SIGTERM) == handler


def test_sigterm_is_heard_while_the_main_thread_is_in_a_call_into_c():
    """In place of `ray.get`: a read that only the thread can end; no handler in Python runs before it is over."""
    source, sink = os.pipe()
    handled = []
    signal.signal(signal.SIGTERM, lambda *_: handled.append(1))
    answer = ctypes.create_string_buffer(1)
    given_up = threading.Timer(10, os.write, (sink, b"-"))
    with on_sigterm(lambda: os.write(sink, b"+")):
        terminate = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
        given_up.start()
        terminate.start()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # here only: it would interrupt the read
        try:
            assert ctypes.CDLL(None).read(source, answer, 1) == 1
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    given_up.cancel()
    given_up.join()
    os.close(source)
    os.close(sink)
    assert answer.value == b"+" and handled == [1], "the handler of the process runs too"


def test_sigterm_after_the_block_and_other_signals_within_it_call_nothing():
    called = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        before = signal.signal(number, lambda *_: None)
        try:
            with on_sigterm(lambda: called.append(1)):
                if number == signal.SIGUSR1:
                    os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        finally:
            signal.signal(number, before)
    assert not called and signal.set_wakeup_fd(-1) == -1 and "sigterm" not in {t.name for t in threading.enumerate()}
