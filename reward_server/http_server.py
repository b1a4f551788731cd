"""The reward server over HTTP: `tokenppo serve-reward`.

    POST /v1/score        raw rewards of each component for each token (reward_server/wire.py: Arrow IPC or JSON)
    POST /v1/try          the same for one prompt and response as text, cut into words: what the page asks
    POST /get_reward      OpenRLHF's protocol: one number per query, the weighted sum over components and tokens
    GET  /v1/components   names, weights and descriptions
    GET  /healthz         200 while the process lives
    GET  /readyz          200 once components are loaded and requests are taken, else 503
    GET  /metrics         counters for Prometheus
    GET  /                a page to paste a prompt and a response into and see the reward of each token

It trusts nobody: limits hold before anything is parsed or scored, nothing is fetched, and no text of a prompt or
response is logged. Scoring is one lane in a thread of its own; what waits is bounded.
"""

import asyncio
import hmac
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any, Protocol

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.faults import RewardFault
from core.schema import RewardConfig
from reward_server.components import Placed, ScoreRequest
from reward_server.texts import words
from reward_server.wire import ARROW, JSON, Limits, WireError, decode_request, encode_answer, strict_json

OPEN = ("/", "/healthz")  # without a token: neither tells anything
RETRY_AFTER_S = 1
DEFAULT_LIMITS = Limits()
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


class Scores(Protocol):
    """`reward_server.scorer.Scorer`, or what acts like it."""

    @property
    def names(self) -> list[str]: ...

    def score(self, request: ScoreRequest, names: list[str] | None = None) -> dict[str, list[Placed | RewardFault]]: ...


class Refusal(Exception):
    """An answer that is no score: status, reason, and headers that go with it."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers


class Busy(Refusal):
    def __init__(self, reason: str) -> None:
        super().__init__(429, reason, **{"Retry-After": str(RETRY_AFTER_S)})


class Lane:
    """One scoring at a time, in a thread; at most `limits.waiting` others wait for it."""

    def __init__(self, scores: Scores, limits: Limits) -> None:
        self._scores, self._limits = scores, limits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="score")
        self.waiting = 0
        self.seconds, self.calls, self.tokens = 0.0, 0, 0

    async def score(self, request: ScoreRequest, names: list[str]) -> dict[str, list[Placed | RewardFault]]:
        """Raises Busy where too many wait, Refusal 503 where it takes longer than `limits.score_s`."""
        if self.waiting > self._limits.waiting:
            raise Busy(f"{self.waiting} requests wait already")
        self.waiting += 1
        running = asyncio.get_running_loop().run_in_executor(self._thread, self._score, request, names)
        running.add_done_callback(lambda _: self._one_less())
        try:
            return await asyncio.wait_for(asyncio.shield(running), self._limits.score_s)
        except TimeoutError:
            running.cancel()  # unless it has begun: a component that computes cannot be stopped
            raise Refusal(503, f"not scored within {self._limits.score_s:g} s", **{"Retry-After": "5"}) from None

    def _one_less(self) -> None:
        self.waiting -= 1

    def _score(self, request: ScoreRequest, names: list[str]) -> dict[str, list[Placed | RewardFault]]:
        started = time.perf_counter()
        scores = self._scores.score(request, names)
        self.seconds += time.perf_counter() - started
        self.calls += 1
        self.tokens += sum(map(len, request.completion_ids))
        return scores

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


async def _beside(size: int, kind: str, work: Callable, *args: Any) -> Any:
    """`work(*args)`, in a thread where it would keep others waiting for more than a few milliseconds. A change of
    thread costs one or two itself."""
    if size <= (4 * 2**20 if kind == ARROW else 2**16):
        return work(*args)
    return await asyncio.to_thread(work, *args)


def create_app(
    scores: Scores,
    rewards: dict[str, RewardConfig],
    *,
    version: str,
    token: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    hosts: tuple[str, ...] = (),
) -> ASGIApp:
    """The application.

    Args:
        rewards: weights for /get_reward and /v1/components, by component name.
        token: what `Authorization: Bearer` must carry; None lets everybody in.
        hosts: names in the Host header that are answered; empty for any. Keeps pages of other sites, to whose name a
            browser was told our address, from asking a server that wants no token.
    """
    app = FastAPI(title="tokenppo reward server", version=version, docs_url=None, redoc_url=None)
    lane, answered = Lane(scores, limits), Counter()
    app.state.lane = lane

    def error(status: int, reason: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": reason}, status, headers)

    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        return error(refusal.status, refusal.reason, **refusal.headers)

    @app.exception_handler(WireError)
    async def unfit(_: Request, problem: WireError) -> Response:
        return error(problem.status, str(problem))

    async def body_of(request: Request, *types: str) -> tuple[bytes, str]:
        """The whole body and its type, within limits of type, size and time."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in types:
            raise Refusal(415, f"Content-Type: wants {' or '.join(types)}")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise Refusal(415, "Content-Encoding: wants none")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > limits.body_bytes:
            raise Refusal(413, f"the body is larger than {limits.body_bytes} bytes", Connection="close")
        body = bytearray()
        try:
            async with asyncio.timeout(limits.body_s):
                async for part in request.stream():
                    body += part
                    if len(body) > limits.body_bytes:
                        raise Refusal(413, f"the body is larger than {limits.body_bytes} bytes", Connection="close")
        except TimeoutError:
            raise Refusal(408, f"the body did not end within {limits.body_s:g} s", Connection="close") from None
        return bytes(body), kind

    @app.post("/v1/score", response_class=Response, responses=_SCORED, openapi_extra=_body(_REQUEST_SCHEMA, ARROW))
    async def score(request: Request) -> Response:
        """Raw rewards for each token of each sample, by component."""
        body, kind = await body_of(request, JSON, ARROW)
        asked, names = await _beside(len(body), kind, decode_request, body, kind, scores.names, limits)
        answers = await lane.score(asked, names)
        accepts = request.headers.get("accept", "")
        answer_kind = ARROW if ARROW in accepts else JSON if JSON in accepts else kind
        size = 4 * sum(map(len, asked.completion_ids)) * len(names)
        coded = await _beside(size, answer_kind, encode_answer, asked, answers, answer_kind, version)
        return Response(coded, 200, None, answer_kind)

    @app.post("/v1/try", response_class=Response, responses=_ANSWERS, openapi_extra=_body(_TRY_SCHEMA))
    async def try_one(request: Request) -> Response:
        """The reward of each word of one response."""
        body, _ = await body_of(request, JSON)
        tree = strict_json(body, limits.depth)
        texts = _texts(tree, {"prompt", "completion"}, {"columns"})
        columns = tree.get("columns", {})
        if not isinstance(columns, dict):
            raise WireError("columns: wants an object")
        ids, offsets = words(texts["completion"])
        asked = _one(texts["prompt"], texts["completion"], ids, offsets, columns, limits)
        answers = await lane.score(asked, scores.names)
        shown = {
            name: {"fault": str(answer)} if isinstance(answer, RewardFault) else _placed(answer)
            for name, (answer,) in answers.items()
        }
        weights = {name: rewards[name].last_weight for name in scores.names}
        return JSONResponse({"offsets": offsets.tolist(), "rewards": shown, "weights": weights})

    @app.post("/get_reward", response_class=Response, responses=_ANSWERS, openapi_extra=_body(_OPENRLHF_SCHEMA))
    async def get_reward(request: Request) -> Response:
        """One number per query, as OpenRLHF's remote reward models answer."""
        body, _ = await body_of(request, JSON)
        asked = _from_openrlhf(strict_json(body, limits.depth), limits)
        answers = await lane.score(asked, scores.names)
        sums = []
        for i, uid in enumerate(asked.uids):
            parts = []
            for name, placed in answers.items():
                if isinstance(placed[i], RewardFault):
                    raise Refusal(422, f"query {uid}: component {name} could not score it")
                parts.append(rewards[name].last_weight * math.fsum(placed[i][0].tolist()))
            sums.append(math.fsum(parts))
        return JSONResponse({"rewards": sums, "scores": sums, "extra_logs": {}})

    @app.get("/v1/components", responses={200: {"description": "name, weight, what it is"}, 401: _ERROR})
    async def components() -> Any:
        return {
            "components": [
                {"name": name, "weight": rewards[name].last_weight, "fn": rewards[name].fn.rpartition("/")[2]}
                for name in scores.names
            ]
        }

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        return "ok\n"

    @app.get("/readyz", response_class=PlainTextResponse, responses={401: _ERROR, 503: _ERROR})
    async def readyz() -> Response:
        full = lane.waiting > limits.waiting
        return PlainTextResponse("busy\n" if full else "ready\n", 503 if full else 200)

    @app.get("/metrics", response_class=PlainTextResponse, responses={401: _ERROR})
    async def metrics() -> str:
        lines = ["# TYPE tokenppo_reward_requests_total counter"]
        lines += [
            f'tokenppo_reward_requests_total{{path="{path}",status="{status}"}} {n}'
            for (path, status), n in sorted(answered.items())
        ]
        for name, kind, value in (
            ("tokenppo_reward_score_seconds_sum", "counter", f"{lane.seconds:.6f}"),
            ("tokenppo_reward_score_seconds_count", "counter", lane.calls),
            ("tokenppo_reward_tokens_total", "counter", lane.tokens),
            ("tokenppo_reward_waiting", "gauge", lane.waiting),
        ):
            lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
        return "\n".join(lines) + "\n"

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        html = resources.files("reward_server").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(html, headers={"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"})

    return Guard(app, answered, token, hosts)


class Guard:
    """Lets in who has the token and asks us by our name; everybody else gets 401 or 421 before anything is read.

    Counts the answers by path and status.
    """

    def __init__(
        self, app: ASGIApp, answered: Counter[tuple[str, int]], token: str | None, hosts: tuple[str, ...]
    ) -> None:
        self.app, self._answered = app, answered
        self._token, self._hosts = token.encode() if token else None, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Paths that nobody serves are one: a stranger must not make the table grow.
                path = getattr(scope.get("route"), "path", "other")
                self._answered[(path, message["status"])] += 1
            await send(message)

        headers = dict(scope["headers"])
        host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1"))
        if self._hosts and host not in self._hosts:
            return await _say(counted, 421, "Host: this server has another name")
        if self._token is not None and scope["path"] not in OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token):
                return await _say(counted, 401, "Authorization: wants Bearer and the token of this server")
        await self.app(scope, receive, counted)


async def _say(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"error": reason}).encode()
    headers = [
        (b"content-type", JSON.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    start: Message = {"type": "http.response.start", "status": status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})


def _texts(tree: Any, wanted: set[str], allowed: set[str]) -> dict[str, str]:
    if not isinstance(tree, dict) or tree.keys() - wanted - allowed or wanted - tree.keys():
        raise WireError(
            f"wants an object with {', '.join(sorted(wanted))}, and nothing but {sorted(allowed)} beside it"
        )
    if not all(isinstance(tree[name], str) for name in wanted):
        raise WireError(f"{', '.join(sorted(wanted))}: want texts")
    return {name: tree[name] for name in wanted}


def _placed(answer: Placed) -> dict[str, Any]:
    return {"tokens": answer[0].tolist()} if answer[1].all() else {"applies": False}


def _one(
    prompt: str, completion: str, ids: list[int], offsets: np.ndarray, columns: dict[str, Any], limits: Limits
) -> ScoreRequest:
    sample = {
        "uid": "0",
        "prompt": prompt,
        "prompt_ids": words(prompt)[0],
        "completion": completion,
        "completion_ids": ids,
        "offsets": offsets.tolist(),
        "finish_reason": "stop",
        "columns": columns,
    }
    # Through the same checks as everything that comes in.
    return decode_request(json.dumps({"samples": [sample]}).encode(), JSON, [""], limits)[0]


def _from_openrlhf(tree: Any, limits: Limits) -> ScoreRequest:
    """Queries are prompt and response in one text; where the prompts come too, what is behind them is the response."""
    if not isinstance(tree, dict) or tree.keys() - {"query", "prompts", "labels"}:
        raise WireError("wants an object with query, prompts and labels")
    queries = tree.get("query")
    if not isinstance(queries, list) or not queries or not all(isinstance(query, str) for query in queries):
        raise WireError("query: wants a list of texts")
    prompts, labels = tree.get("prompts") or [""] * len(queries), tree.get("labels") or [None] * len(queries)
    for name, values in (("prompts", prompts), ("labels", labels)):
        if not isinstance(values, list) or len(values) != len(queries):
            raise WireError(f"{name}: wants a list of {len(queries)} entries, one for each query")
    samples = []
    for i, (query, prompt, label) in enumerate(zip(queries, prompts, labels, strict=True)):
        if not isinstance(prompt, str):
            raise WireError("prompts: wants a list of texts")
        completion = query.removeprefix(prompt)
        ids, offsets = words(completion)
        samples.append(
            {
                "uid": str(i),
                "prompt": prompt,
                "prompt_ids": words(prompt)[0],
                "completion": completion,
                "completion_ids": ids,
                "offsets": offsets.tolist(),
                "finish_reason": "stop",
                "columns": {"label": label},
            }
        )
    return decode_request(json.dumps({"samples": samples}).encode(), JSON, [""], limits)[0]


# ------------------------------------------------------------------------------------------------------------- OpenAPI


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def _list(items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


_TEXT = {"type": "string"}
_IDS = _list({"type": "integer", "minimum": 0, "maximum": 2**31 - 1})
_MESSAGES = _list(_object(["role", "content"], role=_TEXT, content=_TEXT), minItems=1)
_SAMPLE = _object(
    ["uid", "prompt", "prompt_ids", "completion", "completion_ids", "offsets", "finish_reason", "columns"],
    uid={"type": "string", "minLength": 1, "maxLength": 256},
    prompt={"anyOf": [_TEXT, _MESSAGES]},
    prompt_ids=_IDS,
    completion={"anyOf": [_TEXT, _MESSAGES]},
    completion_ids=_IDS | {"minItems": 1},
    offsets=_list(_list({"type": "integer", "minimum": 0}, minItems=2, maxItems=2), minItems=1),
    finish_reason={"enum": ["stop", "length", "abort"]},
    action_mask=_list({"type": "integer", "minimum": 0, "maximum": 1}, minItems=1),
    columns={"type": "object"},
)
_REQUEST_SCHEMA = _object(["samples"], components=_list(_TEXT), samples=_list(_SAMPLE, minItems=1))
_TRY_SCHEMA = _object(["prompt", "completion"], prompt=_TEXT, completion=_TEXT, columns={"type": "object"})
_OPENRLHF_SCHEMA = _object(["query"], query=_list(_TEXT, minItems=1), prompts=_list(_TEXT), labels=_list({}))
_ERROR: dict[str, Any] = {
    "description": "why not",
    "content": {JSON: {"schema": _object(["error"], error=_TEXT)}},
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "scored", "content": {JSON: {"schema": {"type": "object"}}}},
    **{status: _ERROR for status in (400, 401, 408, 413, 415, 421, 422, 429, 503)},
}
_SCORED = _ANSWERS | {
    200: {
        "description": "raw rewards by sample and component",
        "content": {JSON: {"schema": {"type": "object"}}, ARROW: {"schema": {"type": "string", "format": "binary"}}},
    }
}


def _body(schema: dict[str, Any], *binary: str) -> dict[str, Any]:
    content: dict[str, Any] = {JSON: {"schema": schema}}
    content |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in binary}
    return {"requestBody": {"required": True, "content": content}}
