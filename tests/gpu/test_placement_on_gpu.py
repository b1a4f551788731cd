"""Workers sit on the GPU that the plan says, by CUDA's own identity of it. Skipped where there is no CUDA device.

python -m pytest tests/gpu        # this file needs Ray, and two GPUs for its second test
"""

from pathlib import Path

import pytest
import torch

import tiny_models
from core.config import load
from core.schema import Config
from launch import build, cluster
from trainer.ranks import Ranks

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def configured(folder: Path, **rollout: object) -> Config:
    tiny_models.save_model(folder / "model", "gpt2")
    (folder / "prompts.jsonl").write_text('{"prompt": "the cat"}\n')
    values = {"model.path": f"{folder}/model", "data.path": f"{folder}/prompts.jsonl", "rewards.a.fn": "r.py:f"}
    return load(None, values | {f"rollout.{name}": value for name, value in rollout.items()})


def identity(worker: object) -> str:
    """UUID of the GPU that the engine of a worker (an actor, or None for this process's cuda:0) computes on."""
    if worker is None:
        return str(torch.cuda.get_device_properties(0).uuid)

    def look(self) -> str:
        return str(torch.cuda.get_device_properties(self._device).uuid)

    return ray.get(worker.__ray_call__.remote(look), timeout=120)


def of_workers(cfg: Config) -> list[str]:
    from launch.reservation import seats_of_run

    cluster.prepare_environment()
    with cluster.ray_session(cfg):
        seats = seats_of_run(cfg, Ranks(), torch.device("cuda", 0), print)
        workers = build.rollouts(cfg, build.load_tokenizer(cfg.model.path), "cuda", print, seats=seats)
        try:
            workers.wait_ready()
            return [identity(slot.actor) for slot in workers._group._slots]
        finally:
            workers.close()


def test_workers_beside_the_learner_compute_on_its_gpu(tmp_path):
    assert of_workers(configured(tmp_path, workers=2)) == [identity(None)] * 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_workers_apart_compute_on_another(tmp_path):
    assert identity(None) not in of_workers(configured(tmp_path, workers=2, placement="apart"))
