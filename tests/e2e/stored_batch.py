"""One update on one stored batch, under whatever launch this is started: rank 0 writes what came of it as JSON.

    accelerate launch --config_file launch/accelerate/zero2.yaml tests/e2e/stored_batch.py OUT '{"model": ...}'

A case is a micro-batch size, epochs and mini-batches of the update, how the rows are shared out over the ranks, and
`settings` of the configuration. With `updates`, so many of them; with `sgd`, by plain SGD, which keeps rounding small.

Each case has a process group and an engine of its own, in a fork of this process: a second DeepSpeed engine breaks on
buffers of the first, and to import all of it again takes longer than the case.
"""

import importlib
import json
import os
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from launch import cluster  # noqa: E402

cluster.prepare_environment()

import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

import tiny_models  # noqa: E402
from core.config import load  # noqa: E402
from launch import learners  # noqa: E402
from rollout.engines.sampling import Filters  # noqa: E402
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
            **case.get("settings", {}),
        },
        folder=ROOT,
    )


def gradients(it: Learner) -> dict[str, list[float]]:
    """Of the first step, whole, from AdamW's first moment: exp_avg = (1 - beta1) * gradient."""
    trained = {name: p for name, p in it.policy.named_parameters() if p.requires_grad}
    if hasattr(it._optimizer.optimizer, "bit16_groups") or hasattr(it._optimizer.optimizer, "fp16_groups"):  # ZeRO
        from deepspeed.utils import safe_get_full_optimizer_state as full

        moments = {name: full(p, "exp_avg") for name, p in trained.items()}
    else:
        moments = {name: it._optimizer.optimizer.state[p]["exp_avg"] for name, p in trained.items()}
    moments = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in moments.items()}  # FSDP2
    return {name: (x.float() / (1 - it.cfg.optim.betas[0])).flatten().tolist() for name, x in moments.items()}


def whole(it: Learner) -> dict[str, list[float]]:
    return {name: p.detach().flatten().tolist() for name, p in engine_weights.whole_parameters(it.policy)}


def whole_at_once(it: Learner) -> int:
    """The most parameters that this rank holds whole beside its shards, between two tensors of a weight sync."""
    most = 0
    for _ in it.stream_weights().tensors:
        most = max(most, sum(p.numel() > 0 for p in it.policy.lm.parameters() if hasattr(p, "ds_id")))
    return most


def gone_and_back(it: Learner, folder: Path) -> bool:
    """Whether parameters and the optimizer's state come back from a checkpoint, everything having been 0 between."""
    before = whole(it), gradients(it)
    it.save_state(folder)
    with torch.no_grad():
        for p in it.policy.parameters():
            if p.requires_grad:
                p.zero_()
        for state in it._optimizer.optimizer.state.values():
            state["exp_avg"].zero_()
    assert (whole(it), gradients(it)) != before
    it.load_state(folder, step=it.step)
    return (whole(it), gradients(it)) == before


class _SGDLearner(Learner):
    def _adamw(self) -> torch.optim.Optimizer:
        """Its step is the gradient: AdamW's is its sign at first, which rounding decides where it is about 0."""
        groups = [{"params": g["params"], "peak_lr": g["peak_lr"]} for g in super()._adamw().param_groups]
        return torch.optim.SGD(groups, lr=self.cfg.optim.lr)


def stirred(policy: torch.nn.Module) -> None:
    """Value head and adapters away from 0, through which no gradient passes; the same under every engine."""
    with torch.no_grad():
        for name, p in sorted(policy.named_parameters()):
            if name == "value_head.weight" or ".lora_B." in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)


def shard_on_a_cpu() -> None:
    """FSDP2 by Accelerate's own code, with gloo: what it does on GPUs, and on a CPU only when told that there are some.

    A launch is refused there for that reason; for one that was asked for all the same, this is it.
    """
    learners._refuse = lambda device, deepspeed: None
    PartialState(cpu=True, backend="gloo").distributed_type = DistributedType.MULTI_GPU


class _Stirred:
    """As `Learner` makes its policy, before an engine has it."""

    def __init__(self, accelerator: object, on: bool) -> None:
        self._accelerator, self._on = accelerator, on

    def __getattr__(self, name: str) -> object:
        return getattr(self._accelerator, name)

    def prepare(self, policy: torch.nn.Module, optimizer: object) -> tuple:
        if self._on:
            stirred(policy)
        return self._accelerator.prepare(policy, optimizer)


def run_case(name: str, case: dict, out: Path) -> None:
    """Rank 0 writes its answer to `out`."""
    stop = tuple(range(30))  # many, so that lengths differ
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_a_cpu()
    cfg = configured(case)
    with ExitStack() as stack:
        accelerator, ranks = learners.join(cfg, stack, print)
        if accelerator.distributed_type.value == "DEEPSPEED":
            # By default a parameter of less than 100 000 elements is never sharded: here, all of them.
            zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            zero["stage3_param_persistence_threshold"] = 0
        engine = TransformersEngine(
            tiny_models.make_model(name),
            stop,
            temperature=1.0,
            max_new_tokens=16,
            filters=Filters(**cfg.rollout.filters) if cfg.rollout.filters else None,
        )
        trajectories = tiny_models.roll_out(engine, N)
        bounds = [sum(case["shards"][:i]) for i in range(ranks.size + 1)] if ranks.size > 1 else [0, N]
        mine = trajectories[bounds[ranks.index] : bounds[ranks.index + 1]]
        ref = None if cfg.reference == "adapter" else tiny_models.make_model(name)
        kind = _SGDLearner if case.get("sgd") else Learner
        stir = _Stirred(accelerator, bool(case.get("settings")))
        it = kind(cfg, stir, tiny_models.make_model(name), ref, ranks)
        for _ in range(case.get("updates", 1)):
            batch, before = it.annotate(TrainBatch.collate(mine, ["a"]))
            rewards = batch.component_rewards["a"].float()
            batch = batch.fill(token_rewards=rewards, normalized_rewards={"a": rewards})
            batch = credit(cfg, batch, 0.02, ranks.sum, weights={"a": 1.0})
            means = it.update(batch)
        result = {"case": case, "means": before | means, "parameters": whole(it)}
        result["bucket"] = getattr(it._optimizer.optimizer, "reduce_bucket_size", None)
        result["gradients"] = {} if case.get("sgd") else gradients(it)
        if case.get("export"):
            exported = it.whole_policy().lm | it.export_weights()
            result["whole_at_once"] = whole_at_once(it)
            result["exported"] = {n: x.flatten().tolist() for n, x in exported.items()}
        if case.get("reload"):
            result["came_back"] = gone_and_back(it, out.with_suffix(".state"))
        if ranks.is_main:
            kind = accelerator.distributed_type.value
            out.write_text(json.dumps({"ranks": ranks.size, "engine": kind, "result": result}))


def meeting_port(rank: int, file: Path) -> str:
    """A free port that rank 0 chose: the launcher's store keeps what an earlier group wrote, and cannot serve two."""
    if rank == 0:
        with socket.create_server(("127.0.0.1", 0)) as free:
            file.with_suffix(".new").write_text(str(free.getsockname()[1]))
        file.with_suffix(".new").rename(file)
    deadline = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < deadline, f"rank 0 did not write {file}"
        time.sleep(0.02)
    return file.read_text()


def main(out: Path, task: dict) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # which it would import in each fork
    rank = cluster.launched()[0]
    parts = [out.with_name(f"{out.stem}-{i}.json") for i in range(len(task["cases"]))]
    for i, (case, part) in enumerate(zip(task["cases"], parts, strict=True)):
        port = meeting_port(
            rank, part.with_suffix(f".port-{os.getppid()}")
        )  # of this launch: its ranks have one parent
        if (child := os.fork()) == 0:
            os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
            run_case(task["model"], case, part)
            sys.exit(0)
        if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(f"case {i} ended with {status}: {case}")
    if rank == 0:
        answers = [json.loads(part.read_text()) for part in parts]
        results = [answer.pop("result") for answer in answers]
        assert all(answer == answers[0] for answer in answers)
        out.write_text(json.dumps(answers[0] | {"results": results}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
