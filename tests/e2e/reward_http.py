"""Servers for the tests of rewards over HTTP: ours as a process, and others that misbehave in one way each."""

import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil

from reward_server.components import ScoreRequest
from reward_server.texts import words


class Served:
    """A `tokenppo serve-reward` that was started here."""

    def __init__(self, config: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self.log = config.with_suffix(".served")
        command = [str(Path(sys.executable).parent / "tokenppo"), "serve-reward", "--config", str(config)]
        self._out = open(self.log, "ab")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=self._out,
            text=True,
            env=environment,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"at (http://(\S+):(\d+))$", line.strip())
        assert found, (line, self.log.read_text())
        self.url, self.host, self.port = found[1], found[2].strip("[]"), int(found[3])

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}
        finally:
            connection.close()

    def rss(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def end(self) -> int:
        self.process.terminate()
        code = self.process.wait(20)
        self._out.close()
        return code


@contextlib.contextmanager
def misbehaving(act: Callable[[socket.socket], None]) -> Iterator[str]:
    """The URL of a server that does `act` with each connection, once it has read a request."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            read_request(connection)
            act(connection)

    def accept() -> None:
        while not ended.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        ended.set()
        listener.close()


def read_request(connection: socket.socket) -> bytes:
    """Header and body of one request."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            return data
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    while length and len(body) < int(length[1]):
        part = connection.recv(65536)
        if not part:
            break
        body += part
    return head + b"\r\n\r\n" + body


def answers(body: bytes, kind: str = "application/json", status: str = "200 OK", *headers: str) -> Callable:
    def act(connection: socket.socket) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers]
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    return act


def hangs(connection: socket.socket) -> None:
    while connection.recv(1024):
        pass


def drips(connection: socket.socket) -> None:
    """A byte a second, from the first byte of the header on."""
    for byte in b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + b" " * 1000:
        connection.sendall(bytes([byte]))
        time.sleep(1)


def drips_body(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(1000):
        connection.sendall(b" ")
        time.sleep(1)


def floods(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    for _ in range(100_000):
        connection.sendall(b" " * 65536)


def batch(texts: list[str], **columns: list) -> ScoreRequest:
    pieces = [words(text) for text in texts]
    return ScoreRequest(
        prompts=["p"] * len(texts),
        completions=list(texts),
        prompt_ids=[[1]] * len(texts),
        completion_ids=[ids for ids, _ in pieces],
        offsets=[np.asarray(offsets) for _, offsets in pieces],
        finish_reasons=["stop"] * len(texts),
        uids=[f"u{i}" for i in range(len(texts))],
        columns=columns,
    )


def as_json(request: ScoreRequest) -> bytes:
    from reward_server.wire import JSON, encode_request

    tree = json.loads(encode_request(request, ["x"], JSON))
    del tree["components"]
    return json.dumps(tree).encode()
