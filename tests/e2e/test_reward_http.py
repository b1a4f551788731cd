"""Rewards over HTTP: the same bits as in process, deadlines kept, nobody in without the token, nothing breaks it."""

import gzip
import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

from cards_run import CARDS, ROOT, Run, same_numbers
from core.config import load_rewards
from core.faults import RewardFault, UserError
from reward_http import Served, answers, as_json, batch, drips, drips_body, floods, hangs, misbehaving
from reward_server.components import Component, load_component, score_components
from reward_server.http_server import create_app
from reward_server.scorer import Scorer
from reward_server.wire import ARROW, JSON, Limits, encode_answer, encode_request

pytestmark = pytest.mark.slow

TOKEN = "a-secret-of-many-signs"
REWARDS = """
import time
from tokenppo import Span

def vowels(completions, **_):
    return [[Span(i, i + 1, 0.1) for i, c in enumerate(text) if c in "aeiou"] for text in completions]

def some(completions, **_):
    return [1 / 3 if "a" in text else None for text in completions]

def sleeps(completions, **_):
    time.sleep(max(float(text) for text in completions))
    return [1.0] * len(completions)

def fails(completions, **_):
    return [float("nan") if "bad" in text else 1.0 for text in completions]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("http")
    (folder / "r.py").write_text(REWARDS)
    (folder / "c.yaml").write_text(
        "rewards:\n" + "".join(f"  {n}: {{fn: 'r.py:{n}', weight: 2}}\n" for n in ("vowels", "some", "sleeps", "fails"))
    )
    return folder


@pytest.fixture(scope="module")
def served(folder):
    served = Served(folder / "c.yaml")
    yield served
    assert served.end() == 143


def component(url: str, name: str = "vowels", **options) -> Component:
    made = Component(name, load_component(url), {"timeout_s": 2.0} | options)
    made.setup("cpu")
    return made


def scored(component: Component, request) -> list:
    """Rewards as bytes, None where it does not apply, faults as they are."""
    placed = score_components([component], request)[component.name]
    return [p if isinstance(p, RewardFault) else p[0].tobytes() if p[1].all() else None for p in placed]


TEXTS = ["a cat sat", "", "h\u00e9 \U0001f600 \u4f60\u597d!", "no vwls: xyz", "A" * 500 + "a" * 500]


@pytest.mark.parametrize("form", ["arrow", "json"])
@pytest.mark.parametrize("name", ["vowels", "some"])
def test_the_same_bits_as_in_process(served, folder, name, form):
    here = Component(name, load_component(f"{folder}/r.py:{name}"))
    assert scored(component(served.url, name, format=form), batch(TEXTS)) == scored(here, batch(TEXTS))


def test_a_sample_that_fails_there_is_a_fault_here_and_the_others_are_scored(served):
    good, bad = scored(component(served.url, "fails"), batch(["good", "bad"]))
    assert isinstance(good, bytes) and isinstance(bad, RewardFault)
    assert str(bad).startswith("sample u1: component 'fails': on its server: sample u1") and "got nan" in str(bad)


def test_a_component_that_is_not_there_is_named(served):
    (fault,) = scored(component(served.url, "beauty"), batch(["x"]))
    assert "component 'beauty'" in str(fault) and "status 422" in str(fault) and "['beauty']" in str(fault)


def test_components_of_one_server_are_asked_for_in_one_request(served, folder):
    def scored_requests() -> int:
        found = re.search(rb'path="/v1/score",status="200"} (\d+)', served.ask("GET", "/metrics")[1])
        return int(found[1]) if found else 0

    names, before = ("vowels", "some", "fails"), scored_requests()
    request = batch([*TEXTS, "bad"])
    there = score_components([component(served.url, name) for name in names], request)
    assert scored_requests() - before == 1
    here = score_components([Component(name, load_component(f"{folder}/r.py:{name}")) for name in names], request)
    for name in names:
        for a, b in zip(here[name], there[name], strict=True):
            if isinstance(a, RewardFault):
                assert isinstance(b, RewardFault) and "u5" in str(b)
            else:
                assert a[0].tobytes() == b[0].tobytes() and a[1].tobytes() == b[1].tobytes()


def test_another_name_there_than_here(served, folder):
    here = Component("vowels", load_component(f"{folder}/r.py:vowels"))
    other = Component("tone", load_component(served.url), {"component": "vowels"})
    assert scored(other, batch(TEXTS)) == scored(here, batch(TEXTS))


BODY = encode_answer(batch(["x"]), Scorer({}).score(batch(["x"])), JSON, "1")


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (hangs, "no answer within timeout_s = 2 s"),
        (drips, "no answer within timeout_s = 2 s"),
        (drips_body, "no answer within timeout_s = 2 s"),
        (floods, "longer than"),
        (answers(b"<html>fine</html>", "text/html"), "'text/html'"),
        (answers(b"<html>fine</html>"), "JSON:"),
        (answers(gzip.compress(b" " * 10**8), JSON, "200 OK", "Content-Encoding: gzip"), "Content-Encoding"),
        (answers(b"", JSON, "302 Found", "Location: http://169.254.169.254/"), "status 302"),
        (answers(b"", JSON, "500 No"), "status 500, tried 3 times"),
        (answers(b'{"error": "broken\\nlines"}', JSON, "404 No"), "status 404 (broken lines)"),
        (answers(BODY[:-5]), "JSON:"),
        (lambda connection: None, "tried 3 times"),  # closes without a word
        (lambda connection: connection.sendall(b"\x00\xffnonsense\r\n\r\n"), "tried 3 times"),
    ],
)
def test_a_server_that_misbehaves_is_a_fault_within_the_deadline(act, says):
    with misbehaving(act) as url:
        asking = component(url, attempts=3)
        memory = psutil.Process().memory_info().rss
        started = time.monotonic()
        (fault,) = scored(asking, batch(["x"]))
        assert time.monotonic() - started < 3.0
        assert psutil.Process().memory_info().rss - memory < 64 * 2**20
        asking.close()
    assert isinstance(fault, RewardFault) and "sample u0: component 'vowels'" in str(fault) and says in str(fault)
    assert "\n" not in str(fault)


def test_nobody_there_is_a_fault(served):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    (fault,) = scored(component(f"http://127.0.0.1:{port}", attempts=2), batch(["x"]))
    assert "tried 2 times" in str(fault)
    # With another server in the list it is found.
    (found,) = scored(component(f"http://127.0.0.1:{port}", servers=[served.url]), batch(["x"]))
    assert isinstance(found, bytes)


def test_a_server_that_asks_to_wait_is_left_alone_that_long(served):
    times = []

    def busy_once(connection):
        times.append(time.monotonic())
        if len(times) == 1:
            answers(b"", JSON, "429 Busy", "Retry-After: 1")(connection)
        else:
            answers(b"", JSON, "404 No")(connection)

    with misbehaving(busy_once) as url:
        scored(component(url, timeout_s=10.0), batch(["x"]))
    assert len(times) == 2 and times[1] - times[0] >= 1.0


def test_a_killed_server_is_a_fault_and_another_one_takes_over(folder, served):
    doomed = Served(folder / "c.yaml")
    alone = component(doomed.url, "sleeps", timeout_s=8.0, attempts=2)
    both = component(doomed.url, "sleeps", timeout_s=8.0, servers=[served.url])
    got: dict[str, list] = {}
    waiting = [
        threading.Thread(target=lambda n=n, c=c: got.update({n: scored(c, batch(["1.0"]))}))
        for n, c in (("alone", alone), ("both", both))
    ]
    for thread in waiting:
        thread.start()
    deadline = time.monotonic() + 20
    while b"tokenppo_reward_waiting 2" not in doomed.ask("GET", "/metrics")[1]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(doomed.process.pid, signal.SIGKILL)
    for thread in waiting:
        thread.join(20)
    doomed.process.wait(10)
    assert isinstance(got["alone"][0], RewardFault) and "tried 2 times" in str(got["alone"][0])
    assert isinstance(got["both"][0], bytes)


def test_ten_times_slower_is_only_slower(served):
    """Within the deadline nothing is lost; memory of client and server stays where it was."""
    asking = component(served.url, "sleeps", timeout_s=20.0)
    scored(asking, batch(["0.0"]))
    before = psutil.Process().memory_info().rss, served.rss()
    for delay in ("0.01", "0.1") * 5:
        assert all(isinstance(x, bytes) for x in scored(asking, batch([delay] * 50)))
    after = psutil.Process().memory_info().rss, served.rss()
    assert after[0] - before[0] < 16 * 2**20 and after[1] - before[1] < 16 * 2**20


# ---------------------------------------------------------------------------------------------------- the server


PATHS = [
    ("POST", "/v1/score"),
    ("POST", "/v1/try"),
    ("POST", "/get_reward"),
    ("GET", "/v1/components"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/nowhere"),
]
WRONG = {
    "none": None,
    "wrong": "Bearer another-secret-of-signs",
    "longer": f"Bearer {TOKEN}x",
    "shorter": f"Bearer {TOKEN[:-1]}",
    "empty": "Bearer ",
    "another scheme": f"Basic {TOKEN}",
    "malformed": TOKEN,
    "no ASCII": "Bearer \xe9\xe9",
    "1 MB": "Bearer " + "x" * 2**20,
}


@pytest.fixture(scope="module")
def guarded(folder):
    file = folder / "token"
    file.write_text(TOKEN + "\n")
    guarded = Served(folder / "c.yaml", "--token-file", str(file))
    yield guarded
    guarded.end()


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_nobody_comes_in_without_the_token(guarded, method, path):
    body = as_json(batch(["x"])) if method == "POST" else None
    for name, header in WRONG.items():
        headers = {"Content-Type": JSON} | ({"Authorization": header} if header is not None else {})
        try:
            status, said, _ = guarded.ask(method, path, body, headers)
        except OSError:  # cut off while it still sent its megabyte
            assert name == "1 MB"
            continue
        assert status == (400 if name == "1 MB" else 401), (name, said)
        assert TOKEN.encode() not in said
    for scheme in ("Bearer", "bearer"):
        status, said, _ = guarded.ask(method, path, body, {"Content-Type": JSON, "Authorization": f"{scheme} {TOKEN}"})
        assert status != 401 and status < 500, said


def test_what_needs_no_token_tells_nothing(guarded):
    assert guarded.ask("GET", "/healthz")[:2] == (200, b"ok\n")
    status, page, headers = guarded.ask("GET", "/")
    assert status == 200 and b"vowels" not in page and "default-src 'none'" in headers["content-security-policy"]


def test_the_client_sends_the_token(guarded, folder):
    (fault,) = scored(component(guarded.url), batch(["x"]))
    assert "status 401" in str(fault) and "tried" not in str(fault)  # no sense in trying again
    (placed,) = scored(component(guarded.url, token_file=str(folder / "token")), batch(["x"]))
    assert isinstance(placed, bytes)


def test_limits_of_a_request(served):
    fine = as_json(batch(["x"]))
    ask = served.ask
    assert ask("POST", "/v1/score", fine, {"Content-Type": JSON})[0] == 200
    assert ask("POST", "/v1/score", fine, {"Content-Type": "text/plain"})[0] == 415
    assert ask("POST", "/v1/score", gzip.compress(fine), {"Content-Type": JSON, "Content-Encoding": "gzip"})[0] == 415
    assert ask("POST", "/v1/score", b"{}", {"Content-Type": JSON, "Content-Length": "99999999999"})[0] == 413
    assert ask("POST", "/v1/score", b"[" * 10**6, {"Content-Type": JSON})[0] == 400
    assert ask("GET", "/", headers={"Host": "evil.example"})[0] == 421
    with socket.create_connection((served.host, served.port)) as slow:  # chunked, without end
        slow.sendall(
            b"POST /v1/score HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        memory, sent = served.rss(), 0
        with pytest.raises(OSError):
            for _ in range(4000):
                slow.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
                sent += 65536
        assert sent < 200 * 2**20 and served.rss() - memory < 64 * 2**20


def test_openrlhf_s_protocol(served, folder):
    body = json.dumps(
        {"query": ["say: aeiou", "say: a bad one"], "prompts": ["say: "] * 2, "labels": ["1", "2"]}
    ).encode()
    status, said, _ = served.ask("POST", "/get_reward", body, {"Content-Type": JSON})
    assert status == 422 and b"component sleeps" in said  # it wants numbers
    (folder / "two.yaml").write_text("rewards:\n  vowels: {fn: 'r.py:vowels', weight: 2}\n  some: {fn: 'r.py:some'}\n")
    two = Served(folder / "two.yaml")
    try:
        status, said, _ = two.ask("POST", "/get_reward", body, {"Content-Type": JSON})
        # two times a tenth for each vowel of the response, and a third for its a
        assert status == 200 and json.loads(said)["rewards"] == pytest.approx([1.0 + 1 / 3, 0.8 + 1 / 3], abs=1e-12)
        theirs = Component("rm", load_component(f"openrlhf:{two.url}/get_reward"))
        theirs.setup("cpu")
        (placed,) = score_components([theirs], batch(["aeiou"]))["rm"]
        assert placed[0][:-1].tolist() == [0.0] * (len(placed[0]) - 1)
        assert placed[0][-1] == pytest.approx(1.0 + 1 / 3, abs=1e-12)
    finally:
        two.end()


def test_nothing_of_a_prompt_or_response_is_in_the_log(served):
    canary = "canary-7f3a"
    served.ask("POST", "/v1/try", json.dumps({"prompt": canary, "completion": canary}).encode(), {"Content-Type": JSON})
    served.ask("POST", "/v1/score", as_json(batch([canary])), {"Content-Type": JSON})
    served.ask("POST", f"/{canary}", canary.encode(), {"Content-Type": canary})
    assert canary not in served.log.read_text()


def test_too_many_at_once_are_told_to_come_back(folder):
    """One is scored, the queue is full, the next gets 429 and when to come again; those that waited are scored."""
    scorer = Scorer(load_rewards(folder / "c.yaml"))
    app = create_app(scorer, load_rewards(folder / "c.yaml"), version="1", limits=Limits(waiting=1, score_s=20))
    from starlette.testclient import TestClient

    with TestClient(app) as client:
        body = as_json(batch(["0.5"]))
        got: list[tuple[int, str | None]] = []

        def ask() -> None:
            answer = client.post("/v1/score", content=body, headers={"Content-Type": JSON})
            got.append((answer.status_code, answer.headers.get("retry-after")))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert sorted(got)[:2] == [(200, None)] * 2 and sorted(got)[-1] == (429, "1")
    assert {status for status, _ in got} == {200, 429}


def test_scoring_that_takes_too_long_is_503(folder):
    scorer = Scorer(load_rewards(folder / "c.yaml"))
    app = create_app(scorer, load_rewards(folder / "c.yaml"), version="1", limits=Limits(score_s=0.2))
    from starlette.testclient import TestClient

    with TestClient(app) as client:
        answer = client.post("/v1/score", content=as_json(batch(["1.0"])), headers={"Content-Type": JSON})
    assert answer.status_code == 503 and "0.2 s" in answer.json()["error"] and answer.headers["retry-after"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--host", "0.0.0.0"], "so a token is wanted"),
        (["--token-file", "/nowhere"], "cannot be read"),
        (["--port", "70000"], "ports are from"),
        (["--host", "203.0.113.7", "--token-file", "TOKEN"], "cannot listen there"),
        (["--port", "TAKEN"], "cannot listen there"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(folder, guarded, capsys, monkeypatch, options, says):
    from launch import cli

    monkeypatch.delenv("TOKENPPO_REWARD_TOKEN", raising=False)
    known = {"TOKEN": str(folder / "token"), "TAKEN": str(guarded.port)}
    options = [known.get(word, word) for word in options]
    assert cli.main(["serve-reward", "--config", str(folder / "c.yaml"), *options]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://me:secret@host", "http://h?x=1"])
def test_an_address_that_is_none(url):
    name = url.replace("ftp://x", "http://")  # what is no URL at all is named as a file or package
    with pytest.raises(UserError):
        Component("c", load_component(name))


# ---------------------------------------------------------------------------------------------------- fuzz


def fuzzed_app():
    from core.schema import RewardConfig

    rewards = {"length": RewardConfig(fn="handed_over:length"), "words": RewardConfig(fn="handed_over:words")}
    functions = {
        "length": lambda completion_ids: [[0.5] * len(ids) for ids in completion_ids],
        "words": lambda completions, **_: [None if i % 2 else 1.0 for i, _ in enumerate(completions)],
    }
    return create_app(Scorer(rewards, functions), rewards, version="1")


@schemathesis.serializer(ARROW)
def as_arrow(ctx, value):
    """Half of the time a whole request with some of its bytes exchanged: noise alone ends at the first check."""
    noise = value if isinstance(value, bytes) else str(value).encode()
    whole = bytearray(encode_request(batch(["fuzz", "more"]), ["length"], ARROW))
    if len(noise) % 2:
        return noise
    for i, byte in enumerate(noise):
        whole[(i * 7919 + byte * 104729) % len(whole)] = byte
    return bytes(whole)


SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", fuzzed_app())
PATHS_OF_SCHEMA = [("POST", "/v1/score"), ("POST", "/v1/try"), ("POST", "/get_reward")]
EXAMPLES = 900  # of each path in each mode: 5,400 together
tried: dict[str, int] = {}


# Not schema.parametrize(): its tests share one name, and of those that run beside others only the first would run.
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize(("method", "path"), PATHS_OF_SCHEMA)
def test_nothing_that_is_sent_breaks_it(method, path, mode):
    """Bodies that fit the description of the API and bodies that do not: no answer is a 5xx."""

    @settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
    )
    @given(case=SCHEMA[path][method].as_strategy(generation_mode=mode))
    def send(case):
        tried[path] = tried.get(path, 0) + 1
        case.validate_response(case.call(), checks=[not_a_server_error])

    send()


def test_the_paths_that_are_fuzzed_are_all_that_take_a_body_and_the_others_answer():
    described = SCHEMA.raw_schema["paths"]
    assert {path for path, ways in described.items() if "post" in ways} == {path for _, path in PATHS_OF_SCHEMA}
    for path in set(described) - {path for _, path in PATHS_OF_SCHEMA}:
        for case in [SCHEMA[path]["GET"].Case()]:
            assert case.call().status_code == 200


def test_so_many_examples_were_tried():
    assert len(tried) == 3 and sum(tried.values()) >= 5000, tried


# ---------------------------------------------------------------------------------------------------------------- a run


def test_cards_are_rewarded_and_trained_over_http_as_in_process(tmp_path):
    """Token rewards decide every number of a run: the same bits in all of its metrics, over HTTP in another process."""
    options = [
        "--run.steps",
        "2",
        "--rollout.batch_size",
        "32",
        "--ppo.mini_batch_size",
        "16",
        "--data.eval_prompts",
        "16",
    ]
    options += ["--run.deterministic", "--log.trackers", "[]"]
    here = Run(tmp_path / "here", *options)
    assert here.end(300) == 0, here.words()
    (tmp_path / "cards.yaml").write_text(CARDS.read_text().replace("../", f"{ROOT}/"))
    served = Served(tmp_path / "cards.yaml")
    try:
        names = load_rewards(CARDS)
        there = [word for name in names for word in (f"--rewards.{name}.fn", served.url)]
        over_http = Run(tmp_path / "there", *options, *there)
        assert over_http.end(300) == 0, over_http.words()
        assert served.ask("GET", "/metrics")[1].count(b'path="/v1/score",status="200"') == 1
    finally:
        served.end()
    same_numbers(here.rows(), over_http.rows())


def test_a_run_whose_server_is_gone_ends_with_4_and_names_it(tmp_path):
    with misbehaving(answers(b"<html>", "text/html")) as url:
        (name, *_) = load_rewards(CARDS)
        options = [
            "--run.steps",
            "1",
            "--rollout.batch_size",
            "16",
            "--ppo.mini_batch_size",
            "16",
            "--data.eval_path",
            "null",
        ]
        run = Run(tmp_path / "r", *options, f"--rewards.{name}.fn", url)
        assert run.end(300) == 4, run.words()
    last = run.words().splitlines()[-1]
    assert f"component '{name}'" in last and "text/html" in last and "sample " in last
    assert not run.rows()
