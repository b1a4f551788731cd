"""A ScoreRequest and its answer as bytes: Arrow IPC for speed, JSON for people; both pass the same checks.

Whatever does not fit is a WireError (of a request) or a RewardFault (of an answer) that names the field, and component
and sample where there are any. Nothing is guessed, repaired or filled in.

Request as JSON; `components` may be left out (all), and `action_mask` (all 1: the policy wrote every token); everything
else is wanted:

    {"components": ["quality"],
     "samples": [{"uid": "5b2f", "prompt": "2+2=", "prompt_ids": [17, 10], "completion": "4.",
                  "completion_ids": [19, 13, 0], "offsets": [[0, 1], [1, 2], [2, 2]], "finish_reason": "stop",
                  "action_mask": [1, 1, 1], "columns": {"answer": "4"}}]}

Answer:

    {"version": "0.1.0",
     "samples": [{"uid": "5b2f", "count": 3, "ids_hash": "9a...", "rewards": {"quality": {"tokens": [1.0, 0.0, 0.0]}}}]}

where a component that does not apply has {"applies": false}, one that failed on the sample {"fault": "why"}. As Arrow
both are one record batch of one row per sample, with a column for each field; prompt, completion and columns are JSON
text in it. `action_mask` is sent where some response has an observation and not else: a server that does not know it
scores what it can, and refuses by name what it would score wrongly. Legend: B samples, T response tokens.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from core.faults import RewardFault
from reward_server.components import PASSED, Placed, ScoreRequest
from reward_server.placing import LARGEST
from reward_server.texts import text_of

ARROW = "application/vnd.apache.arrow.stream"
JSON = "application/json"
FINISH_REASONS = ("stop", "length", "abort")
MAX_ID = 2**31 - 1


@dataclass(frozen=True)
class Limits:
    """What a server takes in one request; more is refused before it is scored."""

    body_bytes: int = 16 * 2**20
    samples: int = 4096
    tokens: int = 1_000_000  # of prompts and completions together
    depth: int = 32  # of JSON
    body_s: float = 10.0  # until the whole body is there
    score_s: float = 120.0  # until it is scored, waiting included
    waiting: int = 64  # requests


class WireError(ValueError):
    """A request that cannot be scored as it is; `status` is the HTTP status that says so."""

    def __init__(self, reason: str, status: int = 422) -> None:
        super().__init__(reason)
        self.status = status


def ids_hash(ids: Any) -> str:
    """16 hex digits of the ids as little-endian int64: which tokens an answer is about."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype="<i8"), digest_size=8).hexdigest()


# ------------------------------------------------------------------------------------------------------------ requests


def encode_request(request: ScoreRequest, components: list[str], content_type: str) -> bytes:
    observed = not all(mask.all() for mask in request.action_masks)
    if content_type == JSON:
        samples = [
            {
                "uid": request.uids[i],
                "prompt": request.prompts[i],
                "prompt_ids": request.prompt_ids[i].tolist(),
                "completion": request.completions[i],
                "completion_ids": request.completion_ids[i].tolist(),
                "offsets": request.offsets[i].tolist(),
                "finish_reason": request.finish_reasons[i],
                "columns": {name: values[i] for name, values in request.columns.items()},
            }
            | ({"action_mask": request.action_masks[i].astype(int).tolist()} if observed else {})
            for i in range(len(request))
        ]
        return json.dumps({"components": components, "samples": samples}).encode()
    rows = range(len(request))
    columns = [json.dumps({name: values[i] for name, values in request.columns.items()}) for i in rows]
    arrays = {
        "uid": pa.array(request.uids, pa.string()),
        "prompt": pa.array([json.dumps(prompt) for prompt in request.prompts], pa.large_string()),
        "prompt_ids": _lists(request.prompt_ids),
        "completion": pa.array([json.dumps(completion) for completion in request.completions], pa.large_string()),
        "completion_ids": _lists(request.completion_ids),
        "starts": _lists([x[:, 0] for x in request.offsets]),
        "stops": _lists([x[:, 1] for x in request.offsets]),
        "finish_reason": pa.array(request.finish_reasons, pa.string()),
        "columns": pa.array(columns, pa.large_string()),
    }
    if observed:
        arrays["action_mask"] = _lists(request.action_masks, dtype=np.int8)
    return _stream(arrays, {"components": json.dumps(components)})


_REQUEST = {
    "uid": pa.string(),
    "prompt": pa.large_string(),
    "prompt_ids": pa.large_list(pa.int32()),
    "completion": pa.large_string(),
    "completion_ids": pa.large_list(pa.int32()),
    "starts": pa.large_list(pa.int32()),
    "stops": pa.large_list(pa.int32()),
    "finish_reason": pa.string(),
    "columns": pa.large_string(),
    "action_mask": pa.large_list(pa.int8()),
}


def decode_request(
    body: bytes, content_type: str, known: list[str], limits: Limits = Limits()
) -> tuple[ScoreRequest, list[str]]:
    """The request and the names of the wanted components, all of `known` where it does not say.

    Raises WireError for anything that is not exactly a request.
    """
    if content_type == ARROW:
        samples, wanted = _samples_from_arrow(body, limits)
    else:
        tree = strict_json(body, limits.depth)
        _keys(tree, "the request", {"samples"}, {"components"})
        samples, wanted = tree["samples"], tree.get("components")
        if not isinstance(samples, list):
            raise WireError(f"samples: wants a list, got {_kind(samples)}")
        if len(samples) > limits.samples:
            raise WireError(f"samples: {len(samples)} of them, at most {limits.samples} in one request")
        samples = [_sample_from_json(sample, i) for i, sample in enumerate(samples)]
    if not samples:
        raise WireError("samples: there is none")
    names = known if wanted is None else wanted
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise WireError("components: wants a list of names")
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise WireError(f"components: {names!r}; wanted are different ones of {known}"[:300])
    seen: set[str] = set()
    tokens = 0
    for sample in samples:
        _check_sample(sample)
        if sample["uid"] in seen:
            raise WireError(f"sample {sample['uid']}: its uid appears twice")
        seen.add(sample["uid"])
        tokens += len(sample["completion_ids"]) + len(sample["prompt_ids"])
    if tokens > limits.tokens:
        raise WireError(f"samples: {tokens} tokens, at most {limits.tokens} in one request")
    _check_tokens(samples)
    names_of_columns = dict.fromkeys(name for sample in samples for name in sample["columns"])
    request = ScoreRequest(
        prompts=[sample["prompt"] for sample in samples],
        completions=[sample["completion"] for sample in samples],
        prompt_ids=[sample["prompt_ids"] for sample in samples],
        completion_ids=[sample["completion_ids"] for sample in samples],
        offsets=[sample["offsets"] for sample in samples],
        finish_reasons=[sample["finish_reason"] for sample in samples],
        uids=[sample["uid"] for sample in samples],
        action_masks=[sample["action_mask"] for sample in samples],
        columns={name: [sample["columns"].get(name) for sample in samples] for name in names_of_columns},
    )
    return request, names


def _sample_from_json(sample: Any, i: int) -> dict[str, Any]:
    fields = {"uid", "prompt", "prompt_ids", "completion", "completion_ids", "offsets", "finish_reason", "columns"}
    _keys(sample, f"samples[{i}]", fields, {"action_mask"})
    here = f"sample {sample['uid'] if isinstance(sample['uid'], str) else i}"
    whole = dict(sample)
    for name in ("prompt_ids", "completion_ids"):
        whole[name] = _integers(sample[name], f"{here}: {name}")
    mask = sample.get("action_mask", [1] * len(whole["completion_ids"]))
    whole["action_mask"] = _integers(mask, f"{here}: action_mask")
    pairs = sample["offsets"]
    if not isinstance(pairs, list) or not set(map(type, pairs)) <= {list} or not set(map(len, pairs)) <= {2}:
        raise WireError(f"{here}: offsets: wants a list of [start, end]")
    flat = _integers(list(chain.from_iterable(pairs)), f"{here}: offsets")
    return whole | {"offsets": flat.reshape(-1, 2)}


def _samples_from_arrow(body: bytes, limits: Limits) -> tuple[list[dict[str, Any]], Any]:
    table, metadata = _read(body, _REQUEST, lambda reason: WireError(reason, 400), limits, optional="action_mask")
    wanted = strict_json(metadata[b"components"], limits.depth) if b"components" in metadata else None
    ids, prompt_ids = _split(table["completion_ids"]), _split(table["prompt_ids"])
    masks = _split(table["action_mask"]) if "action_mask" in table else [np.ones(len(x), dtype=np.int8) for x in ids]
    (starts, ends), (stops, stop_ends) = _flat(table["starts"]), _flat(table["stops"])
    if not np.array_equal(ends, stop_ends):
        i = int((np.diff(ends, prepend=0) != np.diff(stop_ends, prepend=0)).argmax())
        n_starts, n_stops = (np.diff(x, prepend=0)[i] for x in (ends, stop_ends))
        raise WireError(f"sample {table['uid'][i]}: {n_starts} starts and {n_stops} stops")
    offsets = _cut(np.stack([starts, stops], axis=1, dtype=np.int64), ends)
    plain = {name: table[name].to_pylist() for name in ("uid", "prompt", "completion", "finish_reason", "columns")}
    samples = []
    for i, uid in enumerate(plain["uid"]):
        samples.append(
            {
                "uid": uid,
                "prompt": strict_json(plain["prompt"][i].encode(), limits.depth),
                "prompt_ids": prompt_ids[i],
                "completion": strict_json(plain["completion"][i].encode(), limits.depth),
                "completion_ids": ids[i],
                "offsets": offsets[i],
                "action_mask": masks[i],
                "finish_reason": plain["finish_reason"][i],
                "columns": strict_json(plain["columns"][i].encode(), limits.depth),
            }
        )
    return samples, wanted


def _check_sample(sample: dict[str, Any]) -> None:
    uid = sample["uid"]
    if not isinstance(uid, str) or not 1 <= len(uid) <= 256 or not uid.isprintable():
        raise WireError(f"uid {str(uid)[:80]!r}: wants a text of 1 to 256 printable characters")
    here = f"sample {uid}"
    for name in ("prompt", "completion"):
        _check_text(sample[name], f"{here}: {name}")
    if sample["finish_reason"] not in FINISH_REASONS:
        raise WireError(f"{here}: finish_reason {str(sample['finish_reason'])[:80]!r}: one of {FINISH_REASONS}")
    if not isinstance(sample["columns"], dict):
        raise WireError(f"{here}: columns: wants an object, got {_kind(sample['columns'])}")
    _refuse_infinite(sample["columns"], f"{here}: columns")
    taken = {*PASSED, "prompt"} & set(sample["columns"])
    if taken:
        raise WireError(f"{here}: columns: {sorted(taken)[0]} is what every component gets already")
    ids, offsets = sample["completion_ids"], sample["offsets"]
    if not len(ids):
        raise WireError(f"{here}: completion_ids: there is none, so there is nothing to reward")
    if len(offsets) != len(ids):
        raise WireError(f"{here}: {len(offsets)} offsets for {len(ids)} completion_ids")
    mask = sample["action_mask"]
    if len(mask) != len(ids) or not np.isin(mask, (0, 1)).all() or not mask.any():
        raise WireError(f"{here}: action_mask: wants {len(ids)} times 0 or 1, one for each token, and a 1 among them")


def _check_tokens(samples: list[dict[str, Any]]) -> None:
    """What is said of every token, of all samples at once: a few operations for each sample would be most of the time
    that a request takes."""
    for name in ("prompt_ids", "completion_ids"):
        ids = np.concatenate([sample[name] for sample in samples])
        wrong = np.flatnonzero((ids < 0) | (ids > MAX_ID))
        if len(wrong):
            uid = _owner(samples, name, wrong[0])["uid"]
            raise WireError(f"sample {uid}: {name}: ids are from 0 to {MAX_ID}")
    offsets = np.concatenate([sample["offsets"] for sample in samples])
    starts, stops = offsets[:, 0], offsets[:, 1]
    first = np.cumsum([0, *(len(sample["offsets"]) for sample in samples[:-1])])
    lengths = np.array([len(text_of(sample["completion"])) for sample in samples])
    wrong = (starts < 0) | (stops < starts)
    descends = starts[1:] < starts[:-1]
    descends[first[1:] - 1] = False  # from the last token of a sample to the first of the next
    wrong[1:] |= descends
    of_sample = np.logical_or.reduceat(wrong, first) | (np.maximum.reduceat(stops, first) != lengths)
    if of_sample.any():
        i = int(of_sample.argmax())
        raise WireError(
            f"sample {samples[i]['uid']}: offsets: wants 0 <= start <= end, starts in ascending order, and the largest"
            f" end to be the {lengths[i]} characters of the completion"
        )


def _owner(samples: list[dict[str, Any]], name: str, at: int) -> dict[str, Any]:
    """The sample that token `at` of all of them, one behind the other, belongs to."""
    ends = np.cumsum([len(sample[name]) for sample in samples])
    return samples[int(np.searchsorted(ends, at, side="right"))]


def _check_text(value: Any, here: str) -> None:
    is_messages = (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str) for m in value
        )
    )
    if not isinstance(value, str) and not is_messages:
        raise WireError(f"{here}: wants text, or a list of messages with role and content")


# ------------------------------------------------------------------------------------------------------------- answers


def encode_answer(
    request: ScoreRequest, scores: dict[str, list[Placed | RewardFault]], content_type: str, version: str
) -> bytes:
    hashes = [ids_hash(ids) for ids in request.completion_ids]
    counts = [len(ids) for ids in request.completion_ids]
    if content_type == JSON:
        samples = []
        for i, uid in enumerate(request.uids):
            rewards: dict[str, Any] = {}
            for name, answers in scores.items():
                answer = answers[i]
                if isinstance(answer, RewardFault):
                    rewards[name] = {"fault": str(answer)}
                else:
                    rewards[name] = {"tokens": answer[0].tolist()} if answer[1].all() else {"applies": False}
            samples.append({"uid": uid, "count": counts[i], "ids_hash": hashes[i], "rewards": rewards})
        return json.dumps({"version": version, "samples": samples}, allow_nan=False).encode()
    arrays = {
        "uid": pa.array(request.uids, pa.string()),
        "count": pa.array(counts, pa.int64()),
        "ids_hash": pa.array(hashes, pa.string()),
    }
    for name, answers in scores.items():
        faults = [str(answer) if isinstance(answer, RewardFault) else None for answer in answers]
        fits = [not isinstance(answer, RewardFault) and bool(answer[1].all()) for answer in answers]
        values = [answer[0] if ok else np.zeros(0) for answer, ok in zip(answers, fits, strict=True)]
        arrays |= {
            f"tokens:{name}": _narrowed(_lists(values, dtype=np.float64)),
            f"applies:{name}": pa.array(fits, pa.bool_()),
            f"fault:{name}": pa.array(faults, pa.large_string()),
        }
    return _stream(arrays, {"version": version})


def decode_answer(
    body: bytes, content_type: str, request: ScoreRequest, components: list[str]
) -> dict[str, list[np.ndarray | None | RewardFault]]:
    """By component the B entries for `request`: [T] float64, None, or the RewardFault that a sample had there.

    Raises RewardFault for an answer that is not exactly one to this request.
    """

    def refuse(reason: str) -> NoReturn:
        raise RewardFault(f"the answer of its server: {reason}")

    if content_type == ARROW:
        uids, counts, hashes, entries = _answer_from_arrow(body, request, components, refuse)
    elif content_type == JSON:
        uids, counts, hashes, entries = _answer_from_json(body, components, refuse)
    else:
        refuse(f"is {content_type[:80]!r}, wanted is {JSON} or {ARROW}")
    if uids != request.uids:
        wrong = next((uid for uid, want in zip(uids, request.uids, strict=False) if uid != want), None)
        said = f"has uid {str(wrong)[:80]!r} where another was asked for" if wrong is not None else "has"
        refuse(f"{said} ({len(uids)} samples, asked were {len(request)}: {request.uids[0]}, ...)")
    for i, uid in enumerate(request.uids):
        here, ids = f"sample {uid}: ", request.completion_ids[i]
        if counts[i] != len(ids):
            refuse(f"{here}counts {counts[i]!r} tokens, it has {len(ids)}")
        if hashes[i] != ids_hash(ids):
            refuse(f"{here}is about other token ids (ids_hash {str(hashes[i])[:32]!r})")
        for name in components:
            entry = entries[name][i]
            if isinstance(entry, np.ndarray) and len(entry) != len(ids):
                refuse(f"{here}{name} has {len(entry)} rewards for {len(ids)} tokens")
    for name in components:
        rows = [(uid, x) for uid, x in zip(request.uids, entries[name], strict=True) if isinstance(x, np.ndarray)]
        if (np.abs(np.concatenate([np.zeros(0), *(row for _, row in rows)])) <= LARGEST).all():
            continue
        for uid, row in rows:
            for at in np.flatnonzero(~(np.abs(row) <= LARGEST)):
                refuse(f"sample {uid}: {name} has {float(row[at])!r} for token {at}; at most {LARGEST:g} fits")
    return entries


def _answer_from_json(body: bytes, components: list[str], refuse: Any) -> tuple[list, list, list, dict[str, list]]:
    uids, counts, hashes = [], [], []
    entries: dict[str, list[Any]] = {name: [] for name in components}
    try:
        tree = strict_json(body, 32)
        _keys(tree, "it", {"samples", "version"}, set())
        if not isinstance(tree["samples"], list):
            refuse(f"samples: wants a list, got {_kind(tree['samples'])}")
        for i, sample in enumerate(tree["samples"]):
            _keys(sample, f"samples[{i}]", {"uid", "count", "ids_hash", "rewards"}, set())
            uid = sample["uid"]
            here = f"sample {str(uid)[:80]}"
            _keys(sample["rewards"], f"{here}: rewards", set(components), set())
            for name in components:
                entries[name].append(_entry_from_json(sample["rewards"][name], here))
            uids.append(uid)
            counts.append(None if isinstance(sample["count"], bool) else sample["count"])
            hashes.append(sample["ids_hash"])
    except WireError as error:
        refuse(str(error))
    return uids, counts, hashes, entries


def _entry_from_json(reward: Any, here: str) -> Any:
    _keys(reward, f"{here}: reward", set(), {"tokens", "applies", "fault"})
    if len(reward) != 1:
        raise WireError(f"{here}: reward: wants one of tokens, applies, fault, got {sorted(reward)}")
    if "fault" in reward:
        if not isinstance(reward["fault"], str):
            raise WireError(f"{here}: fault: wants text, got {_kind(reward['fault'])}")
        return RewardFault(f"on its server: {reward['fault'][:500]}")
    if "applies" in reward:
        if reward["applies"] is not False:
            raise WireError(f"{here}: applies: false is all it can say, got {str(reward['applies'])[:80]!r}")
        return None
    tokens = reward["tokens"]
    numbers = isinstance(tokens, list) and set(map(type, tokens)) <= {int, float}
    if not numbers:
        wrong = [x for x in tokens if type(x) not in (int, float)] if isinstance(tokens, list) else [tokens]
        raise WireError(f"{here}: tokens: wants a list of numbers, got {str(wrong[0])[:80]!r} ({_kind(wrong[0])})")
    try:
        return np.array(tokens, dtype=np.float64)
    except OverflowError:
        raise WireError(f"{here}: tokens: a number is larger than a float64 holds") from None


def _answer_from_arrow(
    body: bytes, request: ScoreRequest, components: list[str], refuse: Any
) -> tuple[list, list, list, dict[str, list]]:
    columns: dict[str, pa.DataType | tuple[pa.DataType, ...]]
    columns = {"uid": pa.string(), "count": pa.int64(), "ids_hash": pa.string()}
    for name in components:
        columns |= {
            f"tokens:{name}": (pa.large_list(pa.float64()), pa.large_list(pa.float32())),
            f"applies:{name}": pa.bool_(),
            f"fault:{name}": pa.large_string(),
        }
    limits, nullable = Limits(samples=len(request)), tuple(f"fault:{name}" for name in components)
    try:
        table, _ = _read(body, columns, WireError, limits, nullable=nullable)
    except WireError as error:
        refuse(str(error))
    entries: dict[str, list[Any]] = {}
    for name in components:
        rows = zip(
            _split(table[f"tokens:{name}"], dtype=np.float64),
            table[f"applies:{name}"].to_pylist(),
            table[f"fault:{name}"].to_pylist(),
            strict=True,
        )
        entries[name] = [
            RewardFault(f"on its server: {fault[:500]}") if fault is not None else tokens if fits else None
            for tokens, fits, fault in rows
        ]
    return table["uid"].to_pylist(), table["count"].to_pylist(), table["ids_hash"].to_pylist(), entries


# ---------------------------------------------------------------------------------------------------------------- JSON


def strict_json(body: bytes, depth: int) -> Any:
    """JSON as RFC 8259 has it, without what Python's reader also takes: NaN, Infinity, keys given twice, half a
    surrogate pair, nesting beyond `depth`. A number may come out as infinite: 1e999. Raises WireError (400)."""

    def refuse_constant(name: str) -> NoReturn:
        raise WireError(f"JSON: {name} is no number", 400)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(items)
        if len(tree) < len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise WireError(f"JSON: the key {twice[:80]!r} appears twice", 400)
        return tree

    try:
        text = body.decode("utf-8")
        deep = text[:1] != '"' and text.count("[") + text.count("{") > depth  # it might be
        if deep and _deepest(_STRINGS.sub("", text)) > depth:
            raise WireError(f"JSON: nested deeper than {depth}", 400)
        tree = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=pairs)
        if "\\u" in text:
            json.dumps(tree, ensure_ascii=False).encode("utf-8")
    except WireError:
        raise
    except UnicodeError as error:
        raise WireError(f"JSON: not valid UTF-8 text ({error.reason})", 400) from None
    except ValueError as error:
        raise WireError(f"JSON: {str(error)[:200]}", 400) from None
    return tree


_STRINGS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def _deepest(bare: str) -> int:
    """How deep the brackets of a JSON text without its strings go."""
    signs = np.frombuffer(bare.encode("ascii", "replace"), dtype=np.uint8)
    opened, closed = (signs == 0x5B) | (signs == 0x7B), (signs == 0x5D) | (signs == 0x7D)
    steps = (opened.astype(np.int32) - closed.astype(np.int32))[opened | closed]
    return int(np.cumsum(steps).max(initial=0))


def _refuse_infinite(tree: Any, here: str) -> None:
    """1e999 is valid JSON and no number that Python can hold."""
    waiting = [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise WireError(f"{here}: a number is larger than a float64 holds")


def _keys(tree: Any, here: str, wanted: set[str], allowed: set[str]) -> None:
    if not isinstance(tree, dict):
        raise WireError(f"{here}: wants an object, got {_kind(tree)}")
    if missing := sorted(wanted - tree.keys()):
        raise WireError(f"{here}: `{missing[0]}` is missing")
    if unknown := sorted(tree.keys() - wanted - allowed):
        raise WireError(f"{here}: there is no field {unknown[0][:80]!r}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _integers(values: Any, here: str) -> np.ndarray:
    if not isinstance(values, list):
        raise WireError(f"{here}: wants a list, got {_kind(values)}")
    if not set(map(type, values)) <= {int}:  # bool is a type of its own here
        raise WireError(f"{here}: wants whole numbers")
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        raise WireError(f"{here}: a number is too large") from None


# --------------------------------------------------------------------------------------------------------------- Arrow


def _lists(parts: list[Any], dtype: Any = np.int32) -> pa.Array:
    """B lists as one Arrow array; the numbers are handed over as one buffer."""
    bounds = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=bounds[1:])
    flat = np.concatenate([*parts, np.zeros(0, dtype)], dtype=dtype, casting="unsafe")
    return pa.LargeListArray.from_arrays(pa.array(bounds), pa.array(flat))


def _narrowed(lists: pa.LargeListArray) -> pa.LargeListArray:
    """float64 lists as float32 where every number survives it, as those of rules and of most models do."""
    wide = lists.values.to_numpy()
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    if not np.array_equal(narrow, wide):
        return lists
    return pa.LargeListArray.from_arrays(lists.offsets, pa.array(narrow))


def _stream(arrays: dict[str, pa.Array], metadata: dict[str, str]) -> bytes:
    schema = pa.schema([pa.field(name, x.type) for name, x in arrays.items()], metadata=metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(list(arrays.values()), schema=schema))
    return sink.getvalue().to_pybytes()


def _read(
    body: bytes,
    columns: dict[str, Any],
    refuse: Any,
    limits: Limits,
    nullable: tuple[str, ...] = (),
    optional: str | None = None,
) -> tuple[dict[str, pa.Array], dict[bytes, bytes]]:
    """The columns of the one record batch in a stream, checked down to their buffers; one may be left out.

    Raises `refuse`."""
    try:
        # Compressed buffers would be unpacked before anybody could count their bytes.
        with pa.ipc.open_stream(pa.BufferReader(body)) as reader:
            schema = reader.schema
            names = set(schema.names)
            columns = {name: kind for name, kind in columns.items() if name != optional or name in names}
            if len(schema.names) != len(names) or names != set(columns):
                off = sorted(names ^ set(columns))
                raise refuse(f"Arrow: the columns are not those wanted ({', '.join(off)[:200]})")
            for name, kind in columns.items():
                kinds = kind if isinstance(kind, tuple) else (kind,)
                if schema.field(name).type not in kinds:
                    raise refuse(f"Arrow: column {name} is {schema.field(name).type}, wanted is {kinds[0]}")
            batch = reader.read_next_batch()
            if batch.num_rows > limits.samples:
                raise refuse(f"samples: {batch.num_rows} of them, at most {limits.samples} in one request")
            if batch.get_total_buffer_size() > max(limits.body_bytes, 4 * len(body) + 4096):
                raise refuse("Arrow: it unpacks to more than it may")
            batch.validate(full=True)
            if next(iter(reader), None) is not None:
                raise refuse("Arrow: wants one record batch, got more")
    except (pa.ArrowException, OSError, ValueError, StopIteration) as error:
        if isinstance(error, WireError):
            raise
        raise refuse(f"Arrow: {' '.join(str(error).split())[:200] or 'it ends too early'}") from None
    for name in columns:
        if name not in nullable and batch.column(name).null_count:
            raise refuse(f"Arrow: column {name} has nulls")
        values = getattr(batch.column(name), "values", None)
        if values is not None and values.null_count:
            raise refuse(f"Arrow: column {name} has nulls in its lists")
    return {name: batch.column(name) for name in columns}, schema.metadata or {}


def _split(lists: pa.LargeListArray, dtype: Any = None) -> list[np.ndarray]:
    """The B lists as views of one buffer."""
    flat, ends = _flat(lists)
    return _cut(flat if dtype is None else flat.astype(dtype, copy=False), ends)


def _flat(lists: pa.LargeListArray) -> tuple[np.ndarray, np.ndarray]:
    """B lists one behind the other, and where each ends, [B]. The offsets may begin anywhere in a longer buffer."""
    bounds = lists.offsets.to_numpy() if len(lists) else np.zeros(1, dtype=np.int64)
    return lists.values.to_numpy(zero_copy_only=True)[bounds[0] : bounds[-1]], bounds[1:] - bounds[0]


def _cut(flat: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    return [flat[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
