"""Another weight on a recorded step: the run's own comes out as it was, and directions are what they are said to be."""

import json
import math
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

import recorded_step
import tiny_models
from core import ledger_table
from core.config import to_yaml
from core.faults import UserError
from launch import cli, run_folder
from launch.reweight import Step, cosine, gradients, pareto, reweight
from trainer.model import load_causal_lm


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.make_tokenizer()


def a_run(folder: Path, tokenizer, **overrides: object) -> Path:
    """A run folder with a configuration and one recorded step."""
    table, said, cfg = recorded_step.step(tokenizer, **{"rollout.max_new_tokens": 8} | overrides)
    path = ledger_table.file_of(folder, 1, 0)
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(table, path)
    (folder / "config.yaml").write_text(to_yaml(cfg))
    return folder


WEIGHTS = {f"rewards.{name}.weight": weight for name, weight in recorded_step.WEIGHTS.items()}
CASES = {
    "gae": {},
    "scaled": {"ppo.scale_rewards": "batch", "ppo.scale_values": "running", "ppo.lambda_alpha": 0.4},
    "grpo": {"ppo.estimator": "grpo"},
}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_the_weights_of_the_run_give_the_advantages_of_the_ledger(overrides, tokenizer, tmp_path):
    run = a_run(tmp_path / "run", tokenizer, **WEIGHTS | overrides)
    told = reweight(run, {"rewards.quality.weight": 1.0})
    assert told["distance_to_ledger"] < 1e-6 and told["step"] == 1 and told["responses"] == 12
    (same,) = told["changed"]
    assert same["cosine_of_advantages"] == pytest.approx(1) and same["sign_changes"] == 0
    assert not told["tokens_changed_most"]
    assert reweight(run, {"rewards.quality.weight": 4.0})["changed"][0]["cosine_of_advantages"] < 0.999


def test_alone_is_what_a_component_gives_without_the_others(tokenizer, tmp_path):
    run = a_run(tmp_path / "run", tokenizer, **WEIGHTS | {"ppo.estimator": "reinforce_pp"})
    lone = {"rewards.coverage.weight": 0.0, "ppo.kl_coef": 0.0}
    (told,) = reweight(run, {"rewards.quality.weight": 3.0} | lone)["changed"]
    assert told["alone"]["quality"] == pytest.approx(1) and abs(told["alone"]["coverage"]) < 0.9
    assert told["share_of_reward"] == {"consistency": 0.0, "quality": 1.0, "coverage": 0.0, "slot_error": 0.0}
    grid = reweight(run, {"ppo.kl_coef": 0.0}, grid={"quality": [1, 2], "coverage": [2, 4]})["changed"]
    settings = [(x["weights"]["quality"], x["weights"]["coverage"]) for x in grid]
    assert settings == [(1, 2), (1, 4), (2, 2), (2, 4)]
    by = dict(zip(settings, grid, strict=True))
    assert by[1, 2]["alone"] == pytest.approx(by[2, 4]["alone"])  # whitened: only their ratio counts
    assert by[1, 4]["alone"]["coverage"] > by[1, 2]["alone"]["coverage"] > by[2, 2]["alone"]["coverage"]


def test_gradients_are_sums_of_advantage_times_gradient_of_logprob(tokenizer, tmp_path):
    tiny_models.save_model(tmp_path / "model")
    run = a_run(tmp_path / "run", tokenizer, **WEIGHTS | {"model.path": str(tmp_path / "model")})
    cfg = run_folder.configuration(run)
    step = Step.read(run, 1, cfg)
    direction = torch.where(step.batch.response_mask, torch.randn(step.batch.response_mask.shape), 0.0).double()
    (found,) = gradients(step, cfg, cfg.model.path, [direction])
    model = load_causal_lm(cfg.model.path, "cpu")
    total = 0.0
    for row in range(len(step.batch)):
        p, n = int(step.batch.prompt_lengths[row]), int(step.batch.response_lengths[row])
        start = step.batch.prompt_width - p
        ids = step.batch.input_ids[row, start : step.batch.prompt_width + n]
        logits = model(ids[None]).logits[0, p - 1 : -1] / cfg.rollout.temperature
        logprobs = torch.log_softmax(logits, -1)[torch.arange(n), ids[p:]]
        total = total + (direction[row, :n].float() * logprobs).sum()
    total.backward()
    wanted = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])
    assert cosine(found, wanted.double()) > 1 - 1e-9 and found.norm() == pytest.approx(float(wanted.norm()), rel=1e-5)


def test_pareto_keeps_what_nothing_beats():
    assert pareto([[1, 0], [0, 1], [0.5, 0.5], [0.4, 0.5], [1, 0]]) == [True, True, True, False, True]
    assert math.isnan(cosine(torch.zeros(2), torch.ones(2)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing to change; give --rewards.NAME.weight VALUE"),
        (["--rewards.polite.weight", "1"], "no such component, it has consistency, quality, coverage, slot_error"),
        (["--grid", "polite=1"], "no such component, it has consistency, quality, coverage, slot_error"),
        (["--grid", "quality=a"], "write NAME=WEIGHT,WEIGHT"),
        (["--optim.lr", "1"], "what can be changed is"),
        (["--step", "7", "--grid", "quality=1"], "nothing of step 7; it has steps 1 to 1"),
        (["--gradient", "best", "--grid", "quality=1"], "best does not exist"),
    ],
)
def test_mistakes(options, words, tokenizer, tmp_path, capsys):
    run = a_run(tmp_path / "run", tokenizer, **WEIGHTS)
    assert cli.main(["reweight", str(run), *options]) == UserError.exit_code
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_the_verb_shows_and_plots(tokenizer, tmp_path, capsys):
    run = a_run(tmp_path / "run", tokenizer, **WEIGHTS)
    out = tmp_path / "p.html"
    assert cli.main(["reweight", str(run), "--grid", "quality=0.5,2", "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert "12 responses" in said and "quality=0.5" in said and "all of the step" in said
    assert "cosine with quality alone" in out.read_text() and "http" not in out.read_text().split("<script")[0]
    assert cli.main(["reweight", str(run), "--rewards.quality.weight", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    most = told["tokens_changed_most"]
    assert most and abs(most[0]["after"] - most[0]["before"]) == max(abs(x["after"] - x["before"]) for x in most)
