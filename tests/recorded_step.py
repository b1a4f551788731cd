"""A step as a ledger has it, of random responses, rewards and values: what the loop makes of them, by its own code."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from core import config, ledger_table
from core.combine import Combined, RunningMoments
from core.trajectory import PromptRequest, Trajectory, sample_uid
from trainer import loop
from trainer.batch import TrainBatch
from trainer.estimators import RETURNS
from trainer.ledger import Recorded, table_of

N, T = 3, 7  # samples of a prompt, tokens of the longest response
WEIGHTS = {"consistency": 0.0, "quality": 1.0, "coverage": 0.5, "slot_error": 0.0}


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
    before = {"kl_coef": 0.1, "multipliers": {}, "running": {name: vars(x).copy() for name, x in running.items()}}
    report: dict[str, float] = {}
    batch = loop.credit(cfg, batch, 0.1, lambda sums: sums, weights=WEIGHTS, running=running, report=report)
    recorded = Recorded(
        trajectories=trajectories,
        batch=batch,
        new_logprobs=batch.old_logprobs,
        normalized=Combined(token_rewards=token_rewards, normalized=normalized, weighted=weighted).normalized,
        weighted=weighted,
        said={
            "step": 1,
            "rank": 0,
            "ranks": 1,
            "fraction": 1.0,
            "weights": WEIGHTS,
            "before": before,
            "credit": report,
        },
    )
    table = table_of(recorded, cfg, tokenizer)
    return table, json.loads(table.schema.metadata[ledger_table.STEP_KEY]), cfg
