"""Responses as a table and back: every field and every bit, through a file too."""

import datetime
import math
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.faults import UserError
from core.trajectory import KeptTokens, PromptRequest, Trajectory, sample_uid
from core.trajectory_table import SCHEMA, VERSION_KEY, from_table, json_text, to_table

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
IDS = st.integers(0, 2**31 - 1)
NAMES = st.lists(st.text(min_size=1, max_size=6), max_size=3, unique=True)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    n = draw(st.integers(0, 5))

    def array(elements: st.SearchStrategy, dtype: object, size: int = n) -> np.ndarray:
        return np.array(draw(st.lists(elements, min_size=size, max_size=size)), dtype=dtype)

    ids, names = array(IDS, np.int64), draw(NAMES)
    ordinal, k = draw(st.integers(0, 2**40)), draw(st.integers(0, 99))
    kept = None
    if draw(st.booleans()):
        more = [draw(st.sets(IDS, max_size=3)) for _ in ids]
        kept = KeptTokens.of([np.array(sorted({int(i), *of}), dtype=np.int32) for i, of in zip(ids, more, strict=True)])
    reason, valued = draw(st.sampled_from(["stop", "length", "abort", None])), draw(st.booleans())
    return Trajectory(
        request=PromptRequest(
            ordinal=ordinal,
            k=k,
            sample_uid=sample_uid("r", ordinal, k),
            prompt_ids=array(IDS, np.int64, draw(st.integers(1, 4))),
            columns=draw(st.dictionaries(st.text(max_size=5), JSON, max_size=3)),
            seed=draw(st.integers(0, 2**32 - 1)),
            attempt=draw(st.integers(0, 3)),
        ),
        response_ids=ids,
        rollout_logprobs=array(st.floats(width=32), np.float32),
        action_mask=array(st.booleans(), np.bool_),
        token_offsets=array(st.integers(0, 2**33), np.int64, 2 * n).reshape(n, 2),
        policy_version=array(st.integers(-1, 2**40), np.int64),
        finish_reason=reason,
        finished_at=draw(st.floats(0, 4e9)),
        kept=kept,
        rollout_values=array(st.floats(width=32), np.float32) if valued else None,
        rollout_bootstrap=draw(st.floats()) if valued and reason == "length" else None,
        component_rewards={name: array(st.floats(), np.float64) for name in names},
        component_mask={name: array(st.booleans(), np.bool_) for name in names},
        ref_logprobs=array(st.floats(width=32), np.float32) if draw(st.booleans()) else None,
        scored_at=draw(st.floats(0, 4e9)),
    )


def same(a: object, b: object) -> bool:
    """Bit for bit, types and the order of keys included; NaN is NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Trajectory | PromptRequest | KeptTokens):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return a == b and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


@settings(max_examples=150, deadline=None)
@given(st.lists(trajectories(), max_size=4))
def test_what_comes_back_is_what_was_there(tmp_path_factory, rows):
    table = to_table(rows)
    assert same(from_table(table), rows)
    file = tmp_path_factory.mktemp("t") / "rows.parquet"
    pa.parquet.write_table(table, file)
    assert same(from_table(pa.parquet.read_table(file)), rows)
    halves = pa.concat_tables([table.slice(len(rows) // 2), table.slice(0, len(rows) // 2)])
    assert same(from_table(halves), rows[len(rows) // 2 :] + rows[: len(rows) // 2])


def test_each_field_of_the_records_is_in_the_table():
    """Whoever adds one to the records adds a column, and raises the version."""
    split = {"request", "token_offsets", "kept"}
    of_records = {f.name for record in (PromptRequest, Trajectory) for f in fields(record)} - split
    assert set(SCHEMA.names) == of_records | {"offset_starts", "offset_ends", "kept_ids", "kept_starts"}


def test_another_version_is_refused():
    table = to_table([])
    with pytest.raises(UserError, match="version b'1', this tokenppo reads b'2'"):
        from_table(table.replace_schema_metadata({VERSION_KEY: b"1"}))
    with pytest.raises(UserError, match="version None"):
        from_table(table.replace_schema_metadata(None))


@pytest.mark.parametrize(
    "value", [datetime.date(2026, 1, 1), b"x", (1, 2), {1: "a"}, [{"a": (1,)}, 2], np.float64(1), {1, 2}]
)
def test_a_column_that_text_cannot_give_back_is_named(value):
    with pytest.raises(UserError, match=r"row 7: its column 'when' holds what JSON cannot give back"):
        json_text({"fine": [1, {"a": None}], "when": value}, "row 7")
