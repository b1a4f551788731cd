"""Credit: the parts of an advantage are its whole, for every estimator, and each is what was paid later."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import tiny_models
from core import config, ledger_table
from core.combine import Combined, RunningMoments
from core.trajectory import PromptRequest, Trajectory, sample_uid
from trainer import credit, loop
from trainer.batch import TrainBatch
from trainer.estimators import RETURNS
from trainer.ledger import Recorded, table_of

N, T = 3, 7  # samples of a prompt, tokens of the longest response
WEIGHTS = {"quality": 1.0, "coverage": 0.5, "slot_error": 0.0}


def rows(prompts: int) -> list[Trajectory]:
    """Responses of 1 to T tokens; the third token of every other one is an environment's."""
    rng, out = np.random.default_rng(0), []
    for i in range(prompts * N):
        length = 1 + i % T
        ids = rng.integers(1, 300, length)
        mask = np.ones(length, dtype=bool)
        mask[2 : 3 if i % 2 else 2] = False
        raw = {name: np.where(mask, rng.normal(size=length), 0.0) for name in WEIGHTS}
        request = PromptRequest(
            ordinal=i // N,
            k=i % N,
            sample_uid=sample_uid("c", i // N, i % N),
            prompt_ids=np.array([5, 6]),
            columns={},
            seed=0,
        )
        out.append(
            Trajectory(
                request=request,
                response_ids=ids,
                rollout_logprobs=-rng.random(length).astype(np.float32),
                action_mask=mask,
                token_offsets=np.zeros((length, 2), dtype=np.int64),
                policy_version=np.zeros(length, dtype=np.int64),
                finish_reason="length" if i % 4 == 0 else "stop",
                finished_at=0.0,
                component_rewards=raw,
                component_mask={name: mask for name in WEIGHTS},
            )
        )
    return out


def step(tokenizer, **overrides: object) -> tuple[pa.Table, dict, config.Config]:
    """What the loop makes of random rewards and values, as the ledger keeps it: (rows, said, configuration)."""
    values = {"rollout.n_samples_per_prompt": N, "rollout.batch_size": 12, "ppo.kl_coef": 0.1, "ppo.gamma": 0.9}
    values |= {"rollout.chunk_size": 12, "ppo.mini_batch_size": 12, "ppo.micro_batch_size": 12}
    cfg = config.load(Path("configs/cards.yaml"), values | overrides)
    trajectories = rows(4)
    batch = TrainBatch.collate(trajectories)
    mask, rng = batch.response_mask, torch.Generator().manual_seed(1)

    def random() -> torch.Tensor:
        return torch.where(mask, torch.randn(mask.shape, generator=rng), 0.0)

    normalized = {name: x.double() for name, x in batch.component_rewards.items()}
    weighted = {name: WEIGHTS[name] * x for name, x in normalized.items()}
    token_rewards = sum(weighted.values()).float()
    batch = batch.fill(
        old_logprobs=-random().abs(),
        ref_logprobs=-random().abs(),
        values=random(),
        bootstrap_values=torch.where(batch.cut, torch.randn(len(batch), generator=rng), 0.0),
        token_rewards=token_rewards,
        normalized_rewards=normalized,
    )
    running = {RETURNS: RunningMoments(count=10, mean=1.0, squares=40.0)} if cfg.ppo.scale_values != "none" else {}
    before = {"kl_coef": 0.1, "running": {name: vars(x).copy() for name, x in running.items()}}
    report: dict[str, float] = {}
    batch = loop.credit(cfg, batch, 0.1, lambda sums: sums, weights=WEIGHTS, running=running, report=report)
    recorded = Recorded(
        trajectories=trajectories,
        batch=batch,
        new_logprobs=batch.old_logprobs,
        normalized=Combined(token_rewards=token_rewards, normalized=normalized, weighted=weighted).normalized,
        weighted=weighted,
        said={"step": 1, "weights": WEIGHTS, "before": before, "credit": report},
    )
    table = table_of(recorded, cfg, tokenizer)
    return table, json.loads(table.schema.metadata[ledger_table.STEP_KEY]), cfg


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.make_tokenizer()


CASES = {
    "gae": {},
    "gae, plain": {"ppo.whiten_advantages": False},
    "gae, everything on": {
        "ppo.scale_rewards": "batch",
        "ppo.scale_values": "running",
        "ppo.bootstrap_cut": True,
        "ppo.lambda_alpha": 0.4,
    },
    "reinforce_pp": {"ppo.estimator": "reinforce_pp"},
    "rloo": {"ppo.estimator": "rloo"},
    "grpo": {"ppo.estimator": "grpo"},
    "grpo, scaled and whitened": {
        "ppo.estimator": "grpo",
        "ppo.scale_rewards": "batch",
        "ppo.whiten_advantages": True,
    },
}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_the_parts_are_the_advantage_that_the_losses_read(overrides, tokenizer):
    table, said, cfg = step(tokenizer, **overrides)
    kept = credit.padded(table, "advantages").numpy()
    assert np.abs(kept).max() > 0.5
    found = credit.split(table, said, cfg)
    assert [c.uid for c in found] == table["sample_uid"].to_pylist()
    for c, advantages in zip(found, kept, strict=True):
        np.testing.assert_allclose(c.advantages, advantages[: len(c.mask)], atol=2e-6)
        assert "slot_error" not in c.parts and {"quality", "coverage", "kl"} <= set(c.parts)
        for name in c.rewards:
            for t in range(len(c.mask)):
                paid = c.paid(name, t)
                assert paid.sum() == pytest.approx(c.parts[name][t], abs=1e-9)
                assert not paid[:t].any() and not paid[~c.mask].any()


def test_by_hand():
    """gamma lambda 1/2 over three tokens, the second of an environment: the third is one step after the first."""
    c = credit.Credit(
        uid="a",
        mask=np.array([True, False, True]),
        parts={"q": np.array([3.0, 0.0, 4.0]), "kl": np.array([-1.0, 0.0, 0.0])},
        rewards={"q": np.array([1.0, 9.0, 4.0]), "kl": np.array([-1.0, 0.0, 0.0])},
        carry=0.5,
    )
    assert c.advantages.tolist() == [2.0, 0.0, 4.0]
    assert c.paid("q", 0).tolist() == [1.0, 0.0, 2.0] and c.paid("q", 2).tolist() == [0.0, 0.0, 4.0]
    assert c.paid("q", 1).tolist() == [0.0, 0.0, 0.0]


def test_a_component_that_nobody_paid_gets_no_credit_and_the_critic_only_where_there_is_one(tokenizer):
    table, said, cfg = step(tokenizer)
    assert set(credit.split(table, said, cfg)[0].parts) == {"quality", "coverage", "kl", "critic", "mean"}
    table, said, cfg = step(tokenizer, **CASES["rloo"])
    assert set(credit.split(table, said, cfg)[0].parts) == {"quality", "coverage", "kl", "others"}
