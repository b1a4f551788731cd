"""One run from its configuration to `final/`: wires the parts, trains, and ends everything it started."""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console

from core.config import Config
from core.faults import UserError, exit_code_of
from launch import build, cluster, run_folder
from launch.trackers import Trackers
from launch.weight_transport import ObjectStoreTransport
from rollout.group import RolloutGroup
from trainer.checkpoint import save_pretrained
from trainer.evaluate import summary_of
from trainer.learner import Learner
from trainer.loop import make_probe, train
from trainer.model import load_causal_lm
from trainer.run_log import RunLog
from trainer.weight_sender import WeightPublisher, WeightTransport

PROBE_TOKENS = 64  # of the fixed prompt whose log-probs are compared after each weight sync


@dataclass(frozen=True)
class RunResult:
    folder: Path
    summary: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Inline:
    """Parts that a script hands over as objects, where a config file would name them."""

    functions: dict[str, Callable] | None = None  # component name -> reward function
    rows: list[dict[str, Any]] | None = None  # instead of what data.path holds; written there for the record
    eval_rows: list[dict[str, Any]] | None = None
    make_transport: Callable[[RolloutGroup, float], WeightTransport] | None = None  # instead of the object store


def run(cfg: Config, inline: Inline = Inline()) -> RunResult:
    """Train as configured, in an unused run folder.

    Raises:
        Fault: by kind, KeyboardInterrupt on Ctrl-C. Either way summary.json holds the exit code and what was reached,
            and the Ray that was started for this run is gone.
    """
    started = time.perf_counter()
    run_folder.refuse_used(cfg)
    build.check_rewards(cfg, inline.functions)
    tokenizer = build.load_tokenizer(cfg.model.path)
    prompts, held_out = build.prompt_streams(cfg, tokenizer, inline.rows, inline.eval_rows)
    build.check_rewards(cfg, inline.functions, prompts.columns)
    summary: dict[str, Any] = {"eval": {}, "seconds": {}, "steps": 0, "exit": 1}
    with run_folder.created(cfg) as folder:
        try:
            for path, rows in ((cfg.data.path, inline.rows), (cfg.data.eval_path, inline.eval_rows)):
                if rows is not None:
                    run_folder.write_rows(Path(path), rows)
            with ExitStack() as stack:
                _train(cfg, inline, stack, folder, tokenizer, prompts, held_out, summary)
            summary["exit"] = 0
        except BaseException as error:
            summary |= {"exit": exit_code_of(error), "error": f"{type(error).__name__}: {error}".removesuffix(": ")}
            raise
        finally:
            summary["seconds"]["whole_run"] = round(time.perf_counter() - started, 3)
            run_folder.write_summary(folder, summary)
    return RunResult(folder, summary)


def _train(
    cfg: Config,
    inline: Inline,
    stack: ExitStack,
    folder: Path,
    tokenizer: Any,
    prompts: Any,
    held_out: Any,
    summary: dict[str, Any],
) -> None:
    started = time.perf_counter()
    console = Console()
    workers = f"{cfg.rollout.workers} rollout worker" + "s" * (cfg.rollout.workers > 1)
    console.print(f"{folder}: starting Ray, {workers}, a reward server and the learner", soft_wrap=True)
    stack.enter_context(cluster.ray_session(cfg))
    # Accelerate keeps the settings of its first user for the whole process: a second run in a notebook has its own.
    stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
    accelerator = _accelerator(cfg)
    stack.callback(accelerator.end_training)
    # Where a line to the user goes, whole and as it is; the log takes over once it is open.
    tell = [lambda text: console.print(text, markup=False, soft_wrap=True)]

    def note(text: str) -> None:
        tell[-1](text)

    group = build.rollout_group(cfg, tokenizer, str(accelerator.device), note)
    stack.callback(group.close)
    rewards = build.reward_client(cfg, inline.functions, note)
    stack.callback(rewards.close)
    learner = Learner(cfg, accelerator, *(load_causal_lm(cfg.model.path, accelerator.device) for _ in range(2)))
    reward_server_pid = rewards.wait_ready()
    group.wait_ready()
    # For people and tests that want to look at, or kill, a process of this run.
    (folder / "processes.json").write_text(json.dumps({"reward-server": reward_server_pid} | group.pids))
    transport = (inline.make_transport or ObjectStoreTransport)(group, cfg.sync.timeout_s)
    probe = make_probe(held_out or prompts, min(PROBE_TOKENS, cfg.rollout.max_new_tokens))  # fits into any window
    bucket_bytes = int(cfg.sync.bucket_mb * 2**20)
    publisher = WeightPublisher(learner, transport, probe, bucket_bytes=bucket_bytes, tolerance=learner.probe_tolerance)
    summary["seconds"]["start"] = round(time.perf_counter() - started, 3)

    def on_eval(step: int, means: dict[str, float]) -> None:
        shown = summary_of(means) | {"step": step}
        summary["eval"]["before" if step == 0 else "after"] = shown
        best = summary["eval"].get("best")
        if step and (best is None or shown["reward/total"] > best["reward/total"]):
            summary["eval"]["best"] = shown
            save_pretrained(learner.policy, tokenizer, folder / "best")

    trackers = Trackers.open(cfg, folder, ids={}, resumed_from=None, note=note)
    stack.push(lambda kind, error, trace: trackers.close(exit_code_of(error) if error else 0))
    title = f"{cfg.run.name}: {Path(cfg.model.path).name} on {Path(cfg.data.path).name}"
    with RunLog(folder, total_steps=cfg.run.steps, trackers=trackers, console=console, title=title) as log:
        tell.append(log.note)
        try:
            train(
                cfg,
                learner=learner,
                prompts=prompts,
                held_out=held_out,
                rollouts=group,
                rewards=rewards,
                publisher=publisher,
                log=log,
                on_eval=on_eval,
            )
        finally:
            tell.pop()
            summary["steps"] = learner.step
            summary["seconds"] |= {phase: round(spent, 3) for phase, spent in log.seconds.items()}
    save_pretrained(learner.policy, tokenizer, folder / "final")


def _accelerator(cfg: Config) -> Accelerator:
    """This process's part in the launch: device, precision, threads. Raises UserError for a launch that cannot work."""
    torch.manual_seed(cfg.run.seed)
    torch.set_num_threads(cluster.thread_plan(cfg)[0])
    torch.use_deterministic_algorithms(cfg.run.deterministic, warn_only=True)
    accelerator = Accelerator(
        cpu=cluster.device(cfg) == "cpu",
        mixed_precision="bf16" if cfg.model.dtype == "bfloat16" else "no",
    )
    if accelerator.num_processes != 1:
        raise UserError(f"{accelerator.num_processes} learner processes were launched: this version trains with one")
    return accelerator
