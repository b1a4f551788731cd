"""Components that another server scores: ours (`fn: http://host:port`) and OpenRLHF's (`fn: openrlhf:http://...`).

A request ends at its deadline whatever the other side does: accept and never answer, send a byte a second, send without
end. It is tried again, at another server where there are several, only after what may pass: no connection, a timeout,
408, 429 and 5xx. What comes back is checked in full (reward_server/wire.py); nothing of it becomes a number unchecked.
"""

import asyncio
import json
import os
import ssl
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import httpx2 as httpx
import stamina

from core.faults import RewardFault
from core.reward_name import RewardName
from reward_server.adapters import rewards_of
from reward_server.components import ScoreRequest
from reward_server.texts import text_of
from reward_server.wire import ARROW, JSON, WireError, decode_answer, encode_request, strict_json

TOKEN_VARIABLE = "TOKENPPO_REWARD_TOKEN"
TRANSIENT = (408, 429, 500, 502, 503, 504)
MAX_CONNECTIONS = 16
REWARD_BYTES = 64  # that a reward may take in an answer, digits and comma; a fault may take more
FAULT_BYTES = 4096


def at(name: RewardName) -> type:
    """The component class for the URL in `rewards.NAME.fn`."""
    kind = OpenRLHFServer if name.adapter == "openrlhf" else HttpComponent
    return type(kind.__name__, (kind,), {"url": name.target})


class TransientFault(Exception):
    """An answer that may be another one next time. `after_s`: how long the server wants to be left alone."""

    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.after_s = after_s


class Caller:
    """Posts bodies to one of several servers, within a deadline, over pooled connections.

    Options of every component behind a URL:
        servers: more addresses of the same kind; requests go to them in turn, retries to the next.
        timeout_s: seconds for a request with all its retries.
        attempts: how often it is tried at most.
        token_file: file with the bearer token; else $TOKENPPO_REWARD_TOKEN, where that is set.
        ca_file: certificates that sign the server's; those of the system if None.
    """

    url: ClassVar[str]

    def __init__(
        self,
        servers: list[str] | None = None,
        timeout_s: float = 60.0,
        attempts: int = 5,
        token_file: str | None = None,
        ca_file: str | None = None,
    ) -> None:
        self._urls = [_checked(url) for url in [self.url, *(servers or [])]]
        if not 0 < timeout_s <= 3600:
            raise ValueError(f"timeout_s = {timeout_s}: wants seconds, more than 0 and at most 3600")
        if not 1 <= attempts <= 100:
            raise ValueError(f"attempts = {attempts}: wants 1 to 100")
        self._timeout_s, self._attempts, self._ca_file = timeout_s, attempts, ca_file
        self._token_file = token_file
        self._turn = 0
        # Connections belong to the event loop that opened them.
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = WeakKeyDictionary()

    def setup(self, device: str) -> None:
        """A token file or certificates that are not there are found now, before anything is scored."""
        self._token()
        ssl.create_default_context(cafile=self._ca_file)

    async def close(self) -> None:
        if client := self._clients.pop(asyncio.get_running_loop(), None):
            await client.aclose()

    def _client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            headers = {"Accept-Encoding": "identity", "User-Agent": "tokenppo"}
            if token := self._token():
                headers["Authorization"] = f"Bearer {token}"
            # Proxies and netrc of the environment would send prompts, and the token, to somebody else.
            self._clients[loop] = httpx.AsyncClient(
                headers=headers,
                follow_redirects=False,
                trust_env=False,
                timeout=httpx.Timeout(self._timeout_s),
                limits=httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS),
                verify=ssl.create_default_context(cafile=self._ca_file),
            )
        return self._clients[loop]

    def _token(self) -> str | None:
        if self._token_file is None:
            return os.environ.get(TOKEN_VARIABLE)
        return Path(self._token_file).expanduser().read_text(encoding="utf-8").strip()

    async def post(self, path: str, body: bytes, kind: str, most: int) -> tuple[bytes, str]:
        """The body of a 200 and its type, at most `most` bytes. Raises RewardFault with what went wrong last."""
        last: Exception | None = None
        where = self._urls[0]
        try:
            async with asyncio.timeout(self._timeout_s):
                async for attempt in stamina.retry_context(
                    on=_wait, attempts=self._attempts, timeout=None, wait_initial=0.1, wait_max=10.0, wait_jitter=0.5
                ):
                    with attempt:
                        where = self._urls[self._turn % len(self._urls)]
                        self._turn += 1
                        try:
                            return await self._once(where + path, body, kind, most)
                        except (TransientFault, httpx.TransportError) as error:
                            last = error
                            raise
        except TimeoutError:
            ended = f"; the last try ended with {_words(last)}" if last else ""
            raise RewardFault(f"{where}: no answer within timeout_s = {self._timeout_s:g} s{ended}") from None
        except (TransientFault, httpx.TransportError) as error:
            raise RewardFault(f"{where}: {_words(error)}, tried {self._attempts} times") from None
        except httpx.HTTPError as error:
            raise RewardFault(f"{where}: {_words(error)}") from None
        raise AssertionError("a retry ended without an answer or an error")

    async def _once(self, url: str, body: bytes, kind: str, most: int) -> tuple[bytes, str]:
        headers = {"Content-Type": kind, "Accept": kind}
        async with self._client().stream("POST", url, content=body, headers=headers) as response:
            status = response.status_code
            if status in TRANSIENT:
                after = response.headers.get("retry-after", "")
                raise TransientFault(f"status {status}", min(float(after), 3600.0) if after.isdecimal() else None)
            if status != 200:
                said = await _read(response, FAULT_BYTES, cut=True)
                raise RewardFault(f"{url}: status {status} {_error_in(said)}".rstrip())
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise RewardFault(f"{url}: its answer has a Content-Encoding, and none was accepted")
            answered = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            return await _read(response, most), answered


class HttpComponent(Caller):
    """A component of a server like ours: `tokenppo serve-reward`.

    Options besides those of Caller:
        component: its name there; the one it has here if None.
        format: `arrow` or `json`.
    """

    wants_component_name = True

    def __init__(self, component: str, format: str = "arrow", **options: Any) -> None:
        super().__init__(**options)
        if format not in ("arrow", "json"):
            raise ValueError(f"format = {format!r}: arrow or json")
        self._component, self._kind = component, ARROW if format == "arrow" else JSON
        self._asks = (*self._urls, self._kind, *sorted((name, str(value)) for name, value in options.items()))

    def score(self, batch: ScoreRequest) -> Awaitable[list[Any]]:
        # Components that ask the same server about the same batch do so in one request: all of them are begun before
        # the first is awaited.
        asked = _asked.get(self._asks)
        if asked is None or asked.batch is not batch or asked.answer is not None:
            asked = _asked[self._asks] = _Asked(batch)
        asked.names.append(self._component)
        return self._entries(asked)

    async def _entries(self, asked: "_Asked") -> list[Any]:
        if asked.answer is None:
            if _asked.get(self._asks) is asked:
                del _asked[self._asks]
            asked.answer = asyncio.ensure_future(self._ask(asked.batch, asked.names))
        return (await asked.answer)[self._component]

    async def _ask(self, batch: ScoreRequest, names: list[str]) -> dict[str, list[Any]]:
        body = encode_request(batch, names, self._kind)
        tokens = sum(map(len, batch.completion_ids))
        most = 65536 + (tokens * REWARD_BYTES + len(batch) * FAULT_BYTES) * len(names)
        answer, kind = await self.post("/v1/score", body, self._kind, most)
        return decode_answer(answer, kind, batch, names)


@dataclass
class _Asked:
    """A request that is about to be sent, and the components that it is for."""

    batch: ScoreRequest
    names: list[str] = field(default_factory=list)
    answer: asyncio.Future[dict[str, list[Any]]] | None = None


_asked: dict[tuple, _Asked] = {}  # by server and options


class OpenRLHFServer(Caller):
    """A reward model behind OpenRLHF's protocol: POST {query, prompts, labels}, answer {rewards: [B numbers]}.

    `query` is prompt and response in one text; labels are the column `label` (option `label_column`). The number goes
    to the last token. The URL is used as it is given.
    """

    def __init__(self, label_column: str = "label", **options: Any) -> None:
        super().__init__(**options)
        self._label_column = label_column

    def score(self, batch: ScoreRequest) -> Awaitable[list[Any]]:
        return self._score(batch)

    async def _score(self, batch: ScoreRequest) -> list[Any]:
        prompts = [text_of(prompt) for prompt in batch.prompts]
        queries = [prompt + text_of(text) for prompt, text in zip(prompts, batch.completions, strict=True)]
        labels = batch.columns.get(self._label_column, [None] * len(batch))
        body = json.dumps({"query": queries, "prompts": prompts, "labels": labels}).encode()
        answer, kind = await self.post("", body, JSON, 65536 + len(batch) * FAULT_BYTES)
        if kind != JSON:
            raise RewardFault(f"{self._urls[0]}: its answer is {kind[:80]!r}, wanted is {JSON}")
        try:
            tree = strict_json(answer, 32)
        except WireError as error:
            raise RewardFault(f"{self._urls[0]}: its answer: {error}") from None
        if not isinstance(tree, dict) or "rewards" not in tree:
            raise RewardFault(f"{self._urls[0]}: its answer has no `rewards`")
        return rewards_of(tree)


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError(f"{url}: wants http(s)://host:port, without a user, a query or a fragment in it")
    return url.rstrip("/")


def _wait(error: Exception) -> bool | float:
    """For stamina: whether to try again, or after how many seconds."""
    if isinstance(error, TransientFault) and error.after_s is not None:
        return error.after_s
    return isinstance(error, TransientFault | httpx.TransportError)


async def _read(response: httpx.Response, most: int, *, cut: bool = False) -> bytes:
    """The raw body, never more than `most` bytes in memory. Raises RewardFault for a longer one, unless `cut`."""
    parts, size = [], 0
    async for part in response.aiter_raw():
        parts.append(part)
        size += len(part)
        if size > most:
            if cut:
                break
            raise RewardFault(f"{response.url}: its answer is longer than {most} bytes")
    return b"".join(parts)


def _error_in(body: bytes) -> str:
    """What a server of ours says is wrong, on one line."""
    try:
        tree = json.loads(body)
    except ValueError:
        return ""
    said = tree.get("error") if isinstance(tree, dict) else None
    return f"({' '.join(said.split())[:300]})" if isinstance(said, str) else ""


def _words(error: Exception | None) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")[:300]
