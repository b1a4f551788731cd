"""`tokenppo eval`: what cannot work is said in one line before anything is started."""

import json
from pathlib import Path

import pytest
import yaml

import tiny_models
from core.faults import UserError
from launch import cli
from launch.evaluate import evaluate

REWARDS = "def vowels(completions, **_):\n    return [float(sum(c in 'aeiou' for c in text)) for text in completions]\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a run `first` as training leaves it, and beside it a model of another vocabulary."""
    place = tmp_path_factory.mktemp("eval")
    base = tiny_models.save_model(place / "base", "llama-tied")
    tiny_models.save_model(place / "first" / "final", "llama-tied", seed=1)
    other = tiny_models.save_model(place / "other", "llama-tied")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["quux"])
    tokenizer.save_pretrained(other)
    (place / "empty").mkdir()
    rows = [{"prompt": "the cat sat", "kind": "a", "facts": []}, {"prompt": "the dog ran", "kind": "b", "facts": []}]
    (place / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "rewards.py").write_text(REWARDS)
    config = {
        "model": {"path": str(base), "dtype": "float32"},
        "data": {"path": str(place / "p.jsonl"), "eval_path": str(place / "p.jsonl")},
        "rollout": {"max_new_tokens": 8},
        "rewards": {"vowels": {"fn": f"{place / 'rewards.py'}:vowels"}},
    }
    (place / "first" / "config.yaml").write_text(yaml.safe_dump(config))
    return place


@pytest.mark.parametrize(
    ("policy", "settings", "words"),
    [
        ("frist", {}, "POLICY = frist: there is no such folder; did you mean first"),
        ("first", {"weights": "best"}, "--weights best: first/best does not exist"),
        ("first/final", {"weights": "base"}, "--weights base: first/final is a model"),
        ("empty", {}, "empty: neither a run .* nor a model"),
        ("base", {}, "a model has neither prompts nor rewards; say which with --config"),
        ("base", {"config": "first/config.yaml", "against": "best"}, "--against best: names weights of a run"),
        ("first", {"against": "./bse"}, "--against = ./bse: there is no such folder; did you mean base"),
        ("first", {"require": ["reward/totl > base"]}, "no number reward/totl; did you mean reward/total"),
        ("first", {"require": ["win_rate > 0.5"]}, "wants another policy; name it with --against"),
        ("first", {"require": ["reward/total > against"]}, "wants another policy"),
        ("first", {"against": "base", "require": ["reward/total >> base"]}, "wants NAME OP NUMBER"),
        ("first", {"against": "other", "require": ["reward/total > base"]}, "with --against other; write `against`"),
        ("first", {"against": "other"}, "other: has another vocabulary than .*base"),
        ("first", {"metric": "-slot_eror"}, "--metric -slot_eror: there is no number of that name"),
        ("first", {"by": "knd"}, "--by knd: .*did you mean kind"),
        ("first", {"samples": 0}, "--samples 0"),
        ("first", {"prompts": 0}, "data.eval_prompts = 0"),
        ("first", {"data": "absent.jsonl"}, "absent.jsonl: there is no such file"),
    ],
)
def test_what_cannot_work_is_one_line(runs, monkeypatch, policy, settings, words):
    monkeypatch.chdir(runs)
    with pytest.raises(UserError, match=words) as caught:
        evaluate(policy, **settings)
    assert "\n" not in str(caught.value)


def test_a_bad_expression_is_exit_2(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    assert cli.main(["eval", "first", "--require", "reward/total > bsae"]) == UserError.exit_code
    said = capsys.readouterr()
    assert said.out == "" and "did you mean base?" in said.err and said.err.count("\n") == 1
    assert cli.main(["evaluate", "first"]) == UserError.exit_code
    assert "no such verb; did you mean eval?" in capsys.readouterr().err
