"""`python -m launch.imports`: import what the processes of a run import, for the bytecode that this leaves behind."""

import contextlib
import importlib
import io
import warnings

from launch import cluster

MODULES = (
    "launch.run",
    "launch.accelerate_launch",
    "launch.report",
    "launch.wandb_tracker",
    "launch.tensorboard_tracker",
    "rollout.worker",
    "reward_server.server",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "datasets",
    "deepspeed",
    "peft",
    "ray.dashboard.dashboard",
    "ray.dashboard.agent",
    "ray._private.log_monitor",
    "ray._private.runtime_env.agent.runtime_env_agent",
    "ray.autoscaler._private.monitor",
    "wandb",
)


def main() -> None:
    cluster.prepare_environment()
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for name in MODULES:
            importlib.import_module(name)


if __name__ == "__main__":
    main()
