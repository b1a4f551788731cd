"""What an update does besides the loss of the responses: leaving the epochs early, texts mixed in, the schedule."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn import functional as F

import tiny_models
from core.config import load
from core.faults import UserError
from launch import build
from rollout.engines.transformers_engine import TransformersEngine
from trainer.batch import TrainBatch
from trainer.learner import Learner
from trainer.loop import credit

N = 12


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def learner(texts: list[np.ndarray] | None = None, **options: object) -> tuple[Learner, TrainBatch]:
    settings = {"rollout.batch_size": N, "ppo.mini_batch_size": 6, "ppo.micro_batch_size": 4, "ppo.ppo_epochs": 3}
    cfg = load(None, tiny_models.LEARNER_SETTINGS | settings | options, folder=Path("/nowhere"))
    it = Learner(
        cfg,
        Accelerator(cpu=True),
        tiny_models.make_model("llama-tied"),
        tiny_models.make_model("llama-tied"),
        texts=texts,
    )
    engine = TransformersEngine(
        tiny_models.make_model("llama-tied"), tuple(range(30)), temperature=1, max_new_tokens=12
    )
    batch, _ = it.annotate(TrainBatch.collate(tiny_models.roll_out(engine, N)))
    return it, credit(cfg, batch.fill(token_rewards=batch.component_rewards["a"].float()), 0.02, it.ranks.sum)


def steps_taken(it: Learner) -> int:
    return int(next(iter(it._optimizer.optimizer.state.values()))["step"])


def test_epochs_end_when_the_policy_has_moved_too_far():
    """A rate that moves the policy: three epochs of two steps without the bound, fewer with one that a move passes."""
    it, batch = learner(**{"optim.lr": 3e-3})
    assert it.update(batch)["ppo/epochs"] == 3 and steps_taken(it) == 6
    it, batch = learner(**{"optim.lr": 3e-3, "ppo.stop_kl": 1e-9})
    epochs = it.update(batch)["ppo/epochs"]
    assert epochs < 3 and steps_taken(it) == 2 * epochs
    it, batch = learner(**{"optim.lr": 0.0, "ppo.stop_kl": 1e-3})
    assert it.update(batch)["ppo/epochs"] == 3


def test_the_rate_of_a_step_does_not_depend_on_epochs_that_were_left_out():
    """Else a run that goes on from a checkpoint, which knows the step alone, would have another rate than one that went
    through: six optimizer steps a step, ten steps, so the second begins at 1 - 6 / 60."""
    it, batch = learner(**{"optim.lr": 1e-3, "run.steps": 10, "ppo.stop_kl": 1e-9, "run.checks": False})
    for first in (0, 6):
        means = it.update(batch)
        assert means["ppo/epochs"] < 3
        assert means["optim/lr"] == pytest.approx(1e-3 * (1 - (first + 2 * means["ppo/epochs"] - 1) / 60))


def test_texts_are_mixed_in_with_their_mean_loss_per_token():
    """Advantages and returns at 0: what moves the weights is ptx_coef times the LM loss, by AdamW's first moment."""
    texts = [np.array([5, 6, 7, 8]), np.array([9, 10])]
    options = {"ppo.ptx_coef": 0.5, "data.ptx_path": "t.jsonl", "ppo.ppo_epochs": 1, "ppo.mini_batch_size": N}
    it, batch = learner(texts, **options, **{"optim.max_grad_norm": 1e9})
    chosen, n_tokens = it._texts_of_step()
    assert len(chosen) == N and set(chosen.tolist()) == {0, 1}  # drawn with repetition, as many as responses
    still = {name: torch.zeros_like(getattr(batch, name)) for name in ("advantages", "returns", "values")}
    for name, x in still.items():
        getattr(batch, name).copy_(x)
    means = it.update(batch)
    oracle = tiny_models.make_model("llama-tied")
    losses = []
    for x in map(torch.tensor, texts):
        losses.append(F.cross_entropy(oracle(input_ids=x[None]).logits[0, :-1], x[1:], reduction="sum"))
    total = sum(losses[i] for i in chosen)
    assert n_tokens == sum(len(texts[i]) - 1 for i in chosen)
    assert means["loss/ptx"] == pytest.approx(float(total.detach()) / n_tokens, rel=1e-5)
    (0.5 * total / n_tokens).backward()
    wanted = {name: p.grad for name, p in oracle.named_parameters()}
    for name, p in it.policy.lm.named_parameters():
        got = it._optimizer.optimizer.state[p]["exp_avg"] / (1 - it.cfg.optim.betas[0])
        torch.testing.assert_close(got, wanted[name], atol=1e-6, rtol=1e-4)


def test_texts_come_from_the_column_text_with_eos_and_in_pieces_that_fit(tmp_path):
    """A window of 3 + 2 tokens: seven ids and eos are two pieces; one token alone predicts nothing and is left out."""
    folder = tiny_models.save_model(tmp_path / "m")
    tokenizer = tiny_models.make_tokenizer()
    file = tmp_path / "texts.jsonl"

    def read(*rows: dict) -> list[list[int]]:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"model.path": str(folder), "data.ptx_path": str(file), "ppo.ptx_coef": 1.0}
        sizes = {"data.max_prompt_tokens": 3, "rollout.max_new_tokens": 2}
        return [x.tolist() for x in build.texts(load(None, tiny_models.LEARNER_SETTINGS | settings | sizes), tokenizer)]

    ids = tokenizer.encode("zyxwvut")
    assert len(ids) == 7
    assert read({"text": "zyxwvut"}, {"text": ""}) == [ids[:5], [*ids[5:], tokenizer.eos_token_id]]
    with pytest.raises(UserError, match="row 2 has no text in `text`"):
        read({"text": "a"}, {"prompt": "b"})
    with pytest.raises(UserError, match="no text of two tokens"):
        read({"text": ""})
