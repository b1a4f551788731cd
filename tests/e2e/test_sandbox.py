"""Programs that a model might write: none does harm, none passes what it does not deserve, none outlives its time."""

import socket
import time
from pathlib import Path

import psutil
import pytest

from core.faults import RewardFault, UserError
from reward_http import batch
from reward_server.components import Component, score_components
from reward_server.library.code import UnitTests, program_in
from reward_server.sandbox import Limits, refuse_unavailable, run_tests

pytestmark = pytest.mark.slow

TESTS = ["assert add(1, 2) == 3"]
GOOD = "def add(a, b):\n    return a + b\n"
LIMITS = Limits(wall_s=2.0, cpu_s=3, memory_mb=256, file_mb=4, processes=16)


@pytest.fixture(scope="module", autouse=True)
def strict():
    try:
        refuse_unavailable("strict")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def canary(tmp_path) -> Path:
    """A file that everybody may write, in a folder that everybody may enter."""
    file = tmp_path / "canary"
    file.write_text("unharmed")
    file.chmod(0o666)
    return file


def test_what_it_should_do_it_does():
    verdict = run_tests(
        GOOD + "print('hi')", [*TESTS, "assert add(1, 1) == 3", "add()", "x = add('a', 'b')"], LIMITS, "strict"
    )
    assert verdict.passed == [True, False, False, True] and verdict.error == "" and verdict.output == b"hi\n"
    assert run_tests(
        "import math, json, re, collections, random, datetime\n" + GOOD, TESTS, LIMITS, "strict"
    ).passed == [True]


HOSTILE = {
    "leaves with 0": "import sys; sys.exit(0)",
    "leaves at once": "import os; os._exit(0)",
    "leaves later": GOOD + "import atexit, os\natexit.register(lambda: os._exit(0))\nraise SystemExit",
    "loops": "while True: pass",
    "sleeps": "import time; time.sleep(1000)",
    "a thread that never ends": (
        "import threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\nwhile 1: pass"
    ),
    "10 GiB": "x = bytearray(10 * 2**30)",
    "memory bit by bit": "x = []\nwhile True: x.append(bytearray(2**20))",
    "deep recursion": "f = lambda: f()\nf()",
    "crashes": "import ctypes; ctypes.string_at(0)",
    "a flood of output": "while True: print('x' * 65536)",
    "a huge file": "f = open('/tmp/x', 'wb')\nwhile True: f.write(b'x' * 2**20)",
    "many files": "for i in range(10**6): open(f'/tmp/{i}', 'w').close()",
    "forks": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "a child in its own session": (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0: time.sleep(1000)\n"
        "time.sleep(1000)"
    ),
    "ignores signals": (
        "import signal\n"
        "for s in range(1, 65):\n"
        "    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "while True: pass"
    ),
    "stops itself": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "kills all": "import os; os.kill(-1, 9)",
    "kills the first process": "import os\nos.kill(1, 9)\nos.kill(os.getppid(), 9)\nassert False",
    "a socket to outside": "import socket; socket.create_connection(('127.0.0.1', PORT), 1)",
    "a socket to the world": "import socket; socket.create_connection(('1.1.1.1', 53), 1)",
    "listens and connects": (
        "import socket\ns = socket.create_server(('127.0.0.1', 0))\nsocket.create_connection(s.getsockname(), 1)"
    ),
    "an abstract socket": ("import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0tokenppo-canary')"),
    "reads the canary": "open('CANARY').read()",
    "writes the canary": "open('CANARY', 'w').write('harmed')",
    "reads a home": "import os; os.listdir('/root')",
    "reads passwords": "open('/etc/shadow').read()",
    "reads the environment of others": "open('/proc/1/environ').read()",
    "writes to the system": "open('/usr/x', 'w')",
    "mounts": ("import ctypes\nc = ctypes.CDLL(None)\nassert c.mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0"),
    "a namespace of its own": ("import ctypes\nc = ctypes.CDLL(None)\nassert c.unshare(0x20000) == 0"),
    "chroots out": "import os\nos.mkdir('/tmp/a'); os.chroot('/tmp/a')",
    "becomes root": "import os; os.setuid(0)",
    "traces": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    "raises its limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    "a device": "import os, stat; os.mknod('/tmp/d', 0o666 | stat.S_IFBLK, os.makedev(8, 0))",
    "a link out": "import os; os.symlink('CANARY', '/tmp/l'); open('/tmp/l', 'w').write('harmed')",
    "pickle": (
        "import pickle, os\nclass P:\n    def __reduce__(self): return os._exit, (0,)\npickle.loads(pickle.dumps(P()))"
    ),
    "closes all": "import os; os.closerange(0, 100)",
    "fills its pipes": (
        "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'true\\n' * 100000)\n    except OSError: pass"
    ),
    "another assert": ("import builtins\nbuiltins.AssertionError = type('A', (BaseException,), {})\nadd = None"),
    "another exec": (
        "import builtins\nbuiltins.exec = lambda *a: None\nbuiltins.compile = lambda *a: None\nadd = None"
    ),
    "catches all": "import sys\nsys.excepthook = lambda *a: None\nadd = lambda a, b: 4",
    "says it passed": 'print(\'{"error": ""}\\npassed\')\nadd = lambda a, b: 4',
    "a null character": "\0",
    "half a surrogate pair": "x = '\ud800'",
    "no program": "",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_does_no_harm_and_passes_nothing(name, canary):
    with socket.create_server(("127.0.0.1", 0)) as outside, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0tokenppo-canary")
        abstract.listen()
        outside.settimeout(0.05)
        program = HOSTILE[name].replace("PORT", str(outside.getsockname()[1])).replace("CANARY", str(canary))
        started, free = time.monotonic(), psutil.Process().memory_info().rss
        verdict = run_tests(program, TESTS, LIMITS, "strict")
        assert time.monotonic() - started < LIMITS.wall_s + 2
        assert verdict.passed == [False] and len(verdict.output) <= LIMITS.output_bytes
        assert psutil.Process().memory_info().rss - free < 64 * 2**20
        with pytest.raises(TimeoutError):
            outside.accept()
    assert canary.read_text() == "unharmed"
    assert not psutil.Process().children(recursive=True)
    assert not [p for p in psutil.process_iter(["cmdline"]) if "def harness" in " ".join(p.info["cmdline"] or [])]


def test_a_program_cannot_reach_what_its_user_could(canary):
    """Each line tries one thing and must raise: what is harmless by luck would show."""
    tries = [
        f"open({str(canary)!r})",
        "open('/etc/passwd')",
        "__import__('os').listdir('/home')",
        "open('/proc/1/stat')",
    ]
    for line in tries:
        assert run_tests(line, ["pass"], LIMITS, "strict").error, line


def test_sandboxes_beside_each_other_do_not_disturb_each_other():
    component = Component("tests", UnitTests, {"allow_execution": True, "workers": 4, "timeout_s": 4.0})
    component.setup("cpu")
    texts = [GOOD, "while True: pass", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"] + [
        GOOD
    ] * 5
    answers = score_components([component], batch(texts, tests=[TESTS] * len(texts)))["tests"]
    assert [float(placed.sum()) for placed, _ in answers] == [1.0, -0.5, -0.5, *[1.0] * 5]


class TestUnitTests:
    @pytest.fixture(scope="class")
    @staticmethod
    def component():
        component = Component("tests", UnitTests, {"allow_execution": True, "timeout_s": 3.0})
        component.setup("cpu")
        return component

    def rewards(self, component, text: str, tests) -> dict[str, float]:
        """Text of the tokens that have a reward, by what they have together."""
        request = batch([text], tests=[tests])
        ((placed, _),) = score_components([component], request)["tests"]
        pieces: dict[float, list[tuple[str, float]]] = {}
        for (a, b), reward in zip(request.offsets[0], placed.tolist(), strict=True):
            if reward:
                pieces.setdefault(reward > 0, []).append((text[a:b], reward))
        return {"".join(t for t, _ in found).strip(): round(sum(r for _, r in found), 9) for found in pieces.values()}

    def test_the_share_of_tests_is_on_the_last_line_of_the_program(self, component):
        text = f"Here:\n```python\n{GOOD}```\nDone."
        assert self.rewards(component, text, [*TESTS, "assert add(1, 1) == 3"]) == {"return a + b": 0.5}
        assert self.rewards(component, GOOD, TESTS[0]) == {"return a + b": 1.0}

    def test_a_fault_is_on_the_line_that_raised(self, component):
        assert self.rewards(component, "x = 1\ny = 1 / 0\nz = 2\n", TESTS) == {"y = 1 / 0": -0.5}
        assert self.rewards(component, "```python\nx = 1\ndef f(:\n    pass\n```", TESTS) == {"def f(:": -0.5}
        assert self.rewards(component, "def g():\n    raise ValueError\ng()\n", TESTS) == {"raise ValueError": -0.5}

    def test_rows_without_tests_are_left_out_and_wrong_ones_are_faults(self, component):
        request = batch([GOOD, GOOD, GOOD], tests=[None, [], TESTS])
        first, second, third = score_components([component], request)["tests"]
        assert not first[1].any() and isinstance(second, RewardFault) and third[0].sum() == pytest.approx(1.0)
        (fault,) = score_components([component], batch([GOOD]))["tests"]
        assert "has no column `tests`" in str(fault)

    def test_it_is_off_until_it_is_asked_for(self):
        with pytest.raises(UserError, match="allow_execution: true"):
            Component("tests", UnitTests)
        with pytest.raises(UserError, match="level"):
            Component("tests", UnitTests, {"allow_execution": True, "level": "none"})


def test_strict_is_refused_where_there_are_no_namespaces(monkeypatch, tmp_path):
    """The same child in which unshare says what a kernel without namespaces says."""
    from reward_server import sandbox

    refused = 'raise OSError(1, "Operation not permitted")'
    text = sandbox.CHILD.read_text().replace('check(libc.unshare(flags), "unshare")', refused)
    text = text.replace('check(libc.unshare(flags | NEWUSER), "unshare")', refused)
    assert text.count(refused) == 2
    (tmp_path / "child.py").write_text(text)
    monkeypatch.setattr(sandbox, "CHILD", tmp_path / "child.py")
    with pytest.raises(UserError, match="strict: no sandbox could be made .Operation not.*level: basic"):
        refuse_unavailable("strict")


def test_basic_keeps_its_limits_where_there_are_no_namespaces(monkeypatch):
    """What it promises and no more: time, memory, output, an empty environment, no root."""
    from reward_server import sandbox

    try:
        refuse_unavailable("basic")
    except UserError as error:  # the Python of these tests is in a folder that others may not enter
        assert "readable by the user nobody" in str(error)
        if not Path("/usr/bin/python3").exists():
            pytest.skip(str(error))
        monkeypatch.setattr(sandbox, "PYTHON", "/usr/bin/python3")
        refuse_unavailable("basic")
    started = time.monotonic()
    assert run_tests(GOOD, TESTS, LIMITS, "basic").passed == [True]
    for name in (
        "loops",
        "10 GiB",
        "a flood of output",
        "leaves at once",
        "ignores signals",
        "crashes",
        "fills its pipes",
    ):
        assert run_tests(HOSTILE[name], TESTS, LIMITS, "basic").passed == [False], name
    assert time.monotonic() - started < 8 * (LIMITS.wall_s + 1)
    alone = "import os; assert os.getuid() != 0 and len(os.environ) <= 4 and 'PWD' not in os.environ"
    assert run_tests(alone, ["pass"], LIMITS, "basic").error == ""
    assert not psutil.Process().children(recursive=True)


def test_the_program_is_the_last_block_of_python():
    text = "```python\na\n```\ntext\n```py\nb\n```\n```json\n{}\n```"
    assert program_in(text) == (text.index("b\n"), "b\n") and program_in("x = 1") == (0, "x = 1")
