"""Evaluate a finished run: its weights on rollout workers, its rewards, held-out prompts; the code path of training."""

from contextlib import ExitStack
from pathlib import Path

import torch

from core.config import load
from core.faults import UserError
from launch import build, cluster, early, environment, interpreter
from launch.reservation import reserve
from trainer.evaluate import summary_of
from trainer.loop import evaluate
from trainer.ranks import Ranks

# Where a run had GPUs and there are none now.
WITHOUT_GPUS = {
    "rollout.placement": "colocated",
    "rollout.gpus_per_worker": None,
    "rollout.gpu_memory": None,
    "rollout.sleep": False,
    "resources.reward_gpus": 0,
    "resources.reward_placement": "colocated",
}


def evaluate_run(run: Path, *, weights: str, data: str | None) -> dict[str, float]:
    """Means per response, as summary.json names them. See tokenppo.evaluate."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"RUN = {run}: there is no run in this folder (no config.yaml)")
    overrides: dict[str, object] = {} if data is None else {"data.eval_path": data, "data.eval_frac": 0}
    if weights != "base":
        overrides["model.path"] = str((run / weights).absolute())
        if not (run / weights).is_dir():
            raise UserError(f"--weights {weights}: {run / weights} does not exist")
    if not torch.cuda.is_available() and load(run / "config.yaml", overrides).resources.ray_address is None:
        overrides |= WITHOUT_GPUS
    cfg = load(run / "config.yaml", overrides)
    if not cfg.data.has_held_out:
        raise UserError("data.eval_path = null: this run has no held-out prompts; name some with --data")
    early.check_rewards(cfg)
    environment.check(cfg)
    interpreter.refuse(cfg, None)
    cluster.prepare_environment()
    tokenizer = build.load_tokenizer(cfg.model.path)
    _, held_out = build.prompt_streams(cfg, tokenizer)
    with ExitStack() as stack:
        stack.enter_context(cluster.ray_session(cfg))
        device = cluster.device(cfg)
        seats = reserve(cfg, device, [], 1)
        group = build.rollouts(cfg, tokenizer, device, print, seats=seats)
        stack.callback(group.close)
        rewards = build.reward_client(cfg, None, print, seats=seats)
        stack.callback(rewards.close)
        rewards.wait_ready()
        group.wait_ready()
        return summary_of(evaluate(cfg, held_out, group, rewards, Ranks(), version=None))
