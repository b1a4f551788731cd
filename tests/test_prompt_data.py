"""Between files and stream: mixtures, classes, held-out split, leaks, augmentation, prompts without signal."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

import tiny_models
from core import config
from core.faults import UserError
from launch import build, early
from rollout.prompts import (
    Place,
    PromptStream,
    classes_of,
    difficulties_of,
    held_out_side,
    leak,
    load_training_rows,
    split_off,
    training_order,
)

WORDS = ["cat", "dog", "mat", "park", "sat", "ran"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny_models.save_model(folder / "model", "gpt2")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return build.load_tokenizer(str(folder / "model"))


def write(file: Path, rows: list[dict]) -> str:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def configured(folder: Path, **data) -> config.Config:
    values = {f"data.{key}": value for key, value in data.items()}
    least = {"model.path": str(folder / "model"), "rewards.a.fn": "r.py:f", "rollout.n_samples_per_prompt": 2}
    return config.load(None, least | {"rollout.max_new_tokens": 16} | values)


def numbered(n: int, first: int = 0, **columns) -> list[dict]:
    return [{"prompt": f"the {WORDS[i % 6]} {i}", "n": i} | columns for i in range(first, first + n)]


def streams(folder, tokenizer, rows=None, **data):
    return build.prompt_streams(configured(folder, **data), tokenizer, rows)


# Mixtures


def test_a_mixture_draws_its_shares_and_names_the_dataset(folder, tokenizer, tmp_path):
    paths = {
        write(tmp_path / "math.jsonl", numbered(30)): 3,
        write(tmp_path / "chat.jsonl", numbered(5, 100)): 1,
    }
    stream, none = streams(folder, tokenizer, mixture=paths)
    drawn = Counter(request.columns["dataset"] for request in stream.take(10_000))
    assert none is None and abs(drawn["math"] - 7500) <= 10 and abs(drawn["chat"] - 2500) <= 10
    assert stream.columns == {"n", "dataset"} and len(stream.rows) == 35
    (a, b) = stream.visits(1000)
    assert (a, b) == pytest.approx((750 / 30, 250 / 5))


def test_datasets_with_one_file_name_are_named_by_their_path(folder):
    cfg = configured(folder, mixture={"/a/train.jsonl": 1, "/b/train.jsonl": 1, "org/set": 1})
    names = {"/a/train.jsonl": "/a/train.jsonl", "/b/train.jsonl": "/b/train.jsonl", "org/set": "org/set"}
    assert cfg.data.source_names == names


def test_a_mixture_is_written_down_and_read_back(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "model: {path: g}\nrewards: {a: {fn: r.py:f}}\ndata: {mixture: {a.jsonl: 3, org/set.v2: 1}}\n"
    )
    cfg = config.load(tmp_path / "c.yaml")
    assert cfg.data.mixture == {str(tmp_path / "a.jsonl"): 3.0, "org/set.v2": 1.0}
    (tmp_path / "d.yaml").write_text(config.to_yaml(cfg))
    assert config.load(tmp_path / "d.yaml") == cfg
    assert config.parse_override("data.mixture", "{a.jsonl: 3}") == {"a.jsonl": 3}


def test_a_row_of_a_mixture_is_named_by_dataset_and_line(folder, tokenizer, tmp_path):
    good, bad = write(tmp_path / "good.jsonl", numbered(3)), write(tmp_path / "bad.jsonl", [*numbered(1), {"text": ""}])
    with pytest.raises(UserError, match=r"data.mixture bad: row 2 has no text or messages in `prompt`"):
        streams(folder, tokenizer, mixture={good: 1, bad: 1})
    own = write(tmp_path / "own.jsonl", numbered(3, dataset="x"))
    with pytest.raises(UserError, match="data.mixture own: its rows have a column `dataset`"):
        streams(folder, tokenizer, mixture={good: 1, own: 1})
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match="data.mixture = .*empty.jsonl: has no rows"):
        streams(folder, tokenizer, mixture={good: 1, empty: 1})


def test_held_out_rows_have_what_a_reward_asks_for_in_a_mixture(folder, tokenizer, tmp_path):
    one = write(tmp_path / "a.jsonl", numbered(3))
    held = write(tmp_path / "h.jsonl", [{"prompt": "the cat", "dataset": "mine"}, {"prompt": "the dog"}])
    _, held_out = streams(folder, tokenizer, mixture={one: 1}, eval_path=held)
    assert [request.columns["dataset"] for request in held_out.first(9)] == ["mine", "held_out"]


# Balance and curriculum by a column


def test_missing_values_are_one_class_and_others_go_by_value(folder):
    data = configured(folder, path="p.jsonl", balance_column="kind").data
    rows = [{"kind": "a"}, {"kind": None}, {}, {"kind": math.nan}, {"kind": ["a", 1]}, {"kind": ["a", 1]}]
    assert classes_of(rows, data) == ['"a"', "", "", "", '["a", 1]', '["a", 1]']
    with pytest.raises(UserError, match="data.balance_column = kind: no row has it; there is other"):
        classes_of([{"other": 1}], data)
    with pytest.raises(UserError, match="data.balance_column = kind: has 1025 values in 1025 rows"):
        classes_of([{"kind": i} for i in range(1025)], data)


def test_a_rare_class_is_drawn_as_often_as_the_others(folder, tokenizer):
    rows = numbered(57, kind="common") + numbered(3, 57, kind="rare") + numbered(3, 60)
    stream, _ = streams(folder, tokenizer, rows, path="p.jsonl", balance_column="kind")
    drawn = Counter(request.columns.get("kind") for request in stream.take(3000))
    assert all(abs(drawn[kind] - 1000) <= 5 for kind in ("common", "rare", None))


@pytest.mark.parametrize(("value", "words"), [("hard", "'hard'"), (None, "None"), (True, "True"), (math.nan, "nan")])
def test_a_difficulty_that_is_no_number_is_named_by_its_row(folder, value, words):
    data = configured(folder, path="p.jsonl", difficulty_column="level").data
    rows, places = [{"level": 1}, {"level": value}], [Place("data.path", 0), Place("data.path", 7)]
    with pytest.raises(UserError, match=f"data.difficulty_column = level: data.path: row 8 has {words} in it"):
        difficulties_of(rows, places, data)
    with pytest.raises(UserError, match="row 1 has no such column; there is other"):
        difficulties_of([{"other": 1}], places[:1], data)


def test_a_curriculum_within_each_dataset(folder, tokenizer, tmp_path):
    paths = {write(tmp_path / f"{c}.jsonl", numbered(20, 20 * i)): 1 for i, c in enumerate("ab")}
    stream, _ = streams(folder, tokenizer, mixture=paths, difficulty_column="n")
    first = [request.columns for request in stream.take(40)]
    for name in "ab":
        of_one = [columns["n"] for columns in first if columns["dataset"] == name]
        assert of_one[:20] == sorted(of_one[:20])


# The held-out split


def test_equal_prompts_lie_on_one_side_and_stay_there(folder):
    """The digest decides; `printf '"the cat"' | b2sum -l 64` says 520c5be8f6d9eed1 of 2^64, of "the park" d981..."""
    assert held_out_side("the cat", 0.5) == 0x520C5BE8F6D9EED1 / 2**64 and held_out_side("the cat", 0.32) is None
    assert held_out_side("the park", 0.5) is None and 0.849 < held_out_side("the park", 0.9) < 0.850
    data = configured(folder, path="p.jsonl", eval_frac=0.2).data
    rows = [{"prompt": f"p {i % 700}", "n": i} for i in range(1000)]
    places = [Place("data.path", i) for i in range(1000)]
    train, held = split_off(rows, places, data)
    assert sorted(train + held) == list(range(1000)) and 120 < len(held) < 280  # 200 +- 4.4 deviations of 18
    assert not {rows[i]["prompt"] for i in train} & {rows[i]["prompt"] for i in held}
    more = [{"prompt": "a new one"}, *rows]
    _, again = split_off(more, [Place("data.path", i) for i in range(1001)], data)
    assert {more[i]["n"] for i in again if i} == {rows[i]["n"] for i in held}


def test_the_split_makes_two_streams_without_a_leak(folder, tokenizer):
    rows = numbered(40) + numbered(10)  # ten duplicates
    training, held_out = streams(folder, tokenizer, rows, path="p.jsonl", eval_frac=0.3)
    assert len(training.rows) + len(held_out.rows) == 50 and leak(training, held_out) is None
    order = [request.columns["n"] for request in held_out.first(99)]
    assert len(order) == len(held_out.rows) and order != sorted(order)


@pytest.mark.parametrize(("frac", "words"), [(1e-9, "holds none of the 3 rows out"), (0.999999, "holds all rows of")])
def test_a_split_with_an_empty_side_is_refused(folder, tokenizer, frac, words):
    with pytest.raises(UserError, match=f"data.eval_frac = .*{words}"):
        streams(folder, tokenizer, numbered(3), path="p.jsonl", eval_frac=frac)


def test_a_leak_is_counted(folder, tokenizer, tmp_path):
    held = write(tmp_path / "h.jsonl", numbered(6, 18))
    training, held_out = streams(folder, tokenizer, numbered(20), path="p.jsonl", eval_path=held)
    assert leak(training, held_out).startswith("warning: 2 of 6 held-out prompts are training prompts too")
    assert leak(training, None) is None


# Augmentation


def augmenting(tokenizer, fn, rows=None, seed=0) -> PromptStream:
    data = config.Config.model_fields["data"].annotation(path="p.jsonl", augment="a.py:fn")
    rows = rows or numbered(6)
    order = training_order(rows, [Place("data.path", i) for i in range(len(rows))], data, seed)
    return PromptStream(rows, tokenizer, data, run_id="r", seed=seed, order=order, augment=fn, window=40)


def prefixed(row, rng):
    row["style"] = WORDS[rng.integers(6)]
    return row | {"prompt": f"{row['style']} {row['prompt']}"}


def test_augmentation_is_a_function_of_row_seed_and_ordinal(tokenizer):
    one, other = augmenting(tokenizer, prefixed), augmenting(tokenizer, prefixed)
    whole = one.take(30, 2)
    other.position = 17
    for a, b in zip(whole[34:], other.take(13, 2), strict=True):
        assert (
            a.columns == b.columns and a.prompt_ids.tolist() == b.prompt_ids.tolist() and a.sample_uid == b.sample_uid
        )
    for a, b in zip(whole[::2], whole[1::2], strict=True):  # the samples of one prompt are of one prompt
        assert a.columns == b.columns
    assert len({r.columns["prompt"] for r in whole if r.columns["n"] == 0}) > 1  # another one in each epoch
    assert all(tokenizer.decode(r.prompt_ids) == r.columns["prompt"] for r in whole)
    assert "style" in one.columns and not any("style" in row for row in one.rows)
    assert [r.columns for r in augmenting(tokenizer, prefixed, seed=1).take(6)] != [r.columns for r in whole[:12:2]]


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda row, rng: None, "gave a NoneType; it must return the row"),
        (lambda row, rng: {"n": 1}, "has no text or messages in `prompt`"),
        (lambda row, rng: {"prompt": "cat " * 99}, "tokens, 40 fit"),
        (lambda row, rng: {}["x"], "it raised KeyError: 'x'"),
    ],
)
def test_an_augmentation_that_fails_is_named_with_its_prompt(tokenizer, fn, words):
    with pytest.raises(UserError, match=rf"data.augment = a.py:fn: prompt 0.*{words}"):
        augmenting(tokenizer, fn)
    stream = augmenting(tokenizer, lambda row, rng: row)
    stream._augment, stream.position = fn, 5
    with pytest.raises(UserError, match=rf"data.augment = a.py:fn: prompt 5.*{words}"):
        stream.take(1)


def test_an_augmentation_with_a_state_is_refused(tokenizer):
    calls = []

    def counts(row, rng):
        calls.append(1)
        return row | {"n": len(calls)}

    with pytest.raises(UserError, match="gives another row for prompt 0 when it is called again"):
        augmenting(tokenizer, counts)


def test_held_out_prompts_are_not_augmented(folder, tokenizer, tmp_path):
    (tmp_path / "a.py").write_text("def fn(row, rng):\n    return row | {'prompt': 'ran ' + row['prompt']}\n")
    training, held_out = streams(
        folder, tokenizer, numbered(30), path="p.jsonl", eval_frac=0.3, augment=f"{tmp_path / 'a.py'}:fn"
    )
    assert all(request.columns["prompt"].startswith("ran ") for request in training.take(9))
    assert all(request.columns["prompt"].startswith("the ") for request in held_out.first(9))


# Prompts without signal


def skipping(folder, tokenizer, n=4, skip=2, **data) -> PromptStream:
    return streams(folder, tokenizer, numbered(n), path="p.jsonl", skip_solved=skip, **data)[0]


def step(stream: PromptStream, flat: set[int], n_prompts: int) -> dict[str, float]:
    """One step: the samples of rows in `flat` get one total, those of the others two."""
    requests = stream.take(n_prompts, 2)
    return stream.observe([(r.ordinal, 1.0 if r.columns["n"] in flat else float(r.k)) for r in requests])


def test_a_row_goes_after_so_many_visits_without_signal_in_a_row(folder, tokenizer):
    stream = skipping(folder, tokenizer)
    assert step(stream, {0}, 4) == {"data/epochs": 1, "data/no_signal_frac": 0.25, "data/rows_left_out": 0}
    assert step(stream, set(), 4)["data/rows_left_out"] == 0  # broken off: counts from the start again
    assert step(stream, {0, 1}, 4) == {"data/epochs": 3, "data/no_signal_frac": 0.5, "data/rows_left_out": 0}
    assert step(stream, {0}, 4)["data/rows_left_out"] == 1
    assert sorted(request.columns["n"] for request in stream.take(6)) == [1, 1, 2, 2, 3, 3]


def test_what_one_total_is(folder, tokenizer):
    """Sums of the same rewards in another order are one; a millionth of the size is the limit; one sample is none."""
    stream = skipping(folder, tokenizer, skip=1)
    (a, b, c, d) = (r.ordinal for r in stream.take(4))
    means = stream.observe([(a, 0.1 + 0.2), (a, 0.3), (b, 1000.0), (b, 1000.01), (c, 5.0), (d, -2e3), (d, -2e3 + 1e-3)])
    assert means == {"data/epochs": 1, "data/no_signal_frac": 2 / 3, "data/rows_left_out": 2}


def test_without_the_key_nothing_is_left_out_and_the_share_is_measured(folder, tokenizer):
    stream = streams(folder, tokenizer, numbered(4), path="p.jsonl")[0]
    for _ in range(3):
        assert step(stream, {0, 1, 2, 3}, 4)["data/no_signal_frac"] == 1.0
    assert stream.state == {"position": 12}
    assert stream.observe([(11, 1.0)]) == {"data/epochs": 3}


def test_epochs_count_what_was_trained_on_and_not_what_was_drawn_ahead(folder, tokenizer):
    stream = streams(folder, tokenizer, numbered(4), path="p.jsonl")[0]
    stream.take(8)
    assert stream.observe([(0, 1.0), (1, 0.0)]) == {"data/epochs": 0.5}


def test_epochs_count_prompts_where_later_ones_are_trained_on_before_earlier_ones(folder, tokenizer):
    """Of 12 prompts that were taken 4 were trained on, the last of them among these."""
    stream = streams(folder, tokenizer, numbered(4), path="p.jsonl")[0]
    stream.take(12)
    assert stream.observe([(11, 1.0), (2, 0.0)], trained=4, oldest=0) == {"data/epochs": 1}


def test_the_order_of_an_epoch_is_kept_while_one_of_its_prompts_is_under_way(folder, tokenizer):
    """Prompt 1 of the second epoch is trained on after two of the third, whose rows have another order by then."""
    stream = streams(folder, tokenizer, numbered(4), path="p.jsonl", measure_difficulty=True, curriculum_epochs=9)[0]
    stream.take(4)
    stream.observe([(o, float(o)) for o in range(4)])
    row = [r.columns["n"] for r in stream.take(4)][1]
    stream.observe([(o, float(-o)) for o in (4, 6, 7)], trained=7, oldest=5)
    stream.take(4)
    stream.observe([(9, 0.0), (10, 5.0)], trained=9, oldest=5)
    other = streams(folder, tokenizer, numbered(4), path="p.jsonl", measure_difficulty=True, curriculum_epochs=9)[0]
    other.restore(json.loads(json.dumps(stream.state)))
    for it in (stream, other):
        assert it._columns[it.order.row_at(5)]["n"] == row
        it.observe([(5, 1.0), (8, 2.0)], trained=11, oldest=11)
        it.observe([(11, 1.0)], trained=12)
        with pytest.raises(AssertionError, match="kept no longer"):
            it.order.row_at(5)


def test_a_checkpoint_holds_all_that_the_next_prompts_depend_on(folder, tokenizer):
    """Saved at each of 12 steps, as JSON, by a stream that another one continues; in a mixture of classes."""

    def fresh() -> PromptStream:
        rows = numbered(9, kind="a") + numbered(4, 9, kind="b")
        return streams(folder, tokenizer, rows, path="p.jsonl", skip_solved=2, balance_column="kind")[0]

    def flat_at(i: int) -> set[int]:
        return {0, 3, 9, i % 13, (i * 5) % 13}

    def play(stream: PromptStream, steps: range) -> list:
        seen = []
        for i in steps:
            position = stream.position
            means = step(stream, flat_at(i), 7)
            rows = [stream.order.row_at(o) for o in range(position, position + 7)]
            seen.append((rows, means, json.dumps(stream.state)))
        return seen

    whole = play(fresh(), range(12))
    assert whole[-1][1]["data/rows_left_out"] >= 3
    for stop in range(1, 12):
        one, other = fresh(), fresh()
        play(one, range(stop))
        other.restore(json.loads(json.dumps(one.state)))
        assert play(other, range(stop, 12)) == whole[stop:]


def test_a_prompt_is_as_hard_as_it_was_beside_those_of_its_step(folder, tokenizer):
    """Two steps of two rows in each epoch. All rewards rise by 100 in between, as with a policy that learns: what
    decides is the difference within a step, so the worse row of each comes after both better ones."""
    stream = streams(folder, tokenizer, numbered(4), path="p.jsonl", measure_difficulty=True)[0]
    first = [r.columns["n"] for r in stream.take(2, 2)][::2]
    stream.observe([(0, 1.0), (0, 3.0), (1, 1.5), (1, 1.5)])  # means 2 and 1.5
    second = [r.columns["n"] for r in stream.take(2, 2)][::2]
    stream.observe([(2, 101.0), (2, 101.0), (3, 105.0), (3, 107.0)])  # means 101 and 106
    want = [second[1], first[0], first[1], second[0]]  # -2.5, -0.25, 0.25, 2.5
    other = streams(folder, tokenizer, numbered(4), path="p.jsonl", measure_difficulty=True)[0]
    other.restore(json.loads(json.dumps(stream.state)))
    for it in (stream, other):
        assert [r.columns["n"] for r in it.take(4)] == want


def test_a_step_may_lie_in_many_epochs_of_a_small_dataset(folder, tokenizer, tmp_path):
    """Two rows beside twenty, eight prompts of each a step; and a restart after every step changes no row."""
    paths = {write(tmp_path / "a.jsonl", numbered(2)): 1, write(tmp_path / "b.jsonl", numbered(20, 20)): 1}

    def fresh() -> PromptStream:
        return streams(folder, tokenizer, mixture=paths, measure_difficulty=True, curriculum_epochs=50)[0]

    def rows_of(stream: PromptStream) -> list[int]:
        asked = stream.take(16)
        stream.observe([(r.ordinal, float((r.columns["n"] * 7 + r.ordinal) % 11)) for r in asked])
        return [r.columns["n"] for r in asked]

    whole, halting = fresh(), fresh()
    for _ in range(12):
        want = rows_of(whole)
        again = fresh()
        again.restore(json.loads(json.dumps(halting.state)))
        halting = again
        assert rows_of(halting) == want
    assert len(whole.state["measured"]["epochs"]) < 12  # of each dataset those of one step


def test_skipping_wants_several_samples(folder):
    with pytest.raises(UserError, match="data.skip_solved = 1: one sample has no variance"):
        config.load(None, {"model.path": "g", "rewards.a.fn": "r.py:f", "data.path": "p.jsonl", "data.skip_solved": 1})


# What is found before torch is imported


def test_early_checks_read_every_dataset_and_give_the_columns(folder, tmp_path):
    paths = {write(tmp_path / f"{c}.jsonl", numbered(20, kind=c)): 1 for c in "ab"}
    cfg = configured(folder, mixture=paths, balance_column="kind", difficulty_column="n", eval_frac=0.3)
    assert early.refuse_prompts(cfg, None) == {"n", "kind", "dataset"}
    assert early.refuse_prompts(configured(folder, mixture=paths, augment="a.py:f"), None) is None
    rows, places = load_training_rows(cfg.data)
    assert (len(rows), str(places[25])) == (40, "data.mixture b: row 6")
