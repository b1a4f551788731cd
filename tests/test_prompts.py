"""Prompts: identity, order, chat templates, and the mistakes in a file."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import tiny_models
from core.faults import UserError
from core.schema import DataConfig
from rollout.order import Order
from rollout.prompts import PromptStream, load_rows

ROWS = [{"prompt": f"the cat {i}", "n": i} for i in range(10)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.make_tokenizer()


def stream(tokenizer, rows=ROWS, *, seed=0, shuffle=True, run_id="r", window=None, **data) -> PromptStream:
    config = DataConfig(path="p.jsonl", **data)
    order = Order.of_all(len(rows), seed=seed, shuffle=shuffle)
    return PromptStream(rows, tokenizer, config, run_id=run_id, seed=seed, order=order, window=window)


def numbers(requests) -> list[int]:
    return [r.columns["n"] for r in requests]


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(tokenizer):
    s = stream(tokenizer)
    epochs = [numbers(s.take(10)) for _ in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(10))
    assert s.position == 30


def test_a_position_is_the_whole_state(tokenizer):
    one, other = stream(tokenizer), stream(tokenizer)
    one.take(7)
    other.position = 7
    assert numbers(one.take(9)) == numbers(other.take(9))


def test_order_depends_on_the_seed_and_can_be_that_of_the_file(tokenizer):
    assert numbers(stream(tokenizer, seed=1).take(10)) != numbers(stream(tokenizer, seed=2).take(10))
    assert numbers(stream(tokenizer, shuffle=False).take(12)) == [*range(10), 0, 1]


def test_samples_of_one_prompt_have_one_ordinal_and_uids_of_their_own(tokenizer):
    got = stream(tokenizer).take(3, 2)
    assert [(r.ordinal, r.k) for r in got] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert len({r.sample_uid for r in got}) == 6 and got[0].columns == got[1].columns
    again = stream(tokenizer).take(3, 2)
    assert [r.sample_uid for r in got] == [r.sample_uid for r in again]
    assert not {r.sample_uid for r in got} & {r.sample_uid for r in stream(tokenizer, run_id="other").take(3, 2)}


def test_first_leaves_the_position_alone(tokenizer):
    s = stream(tokenizer, shuffle=False)
    assert numbers(s.first(4)) == [0, 1, 2, 3] and len(s.first(99)) == 10 and s.position == 0
    several = s.first(2, 3)
    assert [(r.ordinal, r.k) for r in several] == [(o, k) for o in range(2) for k in range(3)]
    assert several[0].sample_uid == s.first(1)[0].sample_uid  # its first sample is that of an evaluation in training


def test_messages_go_through_the_chat_template_once(tokenizer):
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<eos>{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<eos>assistant:{% endif %}"
    )
    messages = [{"role": "user", "content": "the cat"}]
    (request,) = stream(tokenizer, rows=[{"prompt": messages, "n": 1}]).take(1)
    ids = request.prompt_ids.tolist()
    assert tokenizer.decode(ids) == "<eos>user: the cat<eos>assistant:"
    assert ids.count(0) == 2  # special tokens of the template are tokens, and none is added before them
    assert request.columns["prompt"] == messages


def test_jsonl_parquet_and_another_prompt_column(tmp_path, tokenizer):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n\n" for r in ROWS), encoding="utf-8-sig")
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    assert load_rows(str(tmp_path / "p.jsonl"), "train") == ROWS == load_rows(str(tmp_path / "p.parquet"), "train")
    (request,) = stream(tokenizer, rows=[{"question": "the dog", "n": 1}], prompt_column="question").take(1)
    assert tokenizer.decode(request.prompt_ids) == "the dog" and request.columns["prompt"] == "the dog"


def test_a_dataset_on_disk_loads_through_datasets(tmp_path):
    """`load_dataset` for real, on a folder as a hub repository looks: data/train-*.parquet."""
    (tmp_path / "set" / "data").mkdir(parents=True)
    for split in ("train", "test"):
        pa.parquet.write_table(
            pa.Table.from_pylist(ROWS), tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet"
        )
    assert load_rows(str(tmp_path / "set"), "test") == ROWS
    with pytest.raises(UserError, match="nonsense"):
        load_rows(str(tmp_path / "set"), "nonsense")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', "p.jsonl:2: not valid JSON"),
        ('{"prompt": "a"}\n\n[1]\n', "p.jsonl:3: a list"),
        (b"\xff\xfe{}", "UTF-8"),
    ],
)
def test_a_broken_line_is_named_by_file_and_line(tmp_path, text, words):
    file = tmp_path / "p.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words):
        load_rows(str(file), "train")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no rows"),
        ([{"prompt": "a"}, {"text": "b"}], r"row 2 has no text or messages in `prompt` \(its columns: text\)"),
        ([{"prompt": ""}], "row 1"),
        ([{"prompt": 3}], "row 1"),
        ([{"prompt": "a " * 50}], "row 1: its prompt has .* tokens, 20 fit"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_named_by_its_row(tokenizer, rows, words):
    with pytest.raises(UserError, match=words):
        stream(tokenizer, rows=rows, max_prompt_tokens=40, window=20)


def test_a_missing_file_is_named(tmp_path):
    for name in ("no.jsonl", "no.parquet"):
        with pytest.raises(UserError, match=name):
            load_rows(str(tmp_path / name), "train")


def test_prompt_ids_are_int64(tokenizer):
    assert stream(tokenizer).take(1)[0].prompt_ids.dtype == np.int64
