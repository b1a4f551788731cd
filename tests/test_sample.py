"""`tokenppo sample`: the numbers of each token are those of the model and of the rewards, and nothing is made up."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import tiny_models
from core.faults import RewardFault, UserError
from launch.sample import sample_run

REWARDS = """
from tokenppo import Span

def vowels(completions, **_):
    return [[Span(i, i + 1, 0.5) for i, c in enumerate(text) if c in "aeiou"] for text in completions]

def brevity(completions, **_):
    return [-float(len(text)) for text in completions]

def graded(completions, answer, **_):
    return [float(a in text) for text, a in zip(completions, answer)]

def broken(completions, **_):
    raise RuntimeError("no \\x1b[2J today")
"""


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder as training leaves it, with other weights in `final` than in the base."""
    base = tiny_models.save_model(tmp_path / "base", "llama-tied")
    tiny_models.save_model(tmp_path / "runs" / "r" / "final", "llama-tied", seed=1)
    rows = [{"prompt": "the cat sat", "answer": "a"}, {"prompt": "the dog ran", "answer": "e"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARDS)
    return configured(tmp_path, base, vowels={"weight": 2.0}, brevity={"weight": 0.1}, graded={})


def configured(folder: Path, base: Path, *, rollout: dict | None = None, **components: dict) -> Path:
    config = {
        "model": {"path": str(base), "dtype": "float32"},
        "data": {"path": str(folder / "p.jsonl")},
        "rollout": {"max_new_tokens": 12, "temperature": 0.9} | (rollout or {}),
        "rewards": {name: {"fn": f"{folder / 'rewards.py'}:{name}"} | more for name, more in components.items()},
        "run": {"name": "r", "dir": str(folder / "runs")},
    }
    (folder / "runs" / "r" / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "runs" / "r"


def sampled(capsys, *args, **settings) -> dict:
    capsys.readouterr()
    assert sample_run(*args, as_json=True, device="cpu", **settings) == 0
    return json.loads(capsys.readouterr().out)


def test_every_number_of_a_token_is_that_of_the_model_and_of_the_rewards(run, capsys):
    got = sampled(capsys, run, n=3, compare="base")
    assert got["prompt"] == "the cat sat" and got["not_scored"] == {}
    assert got["component_weights"] == {"vowels": 2.0, "brevity": 0.1, "graded": 1.0}
    assert [(s["weights"], s["k"]) for s in got["samples"]] == [(w, k) for w in ("final", "base") for k in range(3)]
    prompt = tiny_models.make_tokenizer().encode("the cat sat")
    models = {"final": tiny_models.make_model("llama-tied", seed=1), "base": tiny_models.make_model("llama-tied")}

    def logprobs(model, ids):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.9
        return logits.log_softmax(-1)[range(len(ids)), ids]

    for sample in got["samples"]:
        tokens, text = sample["tokens"], sample["text"]
        ids = [token["id"] for token in tokens]
        np.testing.assert_allclose([t["logprob"] for t in tokens], logprobs(models[sample["weights"]], ids), atol=1e-5)
        if sample["weights"] == "final":
            np.testing.assert_allclose([t["base_logprob"] for t in tokens], logprobs(models["base"], ids), atol=1e-5)
        else:
            assert {t["base_logprob"] for t in tokens} == {None}
        assert all(token["text"] == text[token["start"] : token["end"]] for token in tokens)
        vowels, graded = 0.5 * sum(c in "aeiou" for c in text), float("a" in text)
        assert sample["components"] == pytest.approx({"vowels": vowels, "brevity": -len(text), "graded": graded})
        assert sample["reward"] == pytest.approx(2 * vowels - 0.1 * len(text) + graded)
        for token in tokens:
            parts = token["components"]
            assert token["reward"] == pytest.approx(2 * parts["vowels"] + 0.1 * parts["brevity"] + parts["graded"])
        assert sum(t["components"]["vowels"] for t in tokens) == pytest.approx(vowels)


def test_the_seed_decides(run, capsys):
    assert sampled(capsys, run, n=2, seed=3) == sampled(capsys, run, n=2, seed=3)
    texts = [[s["text"] for s in sampled(capsys, run, n=2, seed=seed)["samples"]] for seed in (3, 4)]
    assert texts[0] != texts[1] and texts[0][0] != texts[0][1]


def test_a_prompt_of_the_data_brings_its_columns_and_another_goes_without_what_wants_them(run, capsys):
    second = sampled(capsys, run, row=1)
    assert second["prompt"] == "the dog ran" and second["samples"] == sampled(capsys, run, "the dog ran")["samples"]
    other = sampled(capsys, run, "the mat")
    assert list(other["component_weights"]) == ["brevity", "vowels"]
    assert other["not_scored"] == {
        "graded": "it wants answer, which this prompt has not: take a row of the data with --row"
    }
    assert "graded" not in other["samples"][0]["components"]
    (run.parents[1] / "p.jsonl").unlink()  # the model is all that is left of the run
    assert sampled(capsys, run, "the mat") == other


def test_what_could_not_be_scored_has_no_number(run, capsys):
    configured(run.parents[1], run.parents[1] / "base", vowels={}, broken={})
    capsys.readouterr()
    assert sample_run(run, as_json=True, device="cpu") == RewardFault.exit_code
    (sample,) = json.loads(capsys.readouterr().out)["samples"]
    assert (
        sample["reward"] is None and sample["components"] == {} and "no \x1b[2J today" in sample["failures"]["broken"]
    )
    assert {token["reward"] for token in sample["tokens"]} == {None}
    assert sample_run(run, device="cpu") == RewardFault.exit_code
    shown = capsys.readouterr().out
    assert "not scored: broken" in shown and "\x1b[2J" not in shown


def test_a_run_that_was_written_otherwise_is_sampled_all_the_same(run, capsys):
    """In rounds, with GPUs that are not here, with filters: whose log-probs are over other ids than the base's are."""
    plain = sampled(capsys, run, max_new_tokens=6)
    there = {"round_tokens": 8, "extra_prompts": 4, "gpus_per_worker": 0.5, "placement": "apart"}
    configured(run.parents[1], run.parents[1] / "base", rollout=there, vowels={"weight": 2.0})
    again = sampled(capsys, run, max_new_tokens=6)
    assert [s["text"] for s in again["samples"]] == [s["text"] for s in plain["samples"]]
    configured(run.parents[1], run.parents[1] / "base", rollout={"top_k": 5}, vowels={})
    got = sampled(capsys, run, compare="base")
    assert {token["base_logprob"] for sample in got["samples"] for token in sample["tokens"]} == {None}


def test_the_page_shows_prompt_sums_and_text(run, capsys):
    (sample,) = sampled(capsys, run)["samples"]
    assert sample_run(run, device="cpu") == 0
    prompt, head, *text = capsys.readouterr().out.split("\n", 2)
    assert prompt == "the cat sat"
    head, text = text[0].split("\n", 1)
    assert head.startswith(f"final #0  {len(sample['tokens'])} tokens, {sample['finish_reason']}  reward ")
    assert f"vowels {2 * sample['components']['vowels']:+.3g}" in head
    assert sample["text"].split()[0] in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"row": 2}, "--row 2: there are 2 prompts"),
        ({"text": "the", "row": 0}, "--row 0: TEXT is given too"),
        ({"weights": "best"}, "--weights best: .* does not exist"),
        ({"component": "charm"}, "--component charm: the run has brevity, graded, vowels"),
        ({"text": "the mat", "component": "graded"}, "--component graded: it wants answer"),
    ],
)
def test_what_cannot_work_is_one_line(run, settings, words):
    with pytest.raises(UserError, match=words):
        sample_run(run, device="cpu", **settings)


def test_a_folder_without_a_run_is_none(tmp_path):
    with pytest.raises(UserError, match="there is no run in this folder"):
        sample_run(tmp_path)
