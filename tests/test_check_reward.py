"""tokenppo check-reward: each way to be unsound is found and named, a sound function passes, warnings fail nothing."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from core.faults import UserError
from launch import cli
from launch.check_reward import SAMPLES, samples
from launch.heat_map import heat_map
from reward_server.check import check, take, with_another_end
from reward_server.components import Component
from reward_server.placing import Span
from reward_server.texts import words


def finding(fn, name: str, options=None, request=None):
    report = check(Component("c", fn, options), request or samples(None, None))
    (found,) = [f for f in report.findings if f.name == name]
    return report, found


def exclamations(completions, **_):
    return [[Span(i, i + 1, -1.0) for i, c in enumerate(text) if c == "!"] for text in completions]


def test_a_sound_function_is_sound_in_all():
    report = check(Component("c", exclamations), samples(None, None))
    assert report.sound and all(f.ok for f in report.findings) and len(report.findings) == 7
    # counted by hand: three in "GIVE ME THE SALT NOW!!!", four in the greetings
    n_tokens = sum(len(r[0]) for r in report.rewards)
    assert report.numbers["nonzero_share"] == pytest.approx(7 / n_tokens)
    assert (report.numbers["least"], report.numbers["largest"], report.numbers["applies_share"]) == (-1, 0, 1)


calls = itertools.count()


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (lambda completions: [float("nan")] * len(completions), "shape and numbers"),
        (lambda completions: [1.0], "shape and numbers"),
        (lambda completions: [[1.0]] * len(completions), "shape and numbers"),
        (lambda completions: [float(next(calls))] * len(completions), "deterministic"),
        (lambda completions: [float(len(completions))] * len(completions), "independent of the batch"),
        (lambda completions: [float(i) for i, _ in enumerate(completions)], "independent of order"),
        (lambda completions: [float(max(map(len, completions)))] * len(completions), "independent of padding"),
        (lambda completions: [1.0 if len(completions) > 1 else None] * len(completions), "independent of the batch"),
    ],
)
def test_each_way_to_be_unsound_is_named(fn, name):
    report, found = finding(fn, name)
    assert found.ok is False and not report.sound


def test_looking_ahead_is_a_warning_that_names_a_token():
    def ahead(completions, completion_ids):
        return [[float(len(text))] * len(ids) for text, ids in zip(completions, completion_ids, strict=True)]

    report, found = finding(ahead, "causal")
    assert report.sound and found.ok is False and "token 0 of sample 0 has 55" in found.says


def test_a_reward_of_what_was_said_before_is_causal():
    def so_far(completion_ids):
        return [[float(t) for t, _ in enumerate(ids)] for ids in completion_ids]

    assert finding(so_far, "causal")[1].ok is True


def test_paid_length_is_a_warning():
    report, found = finding(lambda completion_ids: [float(len(ids)) for ids in completion_ids], "pays no length")
    assert report.sound and found.ok is False and "+1.00" in found.says


def test_another_end_keeps_what_comes_before_it():
    request = samples(None, None)
    for i in range(len(request)):
        cut, other = with_another_end(request, i)
        if other is None:
            continue
        text, was = other.completions[0], request.completions[i]
        at = int(request.offsets[i][cut, 0])
        assert text[:at] == was[:at] and text != was
        assert (other.completion_ids[0][:cut] == request.completion_ids[i][:cut]).all()
        assert (other.offsets[0][:cut] == request.offsets[i][:cut]).all()
        spans = other.offsets[0]
        assert spans[-1, 1] == len(text) and (np.diff(spans[:, 0]) >= 0).all()
    assert take(request, [3, 1]).uids == ["3", "1"]


def test_words_cover_the_text():
    for _, text in SAMPLES:
        ids, offsets = words(text)
        assert len(ids) == len(offsets) and "".join(text[a:b] for a, b in offsets) == text


def test_a_heat_map_shows_every_character_once_and_numbers_for_the_rest():
    offsets = np.array([[0, 1], [1, 2], [1, 2], [2, 3], [3, 3]])
    text = heat_map("a\u00e9\n", offsets, np.array([1.0, -0.5, -0.5, 0.0, 2.0]), 2.0)
    assert text.plain == "a\u00e9\\n[+2]"
    # 60 + 150 * share: green for 1 of 2, red for the two halves of the character together, full green for the stop
    assert [str(span.style) for span in text.spans] == [
        "white on rgb(0,135,0)",
        "white on rgb(135,0,0)",
        "black on rgb(0,210,0)",
    ]


class TestCommand:
    @pytest.fixture
    def here(self, tmp_path, monkeypatch) -> Path:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "my.py").write_text(
            "def polite(completions, **_):\n    return [1.0 if 'please' in c else None for c in completions]\n"
            "def nothing(completions):\n    return [float('inf')] * len(completions)\n"
            "def right(completions, answer, scale=1.0):\n"
            "    return [scale * (a in c) for c, a in zip(completions, answer)]\n"
        )
        return tmp_path

    def test_exit_codes_and_words(self, here, capsys):
        assert cli.main(["check-reward", "my.py:polite"]) == 0
        assert "my.py:polite: sound" in capsys.readouterr().out
        assert cli.main(["check-reward", "my.py:nothing"]) == 4
        assert "NOT sound" in capsys.readouterr().out
        assert cli.main(["check-reward", "my.py:polit"]) == 2
        assert "did you mean `polite`?" in capsys.readouterr().err

    def test_columns_come_from_the_data_and_options_from_the_line(self, here, capsys):
        assert cli.main(["check-reward", "my.py:right"]) == 2
        assert "wants answer" in capsys.readouterr().err
        rows = [{"prompt": "2+2", "completion": f"it is {n}", "answer": "4"} for n in (3, 4, 44)]
        (here / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        line = ["check-reward", "my.py:right", "--data", "d.jsonl", "--options", "{scale: 0.5}", "--json"]
        assert cli.main(line) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["sound"] and [r["tokens"][-1] for r in report["rewards"]] == [0, 0.5, 0.5]

    def test_prompts_without_completions_lend_their_columns(self, here, capsys):
        (here / "d.jsonl").write_text('{"prompt": "2+2", "answer": "Paris"}\n')
        assert cli.main(["check-reward", "my.py:right", "--data", "d.jsonl", "--json"]) == 0
        sums = [sum(r["tokens"]) for r in json.loads(capsys.readouterr().out)["rewards"]]
        assert sums == [float("Paris" in text) for _, text in SAMPLES]

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            (["--data", "none.jsonl"], "there is no such file"),
            (["--options", "scale"], "wants a YAML mapping"),
            (["--options", "{skale: 1}"], "did you mean `scale`?"),
            (["--model", "nowhere/at/all"], "no tokenizer loads"),
        ],
    )
    def test_bad_input_is_one_line(self, here, capsys, line, says):
        assert cli.main(["check-reward", "my.py:right", *line]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1

    def test_tokens_of_a_model(self, here, capsys):
        tiny_models.save_model(here / "model", "gpt2")
        (here / "d.jsonl").write_text('{"prompt": "a", "completion": "the cat sat"}\n')
        assert cli.main(["check-reward", "my.py:polite", "--model", "model", "--data", "d.jsonl", "--json"]) == 0
        (reward,) = json.loads(capsys.readouterr().out)["rewards"]
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(here / "model").encode("the cat sat", add_special_tokens=False)
        assert len(reward["tokens"]) == len(ids) + 1


def test_samples_that_are_no_rows_are_refused(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(UserError, match="each row wants"):
        samples(str(tmp_path / "d.jsonl"), None)
