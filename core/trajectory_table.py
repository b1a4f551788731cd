"""Trajectories as an Arrow table and back, exactly: what a checkpoint keeps of responses, and what a run can record.

One row is one response, over or not. Every per-token column is a list as long as the response, so that rows can be
exploded column by column: token t of each belongs to `response_ids[t]`. Legend: P prompt tokens, T response tokens, K
kept ids (core/trajectory.py: KeptTokens).

| column | type | is |
|---|---|---|
| ordinal, k, attempt | int64 | of the request; `k` counts the samples of a prompt |
| sample_uid | string | 32 hex digits, the same in every attempt |
| seed | int64 | of the run |
| prompt_ids | [P] int64 | |
| columns | string | the row of the dataset as JSON text, `prompt` included |
| response_ids, policy_version | [T] int64 | |
| rollout_logprobs | [T] float32 | |
| action_mask | [T] bool | |
| offset_starts, offset_ends | [T] int64 | code points in the text of the response |
| finish_reason | string | null: it is not over |
| finished_at, scored_at | float64 | seconds since the epoch; 0.0 where it was not scored |
| kept_ids, kept_starts | [K] int32, [T + 1] int64 | null: drawn from the whole vocabulary |
| rollout_values | [T] float32 | null: the engine has no value head |
| rollout_bootstrap | float64 | null: likewise, or the response was not cut |
| component_rewards, component_mask | map of name to [T] float64, [T] bool | empty where it was not scored |
| ref_logprobs | [T] float32 | null: not from a reward server |

The schema's metadata has the version of this table under `tokenppo.trajectories`.
"""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from core.faults import UserError
from core.trajectory import KeptTokens, PromptRequest, Trajectory

VERSION_KEY, VERSION = b"tokenppo.trajectories", b"2"
SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("k", pa.int64(), nullable=False),
        pa.field("sample_uid", pa.string(), nullable=False),
        pa.field("attempt", pa.int64(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("columns", pa.string(), nullable=False),
        pa.field("response_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("rollout_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("action_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("offset_starts", pa.list_(pa.int64()), nullable=False),
        pa.field("offset_ends", pa.list_(pa.int64()), nullable=False),
        pa.field("policy_version", pa.list_(pa.int64()), nullable=False),
        pa.field("finish_reason", pa.string()),
        pa.field("finished_at", pa.float64(), nullable=False),
        pa.field("kept_ids", pa.list_(pa.int32())),
        pa.field("kept_starts", pa.list_(pa.int64())),
        pa.field("rollout_values", pa.list_(pa.float32())),
        pa.field("rollout_bootstrap", pa.float64()),
        pa.field("component_rewards", pa.map_(pa.string(), pa.list_(pa.float64())), nullable=False),
        pa.field("component_mask", pa.map_(pa.string(), pa.list_(pa.bool_())), nullable=False),
        pa.field("ref_logprobs", pa.list_(pa.float32())),
        pa.field("scored_at", pa.float64(), nullable=False),
    ],
    metadata={VERSION_KEY: VERSION},
)


def to_table(trajectories: Iterable[Trajectory]) -> pa.Table:
    """One row each, in order. Raises UserError where a row of the dataset holds what JSON text cannot give back."""
    return pa.Table.from_pylist([_row(t) for t in trajectories], schema=SCHEMA)


def from_table(table: pa.Table) -> list[Trajectory]:
    """The very trajectories that `to_table` was given. Raises UserError for a table of another version."""
    version = (table.schema.metadata or {}).get(VERSION_KEY)
    if version != VERSION:
        raise UserError(f"a table of responses is of version {version}, this tokenppo reads {VERSION}")
    columns = {name: _values(table[name]) for name in table.column_names}
    return [_trajectory({name: values[i] for name, values in columns.items()}) for i in range(len(table))]


def json_text(columns: dict[str, Any], where: str) -> str:
    """A row of the dataset as text that `json.loads` makes the same row of. Raises UserError, which names `where` and
    the column that holds something else than text, numbers, true, false, null, lists and objects."""
    for name, value in columns.items():
        if not (isinstance(name, str) and _is_json(value)):
            raise UserError(
                f"{where}: its column {name!r} holds what JSON cannot give back ({type(value).__name__}); make text or"
                " numbers of it"
            )
    return json.dumps(columns)


def _is_json(value: Any) -> bool:
    """Whether JSON text gives back the same; by exact types, since tuples would come back as lists."""
    if type(value) is list:
        return all(map(_is_json, value))
    if type(value) is dict:
        return all(type(key) is str and _is_json(x) for key, x in value.items())
    return value is None or type(value) in (str, int, float, bool)


def _row(t: Trajectory) -> dict[str, Any]:
    r = t.request
    return {
        "ordinal": r.ordinal,
        "k": r.k,
        "sample_uid": r.sample_uid,
        "attempt": r.attempt,
        "seed": r.seed,
        "prompt_ids": r.prompt_ids,
        "columns": json_text(r.columns, f"prompt {r.ordinal}"),
        "response_ids": t.response_ids,
        "rollout_logprobs": t.rollout_logprobs,
        "action_mask": t.action_mask,
        "offset_starts": t.token_offsets[:, 0],
        "offset_ends": t.token_offsets[:, 1],
        "policy_version": t.policy_version,
        "finish_reason": t.finish_reason,
        "finished_at": t.finished_at,
        "kept_ids": None if t.kept is None else t.kept.ids,
        "kept_starts": None if t.kept is None else t.kept.starts,
        "rollout_values": t.rollout_values,
        "rollout_bootstrap": t.rollout_bootstrap,
        "component_rewards": list(t.component_rewards.items()),
        "component_mask": list(t.component_mask.items()),
        "ref_logprobs": t.ref_logprobs,
        "scored_at": t.scored_at,
    }


def _trajectory(row: dict[str, Any]) -> Trajectory:
    request = PromptRequest(
        ordinal=row["ordinal"],
        k=row["k"],
        sample_uid=row["sample_uid"],
        prompt_ids=row["prompt_ids"],
        columns=json.loads(row["columns"]),
        seed=row["seed"],
        attempt=row["attempt"],
    )
    kept = None if row["kept_ids"] is None else KeptTokens(ids=row["kept_ids"], starts=row["kept_starts"])
    return Trajectory(
        request=request,
        response_ids=row["response_ids"],
        rollout_logprobs=row["rollout_logprobs"],
        action_mask=row["action_mask"],
        token_offsets=np.stack([row["offset_starts"], row["offset_ends"]], axis=1),
        policy_version=row["policy_version"],
        finish_reason=row["finish_reason"],
        finished_at=row["finished_at"],
        kept=kept,
        rollout_values=row["rollout_values"],
        rollout_bootstrap=row["rollout_bootstrap"],
        component_rewards=row["component_rewards"],
        component_mask=row["component_mask"],
        ref_logprobs=row["ref_logprobs"],
        scored_at=row["scored_at"],
    )


def _values(column: pa.ChunkedArray) -> list[Any]:
    """A column as Python and numpy have it: lists as arrays of the column's own type, maps as dicts of such."""
    array = column.combine_chunks()
    if pa.types.is_map(array.type):
        names, arrays = array.keys.to_pylist(), _arrays(array.items)
        bounds = array.offsets.to_pylist()
        return [dict(zip(names[a:b], arrays[a:b], strict=True)) for a, b in zip(bounds, bounds[1:], strict=False)]
    return _arrays(array) if pa.types.is_list(array.type) else array.to_pylist()


def _arrays(lists: pa.ListArray) -> list[np.ndarray | None]:
    values, bounds = lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_pylist()
    there = lists.is_valid().to_pylist()
    return [values[a:b].copy() if is_there else None for a, b, is_there in zip(bounds, bounds[1:], there, strict=False)]
