"""The wire format: what goes in comes out bit for bit; what is not exactly a request or answer is refused by name."""

import gzip
import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import documented
from core.faults import RewardFault
from reward_server.components import Component, ScoreRequest, score_components
from reward_server.wire import (
    ARROW,
    JSON,
    Limits,
    WireError,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)

ROOT = Path(__file__).parent.parent
BOTH = pytest.mark.parametrize("kind", [JSON, ARROW])
MESSAGES = [{"role": "user", "content": "2+2="}]


def request(**changes) -> ScoreRequest:
    fields = {
        "prompts": ["2+2=", MESSAGES],
        "completions": ["4.", [{"role": "assistant", "content": "n\u00e9 \U0001f600"}]],
        "prompt_ids": [[1, 2], []],
        "completion_ids": [[19, 13, 0], [5, 6, 6]],
        "offsets": [np.array([[0, 1], [1, 2], [2, 2]]), np.array([[0, 2], [2, 4], [2, 4]])],
        "finish_reasons": ["stop", "length"],
        "uids": ["u0", "u1"],
        "columns": {"answer": ["4", None], "n": [1.5, {"deep": [True, "\u2028"]}]},
    }
    return ScoreRequest(**(fields | changes))


def same(a: ScoreRequest, b: ScoreRequest) -> None:
    for name in ("prompts", "completions", "finish_reasons", "uids", "columns"):
        assert getattr(a, name) == getattr(b, name), name
    for name in ("prompt_ids", "completion_ids", "offsets"):
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            assert x.dtype == y.dtype == np.int64 and x.tolist() == y.tolist()


OBSERVED = [np.array([1, 0, 1]), np.array([1, 1, 1])]  # the second token of u0 is an environment's


@BOTH
def test_whose_the_tokens_are_comes_back_and_is_not_sent_where_all_are_the_policys(kind):
    """A server that knows no such field scores single turns, and refuses the others by the name of the field."""
    asked = request(action_masks=OBSERVED)
    body = encode_request(asked, ["a"], kind)
    got, _ = decode_request(body, kind, ["a"])
    same(got, asked)
    assert [m.tolist() for m in got.action_masks] == [[True, False, True], [True] * 3]
    assert b"action_mask" in body and b"action_mask" not in encode_request(request(), ["a"], kind)
    plain, _ = decode_request(encode_request(request(), ["a"], kind), kind, ["a"])
    assert all(m.all() and m.dtype == bool for m in plain.action_masks)


@BOTH
@pytest.mark.parametrize("mask", [[1, 0], [1, 2, 1], [0, 0, 0], [1, -1, 1], []])
def test_a_mask_that_is_none_is_refused_with_the_uid(kind, mask):
    asked = request()
    asked.action_masks[0] = np.array(mask, dtype=np.int64)
    asked.action_masks[1] = OBSERVED[0]
    body = encode_request(asked, ["a"], kind)
    if kind == JSON:
        tree = json.loads(body)
        tree["samples"][0]["action_mask"] = mask
        body = json.dumps(tree).encode()
    with pytest.raises(WireError, match="sample u0: action_mask: wants 3 times 0 or 1"):
        decode_request(body, kind, ["a"])


@pytest.mark.parametrize("mask", [None, "101", [True, False, True], [1.0, 0.0, 1.0]])
def test_a_mask_of_other_things_is_refused(mask):
    tree = json.loads(encode_request(request(action_masks=OBSERVED), ["a"], JSON))
    tree["samples"][0]["action_mask"] = mask
    with pytest.raises(WireError, match="sample u0: action_mask: wants"):
        decode_request(json.dumps(tree).encode(), JSON, ["a"])


@BOTH
def test_a_request_comes_back_as_it_was(kind):
    got, names = decode_request(encode_request(request(), ["b", "a"], kind), kind, ["a", "b", "c"])
    same(got, request())
    assert names == ["b", "a"]


def test_a_json_request_may_leave_the_components_out():
    tree = json.loads(encode_request(request(), ["a"], JSON))
    del tree["components"]
    assert decode_request(json.dumps(tree).encode(), JSON, ["a", "b"])[1] == ["a", "b"]


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=5),
    rewards=st.data(),
)
def test_any_text_and_any_float_survive(texts, rewards):
    """Rewards bit for bit, minus zero included, for samples that apply, do not apply, and failed."""
    n = len(texts)
    ids = [[*range(len(text)), 7] for text in texts]
    offsets = [np.array([*((i, i + 1) for i in range(len(text))), (len(text),) * 2], dtype=np.int64) for text in texts]
    asked = ScoreRequest(
        prompts=texts,
        completions=texts,
        prompt_ids=[[1]] * n,
        completion_ids=ids,
        offsets=offsets,
        finish_reasons=["stop"] * n,
        uids=[f"u{i}" for i in range(n)],
        columns={"text": texts},
    )
    answers = []
    for row in ids:
        values = rewards.draw(st.lists(st.floats(-1e9, 1e9), min_size=len(row), max_size=len(row)))
        placed = (np.array(values), np.ones(len(row), dtype=bool))
        fits_not = (np.zeros(len(row)), np.zeros(len(row), dtype=bool))
        answers.append(rewards.draw(st.sampled_from([placed, placed, fits_not, RewardFault("why")])))
    for kind in (JSON, ARROW):
        same(decode_request(encode_request(asked, ["c"], kind), kind, ["c"])[0], asked)
        got = decode_answer(encode_answer(asked, {"c": answers}, kind, "1"), kind, asked, ["c"])["c"]
        for want, entry in zip(answers, got, strict=True):
            if isinstance(want, RewardFault):
                assert isinstance(entry, RewardFault) and str(entry) == "on its server: why"
            elif want[1].all():
                assert entry.tobytes() == want[0].tobytes()
            else:
                assert entry is None


def test_a_component_that_applies_to_no_token_is_none_and_one_of_a_single_token_is_not():
    asked = request()
    answers = [(np.array([0.0, 0.0, 1.0]), np.ones(3, dtype=bool)), (np.zeros(3), np.zeros(3, dtype=bool))]
    for kind in (JSON, ARROW):
        first, second = decode_answer(encode_answer(asked, {"c": answers}, kind, "1"), kind, asked, ["c"])["c"]
        assert first.tolist() == [0, 0, 1] and second is None


# ------------------------------------------------------------------------------------------------- garbage in a request


def sample(**changes):
    tree = json.loads(encode_request(request(), ["a"], JSON))
    tree["samples"][0] |= changes
    return tree


def dumps(tree) -> bytes:
    return json.dumps(tree).encode()


REQUESTS = {
    "not JSON": (b"<html>", "JSON:"),
    "cut off": (dumps(sample())[:-7], "JSON:"),
    "empty": (b"", "JSON:"),
    "no UTF-8": (b'{"samples": "\xff"}', "not valid UTF-8"),
    "half a surrogate pair": (dumps(sample()).replace(b"2+2=", b"\\ud800", 1), "not valid UTF-8"),
    "NaN": (dumps(sample()).replace(b"1.5", b"NaN"), "NaN is no number"),
    "minus infinity": (dumps(sample()).replace(b"1.5", b"-Infinity"), "-Infinity is no number"),
    "1e999": (dumps(sample()).replace(b"1.5", b"1e999"), "larger than a float64"),
    "a number of 5,000 digits": (dumps(sample()).replace(b"1.5", b"1" * 5000), "JSON:"),
    "a key twice": (dumps(sample()).replace(b'"uid": "u0"', b'"uid": "u0", "uid": "u9"'), "`uid`|'uid' appears twice"),
    "nested too deep": (dumps(sample(columns={"x": json.loads("[" * 40 + "]" * 40)})), "nested deeper than 32"),
    "nested beyond all stacks": (b"[" * 200_000, "nested deeper than 32"),
    "nested behind a string that seems to end": (b'["\\\\", "' + b'\\"", ' + b"[" * 100_000, "nested deeper|JSON:"),
    "a list": (b"[]", "wants an object, got a list"),
    "no samples": (dumps({"samples": []}), "there is none"),
    "samples no list": (dumps({"samples": {}}), "samples: wants a list"),
    "an unknown field": (dumps(sample(extra=1)), "there is no field 'extra'"),
    "an unknown component": (dumps(sample() | {"components": ["z"]}), "components: \\['z'\\]"),
    "a component twice": (dumps(sample() | {"components": ["a", "a"]}), "components:"),
    "uid a number": (dumps(sample(uid=7)), "uid '7'"),
    "uid with an escape": (dumps(sample(uid="\x1b[2J")), "printable"),
    "uid of another": (dumps(sample(uid="u1")), "sample u1: its uid appears twice"),
    "prompt a number": (dumps(sample(prompt=3)), "sample u0: prompt: wants text"),
    "a message without content": (dumps(sample(completion=[{"role": "x"}])), "sample u0: completion"),
    "ids no list": (dumps(sample(completion_ids="abc")), "sample u0: completion_ids: wants a list"),
    "an id that is true": (dumps(sample(completion_ids=[1, True, 2])), "sample u0: completion_ids: wants whole"),
    "an id of 1.0": (dumps(sample(completion_ids=[1, 1.0, 2])), "wants whole numbers"),
    "an id below 0": (dumps(sample(completion_ids=[1, -1, 2])), "ids are from 0"),
    "an id of 2**70": (dumps(sample(completion_ids=[1, 2**70, 2])), "too large"),
    "no tokens": (dumps(sample(completion_ids=[], offsets=[])), "nothing to reward"),
    "offsets of another length": (dumps(sample(offsets=[[0, 2]])), "1 offsets for 3"),
    "offsets in threes": (dumps(sample(offsets=[[0, 1, 2]] * 3)), "wants a list of"),
    "offsets beyond the text": (dumps(sample(offsets=[[0, 1], [1, 2], [2, 9]])), "2 characters"),
    "offsets that fall": (dumps(sample(offsets=[[1, 2], [0, 1], [2, 2]])), "ascending"),
    "offsets below 0": (dumps(sample(offsets=[[-1, 1], [1, 2], [2, 2]])), "0 <= start"),
    "another finish_reason": (dumps(sample(finish_reason="done")), "finish_reason 'done'"),
    "columns no object": (dumps(sample(columns=[])), "columns: wants an object"),
    "a column that components get already": (dumps(sample(columns={"completions": 1})), "completions is what"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_garbage_in_a_request_is_refused_by_name(name):
    body, says = REQUESTS[name]
    with pytest.raises(WireError, match=says) as error:
        decode_request(body, JSON, ["a", "b"])
    assert error.value.status in (400, 422) and "\n" not in str(error.value)


def test_limits_of_a_request():
    body = encode_request(request(), ["a"], JSON)
    for limits, says in ((Limits(samples=1), "at most 1"), (Limits(tokens=7), "8 tokens, at most 7")):
        for kind in (JSON, ARROW):
            with pytest.raises(WireError, match=says):
                decode_request(encode_request(request(), ["a"], kind), kind, ["a"], limits)
    assert decode_request(body, JSON, ["a"], Limits(samples=2, tokens=8))


def arrow(**changes) -> bytes:
    """An Arrow request with other columns: a value of None leaves the column out."""
    with pa.ipc.open_stream(encode_request(request(), ["a"], ARROW)) as reader:
        batch, metadata = reader.read_next_batch(), reader.schema.metadata
    columns = {name: batch.column(name) for name in batch.schema.names} | changes
    columns = {name: x for name, x in columns.items() if x is not None}
    out = pa.BufferOutputStream()
    whole = pa.record_batch(list(columns.values()), names=list(columns)).replace_schema_metadata(metadata)
    with pa.ipc.new_stream(out, whole.schema) as writer:
        writer.write_batch(whole)
    return out.getvalue().to_pybytes()


def compressed() -> bytes:
    zeros = pa.array([[0] * 3_000_000, [0]], pa.large_list(pa.int32()))
    with pa.ipc.open_stream(arrow(prompt_ids=zeros)) as reader:
        batch = reader.read_next_batch()
    out = pa.BufferOutputStream()
    with pa.ipc.new_stream(out, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    assert out.getvalue().size < 100_000  # 24 MB of zeros
    return out.getvalue().to_pybytes()


def bad_offsets() -> bytes:
    bounds = np.array([0, 3, 6], dtype=np.int64).tobytes()
    body = arrow()
    assert bounds in body
    return body.replace(bounds, np.array([0, 3, 10**9]).tobytes())


ARROW_REQUESTS = {
    "cut off": (lambda: arrow()[:-40], "Arrow:|buffer"),
    "nothing": (lambda: b"", "Arrow"),
    "noise": (lambda: bytes(range(256)) * 8, "Arrow"),
    "a column less": (lambda: arrow(uid=None), "columns are not those wanted"),
    "a column more": (lambda: arrow(more=pa.array([1, 2])), "columns are not those wanted"),
    "another type": (lambda: arrow(completion_ids=pa.array([[1.0] * 3] * 2)), "wanted is large_list"),
    "a null": (lambda: arrow(uid=pa.array(["u0", None])), "column uid has nulls"),
    "a null in a list": (
        lambda: arrow(completion_ids=pa.array([[1, None, 2], [1, 2, 3]], pa.large_list(pa.int32()))),
        "nulls in its lists",
    ),
    "lists that end beyond their numbers": (bad_offsets, "Arrow"),
    "starts without stops": (
        lambda: arrow(stops=pa.array([[1, 2], [2, 4, 4]], pa.large_list(pa.int32()))),
        "3 starts and 2 stops",
    ),
    "a bomb": (compressed, "unpacks to more|at most"),
    "columns that are no JSON": (lambda: arrow(columns=pa.array(["{", "{}"], pa.large_string())), "JSON"),
}


@pytest.mark.parametrize("name", ARROW_REQUESTS)
def test_garbage_in_arrow_is_refused_by_name(name):
    make, says = ARROW_REQUESTS[name]
    with pytest.raises(WireError, match=says):
        decode_request(make(), ARROW, ["a"], Limits(body_bytes=1_000_000))


@BOTH
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"completion_ids": [[19, 13, 0], [5, -6, 6]]}, "sample u1: completion_ids: ids are from 0"),
        ({"prompt_ids": [[], [-1]]}, "sample u1: prompt_ids: ids are from 0"),
        ({"offsets": [[[0, 1], [1, 2], [2, 2]], [[2, 4], [0, 2], [2, 4]]]}, "sample u1: offsets: .* 4 characters"),
        ({"offsets": [[[0, 1], [1, 2], [2, 2]], [[0, 3], [2, 1], [2, 4]]]}, "sample u1: offsets"),
        ({"offsets": [[[0, 1], [1, 2], [2, 2]], [[0, 1], [1, 2], [2, 2]]]}, "sample u1: offsets"),
        ({"offsets": [[[0, 1], [1, 1], [1, 1]], [[0, 2], [2, 4], [2, 4]]]}, "sample u0: offsets: .* 2 characters"),
    ],
)
def test_a_fault_of_a_token_is_that_of_its_sample(kind, changes, says):
    """Tokens of all samples are looked at together; that the second begins below the first's end is no fault."""
    arrays = {name: [np.array(x, dtype=np.int64) for x in of] for name, of in changes.items()}
    with pytest.raises(WireError, match=says):
        decode_request(encode_request(request(**arrays), ["a"], kind), kind, ["a"])


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_offsets_are_judged_as_one_by_one(data):
    """Against the rule written out for one sample after another."""
    pair = st.tuples(st.integers(-1, 4), st.integers(-1, 4))
    rows = data.draw(st.lists(st.lists(pair, min_size=1, max_size=4), min_size=1, max_size=4))
    texts = ["x" * max(0, max(e for _, e in row) + data.draw(st.sampled_from([0, 0, 0, 1]))) for row in rows]

    def fine(row: list, text: str) -> bool:
        rises = all(a[0] <= b[0] for a, b in zip(row, row[1:], strict=False))
        return rises and all(0 <= s <= e for s, e in row) and max(e for _, e in row) == len(text)

    n = len(rows)
    batch = ScoreRequest(
        prompts=["p"] * n,
        completions=texts,
        prompt_ids=[[1]] * n,
        completion_ids=[[1] * len(row) for row in rows],
        offsets=[np.array(row) for row in rows],
        finish_reasons=["stop"] * n,
        uids=[f"u{i}" for i in range(n)],
        columns={},
    )
    wrong = [f"u{i}" for i, (row, text) in enumerate(zip(rows, texts, strict=True)) if not fine(row, text)]
    try:
        decode_request(encode_request(batch, ["a"], ARROW), ARROW, ["a"])
    except WireError as error:
        assert wrong and str(error).startswith(f"sample {wrong[0]}: offsets")
    else:
        assert not wrong


def test_lists_may_begin_within_their_buffer():
    def later(rows: list) -> pa.Array:
        flat = pa.array([7, *(x for row in rows for x in row), 7], pa.int32())
        return pa.LargeListArray.from_arrays(pa.array(np.cumsum([1, *map(len, rows)])), flat)

    moved = arrow(starts=later([[0, 1, 2], [0, 2, 2]]), completion_ids=later([[19, 13, 0], [5, 6, 6]]))
    same(decode_request(moved, ARROW, ["a"])[0], request())


# ------------------------------------------------------------------------------------------------- garbage in an answer

FINE = [(np.array([0.5, -1.0, 2.0]), np.ones(3, dtype=bool)), (np.array([0.0, 0.0, 1.0]), np.ones(3, dtype=bool))]


def answer(**changes) -> bytes:
    tree = json.loads(encode_answer(request(), {"quality": FINE}, JSON, "1"))
    tree["samples"][1] |= changes
    return dumps(tree)


def rewards(tokens) -> bytes:
    return answer(rewards={"quality": {"tokens": tokens}})


def written(tokens: bytes) -> bytes:
    return answer().replace(b"[0.0, 0.0, 1.0]", tokens)


ANSWERS = {
    "NaN": (written(b"[0.0, NaN, 1.0]"), JSON, "NaN is no number"),
    "Infinity": (written(b"[0.0, Infinity, 1.0]"), JSON, "Infinity is no number"),
    "1e30": (rewards([0, 1e30, 0]), JSON, "sample u1: quality has 1e.30 for token 1"),
    "1e999": (written(b"[0.0, 1e999, 1.0]"), JSON, "sample u1: quality has inf"),
    "an int of 400 digits": (written(b"[0.0, 1" + b"0" * 400 + b", 1.0]"), JSON, "sample u1: tokens"),
    "too few": (rewards([0.0, 1.0]), JSON, "sample u1: quality has 2 rewards for 3 tokens"),
    "too many": (rewards([0.0] * 4), JSON, "sample u1: quality has 4 rewards for 3 tokens"),
    "none": (rewards([]), JSON, "sample u1: quality has 0 rewards for 3 tokens"),
    "a text": (rewards("good"), JSON, "sample u1: tokens: wants a list of numbers, got 'good'"),
    "a text among numbers": (rewards([0.0, "1.0", 0.0]), JSON, "sample u1: tokens: .*'1.0'"),
    "true": (rewards([0.0, True, 0.0]), JSON, "sample u1: tokens: .*'True'"),
    "null": (rewards([0.0, None, 0.0]), JSON, "sample u1: tokens"),
    "one number": (rewards(1.0), JSON, "sample u1: tokens"),
    "lists of lists": (rewards([[0.0]] * 3), JSON, "sample u1: tokens"),
    "another uid": (answer(uid="u7"), JSON, "has uid 'u7'"),
    "a uid that is a number": (answer(uid=1), JSON, "has uid '1'"),
    "the same uid twice": (answer(uid="u0"), JSON, "has uid 'u0'"),
    "another count": (answer(count=4), JSON, "sample u1: counts 4 tokens, it has 3"),
    "a count that is true": (answer(count=True), JSON, "sample u1: counts"),
    "other ids": (answer(ids_hash="0" * 16), JSON, "sample u1: is about other token ids"),
    "a component missing": (answer(rewards={}), JSON, "sample u1: rewards: `quality` is missing"),
    "another component": (answer(rewards={"speed": {"tokens": [0.0] * 3}}), JSON, "`quality` is missing"),
    "a component too many": (
        answer(rewards={"quality": {"tokens": [0.0] * 3}, "x": {"tokens": [0.0] * 3}}),
        JSON,
        "no field 'x'",
    ),
    "applies and tokens": (answer(rewards={"quality": {"tokens": [0.0] * 3, "applies": False}}), JSON, "one of"),
    "applies with true": (answer(rewards={"quality": {"applies": True}}), JSON, "sample u1: applies"),
    "a sample missing": (dumps({"version": "1", "samples": []}), JSON, "has \\(0 samples, asked were 2: u0"),
    "truncated": (answer()[:-9], JSON, "JSON:"),
    "a key twice": (answer().replace(b'"count": 3', b'"count": 3, "count": 3'), JSON, "appears twice"),
    "HTML": (b"<html><body>200 OK</body></html>", "text/html", "is 'text/html'"),
    "HTML that says it is JSON": (b"<html><body>200 OK</body></html>", JSON, "JSON:"),
    "gzip that says it is JSON": (gzip.compress(b" " * 10**7), JSON, "not valid UTF-8"),
    "JSON that says it is Arrow": (answer(), ARROW, "Arrow"),
    "nothing": (b"", JSON, "JSON:"),
    "a list": (b"[]", JSON, "wants an object"),
    "nested beyond all stacks": (b"[" * 200_000, JSON, "nested deeper"),
}


def through_a_component(body: bytes, kind: str) -> list:
    """What the learner's side sees of an answer."""

    class Remote:
        def score(self, batch: ScoreRequest):
            return decode_answer(body, kind, batch, ["quality"])["quality"]

    placed = score_components([Component("quality", Remote)], request())["quality"]
    assert all(isinstance(p, RewardFault) for p in placed)
    return placed


@pytest.mark.parametrize("name", ANSWERS)
def test_garbage_in_an_answer_is_refused_with_component_and_uid(name):
    body, kind, says = ANSWERS[name]
    fault, _ = through_a_component(body, kind)
    assert re.search(says, str(fault)) and str(fault).startswith(
        "sample u0: component 'quality': the answer of its server"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_numbers_that_are_none_in_arrow(value):
    """Arrow carries any float64: only the check of the numbers stands between it and the learner."""
    bad = [FINE[0], (np.array([0.0, value, 0.0]), np.ones(3, dtype=bool))]
    fault, _ = through_a_component(encode_answer(request(), {"quality": bad}, ARROW, "1"), ARROW)
    assert re.search("component 'quality'.*sample u1: quality has .* for token 1", str(fault))


@BOTH
def test_an_answer_to_another_request_is_refused(kind):
    body = encode_answer(request(), {"quality": FINE}, kind, "1")
    other = request(completion_ids=[[19, 13, 0], [5, 6, 7]])
    with pytest.raises(RewardFault, match="sample u1: is about other token ids"):
        decode_answer(body, kind, other, ["quality"])
    with pytest.raises(RewardFault, match="speed|quality"):
        decode_answer(body, kind, request(), ["speed"])


def test_the_page_shows_a_request_and_its_answer():
    asked, answered = documented.blocks(ROOT / "docs" / "reward_http.md", "json")
    got, names = decode_request(asked.encode(), JSON, ["quality"])
    assert names == ["quality"]
    (entry,) = decode_answer(answered.encode(), JSON, got, names)["quality"]
    assert entry.tolist() == [1, 0, 0]
