"""The token ledger: what every number of every token of a step was. One Parquet file per step and learner rank.

    <run>/ledger/step_00000012.rank_0.parquet

A row is a response that was trained on: the columns of core/trajectory_table.py, and those below. Every list has one
entry for each of the T response tokens; where `action_mask` is False (an environment wrote the token) a number is null.
So a file can be exploded column by column, with any tool that reads Parquet (docs/ledger.md has an example).

| column | type | is |
|---|---|---|
| prompt_text, response_text | string | as the tokenizer decodes them; special tokens are in the prompt alone |
| tokens | [T] string | the characters of each token: `offset_starts` and `offset_ends` cut out of response_text |
| old_logprobs | [T] float32 | of the policy before the step, by the learner, or by workers that give values too |
| new_logprobs | [T] float32 | of the policy in the last pass over the batch that was made, when the token's turn came |
| ref_logprobs | [T] float32 | of the reference, by whomever |
| values | [T] float32 | of the state before each token |
| bootstrap_value | float32 | of the state after the last token, where the response was cut; else 0 and not read |
| kl | [T] float32 | k1 of the writer and the reference: what kl_coef is multiplied with |
| normalized, weighted | map of name to [T] float32 | components after normaliser and clip; and after the weight too |
| token_rewards | [T] float32 | the sum of `weighted` |
| rewards | [T] float32 | what GAE reads: after ppo.scale_rewards and the KL penalty |
| advantages, returns | [T] float32 | what the losses read: advantages after whitening |
| ratio | [T] float32 | exp(new_logprobs - those that PPO's ratio is against) |
| clipped | [T] bool | whether the clipped side of the surrogate counted |
| importance | [T] float32 | the weight of ppo.importance_cap; 1 without it |

The schema's metadata has the version of this table under `tokenppo.ledger`, and under `tokenppo.step` a JSON object:
step, rank, ranks, `fraction` of the prompts that is recorded, component `weights`, `before`: the state of the loop
when the step began (kl_coef, running normalisers, multipliers), `credit`: what made advantages of rewards, by the
names of core/metrics.py (credit/reward_scale, credit/advantage_mean, credit/advantage_std), the whole `config`, what
the learner computed with (`device`, `threads`, `torch`), and `policy_digest`: of the policy after the step, as it was
sent to the workers (core/weights.py: version_digest); null on all ranks but the first. `tokenppo replay` computes a
step again from these.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from core import trajectory_table
from core.faults import UserError

FOLDER = "ledger"
VERSION_KEY, VERSION, STEP_KEY = b"tokenppo.ledger", b"3", b"tokenppo.step"
_PER_TOKEN = (
    "old_logprobs",
    "new_logprobs",
    "values",
    "kl",
    "token_rewards",
    "rewards",
    "advantages",
    "returns",
    "ratio",
)
NUMBERS = (*_PER_TOKEN, "importance")
MAPS = ("normalized", "weighted")
_OF_SCORES = pa.map_(pa.string(), pa.list_(pa.float32()))
SCHEMA = pa.schema(
    [
        *trajectory_table.SCHEMA,
        pa.field("prompt_text", pa.string(), nullable=False),
        pa.field("response_text", pa.string(), nullable=False),
        pa.field("tokens", pa.list_(pa.string()), nullable=False),
        *(pa.field(name, pa.list_(pa.float32()), nullable=False) for name in NUMBERS),
        pa.field("clipped", pa.list_(pa.bool_()), nullable=False),
        pa.field("bootstrap_value", pa.float32(), nullable=False),
        *(pa.field(name, _OF_SCORES, nullable=False) for name in MAPS),
    ],
    metadata=trajectory_table.SCHEMA.metadata | {VERSION_KEY: VERSION},
)


def file_of(folder: Path, step: int, rank: int) -> Path:
    """`folder`: of the run."""
    return folder / FOLDER / f"step_{step:08d}.rank_{rank}.parquet"


def files(folder: Path, step: int | None = None) -> list[Path]:
    """Of a run, of all ranks, by step; of one step if it is given."""
    which = "*" if step is None else f"{step:08d}"
    return sorted((folder / FOLDER).glob(f"step_{which}.rank_*.parquet"))


def step_of(path: Path) -> int:
    return int(path.name.split(".")[0].removeprefix("step_"))


def read(folder: Path, step: int, columns: list[str] | None = None) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The rows of a step, by (ordinal, k), and what each rank says of it. Raises UserError where there are none, or of
    another version.

    Args:
        columns: those to read, all if None; ordinal and k are read besides.
    """
    found = files(folder, step)
    if not found:
        kept = sorted({step_of(path) for path in files(folder)})
        there = f"it has steps {kept[0]} to {kept[-1]}" if kept else "it is empty; log.ledger is the share that is kept"
        raise UserError(f"{folder / FOLDER}: nothing of step {step}; {there}")
    wanted = None if columns is None else list(dict.fromkeys(["ordinal", "k", *columns]))
    tables = [pyarrow.parquet.read_table(path, columns=wanted) for path in found]
    for path, table in zip(found, tables, strict=True):
        version = (table.schema.metadata or {}).get(VERSION_KEY)
        if version != VERSION:
            raise UserError(f"{path}: a ledger of version {version}, this tokenppo reads {VERSION}")
    said = [json.loads(table.schema.metadata[STEP_KEY]) for table in tables]
    rows = pa.concat_tables([table.replace_schema_metadata(SCHEMA.metadata) for table in tables])
    return rows.sort_by([("ordinal", "ascending"), ("k", "ascending")]), said
