"""One update on one stored batch, under whatever launch this is started: rank 0 writes what came of it as JSON.

    accelerate launch --config_file launch/accelerate/zero2.yaml tests/e2e/stored_batch.py OUT '{"model": ...}'

A case is a micro-batch size, epochs and mini-batches of the update, and how the rows are shared out over the ranks.
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from launch import cluster  # noqa: E402

cluster.prepare_environment()

import tiny_models  # noqa: E402
from core.config import load  # noqa: E402
from launch import learners  # noqa: E402
from rollout.engines.transformers_engine import TransformersEngine  # noqa: E402
from trainer import engine_weights  # noqa: E402
from trainer.batch import TrainBatch  # noqa: E402
from trainer.learner import Learner  # noqa: E402
from trainer.loop import credit  # noqa: E402

N = 12


def configured(case: dict) -> object:
    return load(
        None,
        {
            **tiny_models.LEARNER_SETTINGS,
            "rollout.batch_size": N,
            "ppo.mini_batch_size": case.get("mini", N),
            "ppo.micro_batch_size": case["micro"],
            "ppo.ppo_epochs": case.get("epochs", 1),
            "optim.lr": 1e-3,
            "run.steps": case.get("steps", 100),
            "optim.max_grad_norm": case.get("max_grad_norm", 1e9),
            "resources.device": "cpu",
            "resources.collective_timeout_s": 120,
            "run.deterministic": True,
        },
        folder=ROOT,
    )


def gradients(it: Learner) -> dict[str, list[float]]:
    """Of the first step, whole, from AdamW's first moment: exp_avg = (1 - beta1) * gradient."""
    if hasattr(it._optimizer.optimizer, "bit16_groups") or hasattr(it._optimizer.optimizer, "fp16_groups"):  # ZeRO
        from deepspeed.utils import safe_get_full_optimizer_state as full

        moments = {name: full(p, "exp_avg") for name, p in it.policy.named_parameters()}
    else:
        moments = {name: it._optimizer.optimizer.state[p]["exp_avg"] for name, p in it.policy.named_parameters()}
    return {name: (x.float() / (1 - it.cfg.optim.betas[0])).flatten().tolist() for name, x in moments.items()}


def main(out: Path, task: dict) -> None:
    name, results = task["model"], []
    stop = tuple(range(30))  # many, so that lengths differ
    engine = TransformersEngine(tiny_models.make_model(name), stop, temperature=1.0, max_new_tokens=16)
    trajectories = tiny_models.roll_out(engine, N)
    with ExitStack() as stack:
        accelerator, ranks = learners.join(configured(task["cases"][0]), stack, print)
        for case in task["cases"]:
            cfg = configured(case)
            bounds = [sum(case["shards"][:i]) for i in range(ranks.size + 1)] if ranks.size > 1 else [0, N]
            mine = trajectories[bounds[ranks.index] : bounds[ranks.index + 1]]
            it = Learner(cfg, accelerator, tiny_models.make_model(name), tiny_models.make_model(name), ranks)
            batch, before = it.annotate(TrainBatch.collate(mine, ["a"]))
            batch = credit(cfg, batch.fill(token_rewards=batch.component_rewards["a"].float()), 0.02, ranks.sum)
            means = it.update(batch)
            parameters = {n: p.detach().flatten().tolist() for n, p in engine_weights.whole_parameters(it.policy)}
            results.append(
                {"case": case, "means": before | means, "gradients": gradients(it), "parameters": parameters}
            )
        if ranks.is_main:
            kind = accelerator.distributed_type.value
            out.write_text(json.dumps({"ranks": ranks.size, "engine": kind, "results": results}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
