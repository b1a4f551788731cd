"""Prompts in a fixed logical order: rows of a dataset -> PromptRequests with an identity.

`ordinal` numbers the prompts of the endless stream: ordinal = epoch * rows + place, and the row at a place is a pure
function of (seed, epoch). So a position is one integer, and any process can compute any prompt.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from core.faults import UserError
from core.schema import DataConfig
from core.trajectory import PromptRequest, sample_uid

EVAL_SEED = 2**32 + 1  # no run has it (run.seed < 2**32): evaluations never share random numbers with training


def load_rows(path: str, split: str, key: str = "data.path") -> list[dict[str, Any]]:
    """All rows of a JSONL or Parquet file, or of a dataset id (through `datasets`). Raises UserError with file:line.

    `key` of the configuration, for the message.
    """
    file = Path(path)
    if file.suffix in (".jsonl", ".json"):
        return _read_jsonl(file, key)
    if file.suffix == ".parquet":
        import pyarrow.parquet

        if not file.is_file():
            raise UserError(f"{key} = {path}: there is no such file")
        try:
            return pyarrow.parquet.read_table(file).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{key} = {path}: is no Parquet file ({reason}); give one, or JSONL") from None
    import datasets

    try:
        return datasets.load_dataset(path, split=split).to_list()
    except Exception as error:  # the library's own words say which of id, split or network it was
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{key} = {path}: no JSONL or Parquet file and no dataset that loads ({reason})") from None


def _read_jsonl(file: Path, key: str) -> list[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"{key} = {file}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key} = {file}: cannot be read as UTF-8 text ({error})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{key} = {file}:{number}: not valid JSON ({error.msg}: column {error.colno}); one object a line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{key} = {file}:{number}: a {type(row).__name__}, not an object with a prompt column")
        rows.append(row)
    return rows


def prompt_of(row: dict[str, Any], column: str, source: str, i: int) -> str | list:
    """The prompt of row `i`. Raises UserError where it is neither text nor messages."""
    prompt = row.get(column)
    if not isinstance(prompt, str | list) or not prompt:
        raise UserError(
            f"{source}: row {i + 1} has no text or messages in `{column}` (its columns: {', '.join(row)}); see"
            " data.prompt_column"
        )
    return prompt


def not_fitting(source: str, i: int, n: int, limit: int) -> str:
    return (
        f"{source}: the prompt of row {i + 1} has {n} tokens, {limit} fit (data.max_prompt_tokens, and the model's"
        " window less rollout.max_new_tokens); shorten it, or change one of the two"
    )


def columns_of(rows: list[dict[str, Any]], prompt_column: str) -> set[str]:
    """Names of the columns that reach the rewards by keyword."""
    return {name for row in rows for name in row} - {"prompt", prompt_column}


def encode_prompt(prompt: Any, tokenizer: Any) -> list[int]:
    """Ids of a prompt: text as it is, messages through the chat template (which writes its own special tokens)."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


class PromptStream:
    """An endless stream of samples to write; `position` (the next ordinal) is its whole state."""

    def __init__(
        self,
        rows: list[dict[str, Any]],
        tokenizer: Any,
        data: DataConfig,
        *,
        run_id: str,
        seed: int,
        shuffle: bool,
        window: int | None = None,
        stop: tuple[int, ...] = (),
        source: str = "data.path",
    ) -> None:
        """`window`: how many prompt tokens leave room for a response, None where the model names no limit. `stop`: ids
        that end a response, so no prompt may end with one."""
        if not rows:
            raise UserError(f"{source}: has no rows; each line must be an object with `{data.prompt_column}`")
        limit = min(data.max_prompt_tokens, window) if window is not None else data.max_prompt_tokens
        self.rows, self._prompt_ids = rows, []
        for i, row in enumerate(rows):
            prompt = prompt_of(row, data.prompt_column, source, i)
            try:
                ids = encode_prompt(prompt, tokenizer)
            except Exception as error:  # of the chat template, which is a program of its own, or there is none
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"{source}: the prompt of row {i + 1} cannot be encoded ({reason}); messages need a tokenizer with"
                    " a chat template, and role and content in each"
                ) from None
            if not 0 < len(ids) <= limit:
                raise UserError(not_fitting(source, i, len(ids), limit))
            if ids[-1] in stop:
                raise UserError(
                    f"{source}: the prompt of row {i + 1} ends with the stop token {ids[-1]}, which tokenizer or chat"
                    " template put there: a response after it would not be one; switch that off (add_eos_token)"
                )
            self._prompt_ids.append(np.asarray(ids, dtype=np.int64))
        self._columns = [
            {"prompt": row[data.prompt_column], **{c: v for c, v in row.items() if c != data.prompt_column}}
            for row in rows
        ]
        self.run_id, self.seed, self.shuffle, self.position = run_id, seed, shuffle, 0
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def fingerprint(self) -> str:
        """Digest of all prompts and columns: a position means nothing in other prompts."""
        h = hashlib.blake2b(digest_size=16)
        for ids, columns in zip(self._prompt_ids, self._columns, strict=True):
            h.update(ids.tobytes())
            h.update(json.dumps(columns, sort_keys=True, default=str).encode())
        return h.hexdigest()

    @property
    def columns(self) -> set[str]:
        """Names of the columns that reach the rewards by keyword."""
        return columns_of(self._columns, "prompt")

    def row_of(self, ordinal: int) -> int:
        """Which row prompt `ordinal` is."""
        epoch, place = divmod(ordinal, len(self.rows))
        if not self.shuffle:
            return place
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows)))
        return int(self._order[1][place])

    def take(self, n_prompts: int, n_samples_per_prompt: int = 1) -> list[PromptRequest]:
        """The next prompts, each n times, in order; moves the position on."""
        ordinals = range(self.position, self.position + n_prompts)
        self.position += n_prompts
        return [self._request(ordinal, k) for ordinal in ordinals for k in range(n_samples_per_prompt)]

    def first(self, n_prompts: int) -> list[PromptRequest]:
        """The first prompts, one sample each, as an evaluation wants them; the position stays."""
        return [self._request(ordinal, 0) for ordinal in range(min(n_prompts, len(self.rows)))]

    def _request(self, ordinal: int, k: int) -> PromptRequest:
        row = self.row_of(ordinal)
        return PromptRequest(
            ordinal=ordinal,
            k=k,
            sample_uid=sample_uid(self.run_id, ordinal, k),
            prompt_ids=self._prompt_ids[row],
            columns=self._columns[row],
            seed=self.seed,
        )
