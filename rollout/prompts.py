"""Prompts in a fixed logical order: rows of datasets -> PromptRequests with an identity.

`ordinal` numbers the prompts of the endless stream, and the row at an ordinal is a pure function of data, seed and
settings (order.py), and with `data.skip_solved` of the rows that were left out so far. So a position is one integer,
and any process can compute any prompt.
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.faults import UserError
from core.schema import DataConfig
from core.trajectory import PromptRequest, sample_uid
from rollout.order import MAX_GROUPS, OF_AUGMENTATION, Order, make_groups

EVAL_SEED = 2**32 + 1  # no run has it (run.seed < 2**32): evaluations never share random numbers with training
SAME_TOTAL = 1e-6  # totals within this, of their size or of 1, are one: sums of the same rewards in another order

Augment = Callable[[dict[str, Any], np.random.Generator], dict[str, Any]]


@dataclass(frozen=True)
class Place:
    """Where a row comes from, for messages and for its share."""

    source: str  # the key that named its file, and which of several
    i: int  # from 0
    dataset: int = 0  # which of data.mixture

    def __str__(self) -> str:
        return f"{self.source}: row {self.i + 1}"


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


def prompt_of(row: dict[str, Any], column: str, where: object) -> str | list:
    """The prompt of the row that `where` names. Raises UserError where it is neither text nor messages."""
    prompt = row.get(column)
    if not isinstance(prompt, str | list) or not prompt:
        raise UserError(
            f"{where} has no text or messages in `{column}` (its columns: {', '.join(row)}); see data.prompt_column"
        )
    return prompt


def not_fitting(where: object, n: int, limit: int) -> str:
    return (
        f"{where}: its prompt has {n} tokens, {limit} fit (data.max_prompt_tokens, and the model's"
        " window less rollout.max_new_tokens); shorten it, or change one of the two"
    )


def load_training_rows(data: DataConfig) -> tuple[list[dict[str, Any]], list[Place]]:
    """The rows of all datasets to train on, and where each is from. Raises UserError."""
    rows, places = [], []
    for number, (path, name) in enumerate(data.source_names.items()):
        found = load_rows(path, data.split, data.key)
        if not found:
            raise UserError(
                f"{data.key} = {path}: has no rows; each line must be an object with `{data.prompt_column}`"
            )
        if data.mixture:
            found = with_dataset(found, name, data.prompt_column)
        source = data.key if data.path is not None else f"{data.key} {name}"
        rows += found
        places += [Place(source, i, number) for i in range(len(found))]
    return rows, places


def with_dataset(rows: list[dict[str, Any]], name: str, prompt_column: str) -> list[dict[str, Any]]:
    """The rows of one dataset of a mixture with its name in a column. Raises UserError where that is taken."""
    if any("dataset" in row for row in rows) or prompt_column == "dataset":
        raise UserError(
            f"data.mixture {name}: its rows have a column `dataset`, which names the dataset of a mixture; rename it"
        )
    return [row | {"dataset": name} for row in rows]


def classes_of(rows: list[dict[str, Any]], data: DataConfig) -> list[str] | None:
    """The value of data.balance_column in each row, "" where it is missing; None without it. Raises UserError."""
    column = data.balance_column
    if column is None:
        return None
    values = [row.get(column) for row in rows]
    if all(_is_missing(value) for value in values):
        raise UserError(f"data.balance_column = {column}: no row has it; there is {_names(rows)}")
    classes = ["" if _is_missing(value) else json.dumps(value, sort_keys=True, default=str) for value in values]
    if len(set(classes)) > MAX_GROUPS:
        raise UserError(
            f"data.balance_column = {column}: has {len(set(classes))} values in {len(rows)} rows, at most {MAX_GROUPS}"
            " can be balanced; give a column of classes"
        )
    return classes


def difficulties_of(rows: list[dict[str, Any]], places: list[Place], data: DataConfig) -> list[float] | None:
    """The number in data.difficulty_column of each row; None without it. Raises UserError for what is no number."""
    column = data.difficulty_column
    if column is None:
        return None
    for row, place in zip(rows, places, strict=True):
        value = row.get(column)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            there = f"has {value!r} in it" if column in row else f"has no such column; there is {_names([row])}"
            raise UserError(
                f"data.difficulty_column = {column}: {place} {there}; every row needs a number, low for easy"
            )
    return [float(row[column]) for row in rows]


def training_order(rows: list[dict[str, Any]], places: list[Place], data: DataConfig, seed: int) -> Order:
    """Mixture, balance and curriculum as configured. Raises UserError where a column is not what they need."""
    groups = make_groups(
        [place.dataset for place in places], list(data.sources.values()), classes_of(rows, data), data.balance
    )
    return Order(
        groups,
        seed=seed,
        shuffle=data.shuffle,
        difficulty=difficulties_of(rows, places, data),
        curriculum_epochs=data.curriculum_epochs,
        measures=data.measure_difficulty,
    )


def held_out_side(prompt: Any, frac: float) -> float | None:
    """A number in [0, frac) for prompts that data.eval_frac holds out, None for the others.

    A digest of the prompt alone: equal prompts go to one side, and no other row has a say in it.
    """
    digest = hashlib.blake2b(json.dumps(prompt, sort_keys=True, default=str).encode(), digest_size=8).digest()
    u = int.from_bytes(digest, "big") / 2**64
    return u if u < frac else None


def split_off(rows: list[dict[str, Any]], places: list[Place], data: DataConfig) -> tuple[list[int], list[int]]:
    """Numbers of the rows to train on, and of those that data.eval_frac holds out: in the order of their digests, so
    that the first ones are a sample of all datasets. Raises UserError where nothing is held out, or a dataset whole."""
    sides = [held_out_side(row.get(data.prompt_column), data.eval_frac) for row in rows]
    train = [i for i, side in enumerate(sides) if side is None]
    held_out = sorted((side, i) for i, side in enumerate(sides) if side is not None)
    here = f"data.eval_frac = {data.eval_frac:g}"
    if not held_out:
        raise UserError(f"{here}: holds none of the {len(rows)} rows out; give more, or name data.eval_path")
    if bare := {place.source for place in places} - {places[i].source for i in train}:
        raise UserError(f"{here}: holds all rows of {min(bare)} out; give less, or name data.eval_path")
    return train, [i for _, i in held_out]


def leak(training: "PromptStream", held_out: "PromptStream | None") -> str | None:
    """A warning where held-out prompts are training prompts too, token by token; None where none is."""
    if held_out is None:
        return None
    seen = {ids.tobytes() for ids in training.prompt_ids}
    n = sum(ids.tobytes() in seen for ids in held_out.prompt_ids)
    if not n:
        return None
    return (
        f"warning: {n} of {len(held_out.rows)} held-out prompts are training prompts too, so that evaluations flatter;"
        " take them out of one side, or use data.eval_frac"
    )


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _names(rows: list[dict[str, Any]]) -> str:
    return ", ".join(sorted({str(name) for row in rows for name in row})[:20])


def columns_of(rows: list[dict[str, Any]], prompt_column: str) -> set[str]:
    """Names of the columns that reach the rewards by keyword."""
    return {name for row in rows for name in row} - {"prompt", prompt_column}


def encode_prompt(prompt: Any, tokenizer: Any) -> list[int]:
    """Ids of a prompt: text as it is, messages through the chat template (which writes its own special tokens)."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def augmented(augment: Augment, name: str, row: dict[str, Any], ordinal: int, seed: int) -> dict[str, Any]:
    """What `augment`, known as `name`, makes of the row of a prompt. Raises UserError where that is no row."""
    where = f"data.augment = {name}: prompt {ordinal}"
    rng = np.random.default_rng([seed, ordinal, 0, OF_AUGMENTATION])
    try:
        made = augment(copy.deepcopy(row), rng)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{where}: it raised {type(error).__name__}: {reason}") from None
    if not isinstance(made, dict):
        raise UserError(f"{where}: it gave a {type(made).__name__}; it must return the row, a dict")
    return made


class PromptStream:
    """An endless stream of samples to write. Its state is `position` (the next ordinal); with `skip_solved` also which
    rows were left out, and how often in a row others gave no signal; and how hard each row was found, if measured."""

    def __init__(
        self,
        rows: list[dict[str, Any]],
        tokenizer: Any,
        data: DataConfig,
        *,
        run_id: str,
        seed: int,
        order: Order | None = None,
        places: Sequence[Place] | None = None,
        augment: Augment | None = None,
        skip_solved: int | None = None,
        window: int | None = None,
        stop: tuple[int, ...] = (),
        source: str = "data.path",
    ) -> None:
        """
        Args:
            order: which row each ordinal is; None: as in the file.
            places: where each row is from, where that is not `source` line by line.
            augment: makes the row of an ordinal out of a row.
            skip_solved: see data.skip_solved.
            window: how many prompt tokens leave room for a response, None where the model names no limit.
            stop: ids that end a response, so no prompt may end with one.
        """
        if not rows:
            raise UserError(f"{source}: has no rows; each line must be an object with `{data.prompt_column}`")
        self._limit = min(data.max_prompt_tokens, window) if window is not None else data.max_prompt_tokens
        self._tokenizer, self._prompt_column, self._stop = tokenizer, data.prompt_column, stop
        self.rows = rows
        self.places = places or [Place(source, i) for i in range(len(rows))]
        self.prompt_ids = [self._encode(row, place) for row, place in zip(rows, self.places, strict=True)]
        self._columns = [self._columns_of(row) for row in rows]
        self.run_id, self.seed, self.position = run_id, seed, 0
        self.order = order or Order.of_all(len(rows), seed=seed, shuffle=False)
        self._augment, self._augment_name = augment, data.augment
        self._skip_solved, self._flat_visits = skip_solved, dict[int, int]()  # row -> visits without signal, in a row
        self._augmented: tuple[int, np.ndarray, dict[str, Any]] | None = None
        if augment is not None:
            self._refuse_other_than_pure()

    @property
    def fingerprint(self) -> str:
        """Digest of all prompts and columns: a position means nothing in other prompts."""
        h = hashlib.blake2b(digest_size=16)
        for ids, columns in zip(self.prompt_ids, self._columns, strict=True):
            h.update(ids.tobytes())
            h.update(json.dumps(columns, sort_keys=True, default=str).encode())
        return h.hexdigest()

    @property
    def columns(self) -> set[str]:
        """Names of the columns that reach the rewards by keyword."""
        return columns_of([*self._columns, self._row(0)[1]], "prompt")

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain values."""
        state: dict[str, Any] = {"position": self.position}
        if self._skip_solved is not None:
            for name, rows in (("left_out", self.order.left_out), ("flat_visits", self._flat_visits)):
                state[name] = [[k, v] for k, v in sorted(rows.items())]
        if self.order.measures:
            state["measured"] = self.order.measured
        return state

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on where `state` was read."""
        self.position = saved["position"]
        if self._skip_solved is not None:
            self.order.left_out = dict(saved["left_out"])
            self._flat_visits = dict(saved["flat_visits"])
        if self.order.measures:
            self.order.measured = saved["measured"]

    def visits(self, n_prompts: int) -> tuple[float, float]:
        """How often the rows are seen among so many prompts: those seen least, and those seen most."""
        of_groups = [n_prompts * group.share / len(group.rows) for group in self.order.groups]
        return min(of_groups), max(of_groups)

    def take(self, n_prompts: int, n_samples_per_prompt: int = 1) -> list[PromptRequest]:
        """The next prompts, each n times, in order; moves the position on."""
        ordinals = range(self.position, self.position + n_prompts)
        self.position += n_prompts
        return [self._request(ordinal, k) for ordinal in ordinals for k in range(n_samples_per_prompt)]

    def first(self, n_prompts: int, n_samples_per_prompt: int = 1) -> list[PromptRequest]:
        """The first prompts, each n times, as an evaluation wants them; the position stays."""
        ordinals = range(min(n_prompts, len(self.rows)))
        return [self._request(ordinal, k) for ordinal in ordinals for k in range(n_samples_per_prompt)]

    def observe(
        self, totals: Iterable[tuple[int, float]], *, trained: int | None = None, oldest: int | None = None
    ) -> dict[str, float]:
        """Take in (ordinal, total reward) of each sample of a step, of all ranks. Gives metrics.

        `trained`: prompts that were trained on so far; None: all up to the last of these. `oldest`: a prompt that is
        under way since before some of these, and still to be observed.

        A prompt whose samples all got one total has no signal; `skip_solved` such visits in a row leave its row out of
        the epochs that have not begun. A prompt of which fewer than two samples are there is not judged.
        """
        samples: dict[int, list[float]] = {}
        for ordinal, total in totals:
            samples.setdefault(ordinal, []).append(total)
        flat = {o: _is_flat(samples[o]) for o in sorted(samples) if len(samples[o]) > 1}
        if trained is None:
            trained = max(samples) + 1 if samples else self.position  # what is written ahead is not trained on yet
        means = {"data/epochs": trained / len(self.rows)}
        if self.order.measures and samples:
            mean = {ordinal: math.fsum(of) / len(of) for ordinal, of in sorted(samples.items())}
            usual = math.fsum(mean.values()) / len(mean)  # of this policy; early steps would seem hard without it
            for ordinal, of_prompt in mean.items():
                self.order.measure(self.order.row_at(ordinal), usual - of_prompt)
        if flat:
            means["data/no_signal_frac"] = sum(flat.values()) / len(flat)
        if self._skip_solved is not None:
            leaving = []
            for ordinal, is_flat in flat.items():
                row = self.order.row_at(ordinal)
                before = self._flat_visits.pop(row, 0)
                if is_flat:
                    self._flat_visits[row] = before + 1
                    leaving += [row] * (before + 1 >= self._skip_solved)
            self.order.leave_out(leaving, self.position)
            means["data/rows_left_out"] = len(self.order.left_out)
        if samples:
            self.order.forget_before(min([*samples, *([] if oldest is None else [oldest])]))
        return means

    def _request(self, ordinal: int, k: int) -> PromptRequest:
        prompt_ids, columns = self._row(ordinal)
        return PromptRequest(
            ordinal=ordinal,
            k=k,
            sample_uid=sample_uid(self.run_id, ordinal, k),
            prompt_ids=prompt_ids,
            columns=columns,
            seed=self.seed,
        )

    def _row(self, ordinal: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Prompt ids and columns of an ordinal; augmented once for all samples of a prompt."""
        row = self.order.row_at(ordinal)
        if self._augment is None:
            return self.prompt_ids[row], self._columns[row]
        if self._augmented is None or self._augmented[0] != ordinal:
            self._augmented = (ordinal, *self._augment_row(self.rows[row], ordinal))
        return self._augmented[1:]

    def _augment_row(self, row: dict[str, Any], ordinal: int) -> tuple[np.ndarray, dict[str, Any]]:
        made = augmented(self._augment, self._augment_name, row, ordinal, self.seed)
        return self._encode(made, f"data.augment = {self._augment_name}: prompt {ordinal}"), self._columns_of(made)

    def _refuse_other_than_pure(self) -> None:
        """Raise UserError where the first prompt comes out otherwise a second time: no run could be gone on with."""
        one, other = (self._augment_row(self.rows[self.order.row_at(0)], 0) for _ in range(2))
        if one[0].tolist() != other[0].tolist() or json.dumps(one[1], default=str) != json.dumps(other[1], default=str):
            raise UserError(
                f"data.augment = {self._augment_name}: gives another row for prompt 0 when it is called again; take all"
                " random numbers from its second argument, and keep no state"
            )

    def _columns_of(self, row: dict[str, Any]) -> dict[str, Any]:
        prompt = row[self._prompt_column]
        return {"prompt": prompt, **{c: v for c, v in row.items() if c != self._prompt_column}}

    def _encode(self, row: dict[str, Any], where: object) -> np.ndarray:
        """[P] int64 ids of the prompt of a row. Raises UserError for one that cannot be asked."""
        prompt = prompt_of(row, self._prompt_column, where)
        try:
            ids = encode_prompt(prompt, self._tokenizer)
        except Exception as error:  # of the chat template, which is a program of its own, or there is none
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{where}: its prompt cannot be encoded ({reason}); messages need a tokenizer with a chat template, and"
                " role and content in each"
            ) from None
        if not 0 < len(ids) <= self._limit:
            raise UserError(not_fitting(where, len(ids), self._limit))
        if ids[-1] in self._stop:
            raise UserError(
                f"{where}: its prompt ends with the stop token {ids[-1]}, which tokenizer or chat template put there: a"
                " response after it would not be one; switch that off (add_eos_token)"
            )
        return np.asarray(ids, dtype=np.int64)


def _is_flat(totals: list[float]) -> bool:
    return max(totals) - min(totals) <= SAME_TOTAL * max(1.0, *map(abs, totals))
