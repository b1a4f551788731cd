"""What is submitted: a training command, the nodes that it wants, and who sits on which. Imports nothing heavy.

    Wanted by the user (configuration, nodes, GPUs of each)   ->  Job   ->  slurm.py | ray_job.py | kubernetes.py
                                                                  words of `tokenppo train`, lines that say the plan

Legend: of N nodes the first L have learner processes, one for each GPU (one, where there are no GPUs); rollout workers
(`rollout.workers` is their number in the whole cluster) and reward servers sit where launch/placement.py says.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import load
from core.faults import UserError
from core.schema import Config
from launch import arguments, early, placement


@dataclass(frozen=True, kw_only=True)
class Job:
    cfg: Config
    config: Path | None  # absolute; it is read again when the job starts
    words: tuple[str, ...]  # overrides, as they were written
    nodes: int
    learner_nodes: int  # the first ones
    gpus: int  # of each node
    cpus: int  # of each node
    accelerate: str  # name in launch/accelerate/, or an absolute path
    python: str  # interpreter on the nodes
    plan: tuple[str, ...]  # who sits where, a line each

    @property
    def name(self) -> str:
        return self.cfg.run.name

    @property
    def ranks(self) -> int:
        """Learner processes in all."""
        return self.learner_nodes * self.ranks_of_node

    @property
    def ranks_of_node(self) -> int:
        return max(1, self.gpus)

    def train(self, config: Path | None) -> list[str]:
        """The words behind `tokenppo train`, with the configuration where the nodes find it."""
        return [*(["--config", str(config)] if config else []), *self.words]

    @classmethod
    def of(
        cls,
        config: str | None,
        overrides: dict[str, Any],
        words: list[str],
        *,
        nodes: int,
        gpus: int,
        cpus: int,
        learner_nodes: int | None = None,
        accelerate: str | None = None,
        python: str = sys.executable,
    ) -> "Job":
        """`words`: as `overrides` were written. Raises UserError for what cannot work on such nodes."""
        for option, value, least in (("--nodes", nodes, 1), ("--gpus-per-node", gpus, 0), ("--cpus-per-node", cpus, 1)):
            if value < least:
                raise UserError(f"{option} {value}: wants a whole number of at least {least}")
        cfg = load(Path(config) if config else None, overrides)
        if cfg.resources.ray_address is not None:
            raise UserError("resources.ray_address: the job brings a Ray of its own, or is sent to one; leave it out")
        early.refuse_missing(cfg)
        learner_nodes, plan = seated(cfg, nodes, gpus, learner_nodes)
        ranks = learner_nodes * max(1, gpus)
        if accelerate is None:
            accelerate = "cpu" if ranks == 1 and not gpus else "gpu" if ranks == 1 else "ddp"
        file = arguments.accelerate_file(accelerate)
        short = file.stem if file.parent == arguments.ACCELERATE_FILES.absolute() else str(file)
        if ranks > 1 and short in ("cpu", "gpu"):
            raise UserError(
                f"--accelerate {short}: is for one learner process and there are {ranks}; take ddp or zero2"
            )
        return cls(
            cfg=cfg,
            config=Path(config).absolute() if config else None,
            words=tuple(words),
            nodes=nodes,
            learner_nodes=learner_nodes,
            gpus=gpus,
            cpus=cpus,
            accelerate=short,
            python=python,
            plan=(
                f"{nodes} node{'s' * (nodes > 1)}, each with {cpus} CPU cores and {gpus} GPUs",
                f"{ranks} learner process{'es' * (ranks > 1)} on the first {learner_nodes}; {cfg.rollout.workers}"
                " rollout workers in all",
                *plan,
            ),
        )


def seated(cfg: Config, nodes: int, gpus: int, learner_nodes: int | None) -> tuple[int, tuple[str, ...]]:
    """(Nodes with learners, who sits where). Raises UserError where there is no room, or no such number of nodes."""
    if learner_nodes is not None and not 1 <= learner_nodes <= nodes:
        raise UserError(f"--learner-nodes {learner_nodes}: of {nodes} node{'s' * (nodes > 1)}; give 1 to {nodes}")
    if not gpus:
        if cfg.resources.device == "cuda":
            raise UserError("resources.device = cuda: the nodes were asked for without GPUs; give --gpus-per-node")
        return learner_nodes or 1, ()
    if learner_nodes is None:
        learner_nodes = nodes
        if cfg.rollout.placement == "apart":
            workers = cfg.rollout.workers * (cfg.rollout.gpus_per_worker or cfg.rollout.tensor_parallel_size or 1)
            learner_nodes = max(1, nodes - math.ceil(workers / gpus))
    names = [f"node {i}" for i in range(nodes)]
    learners = tuple(node for node in names[:learner_nodes] for _ in range(gpus))
    wanted = placement.Wanted.of(cfg, "cuda", learners, len(learners))
    return learner_nodes, tuple(placement.plan(wanted, dict.fromkeys(names, float(gpus))).lines)
