"""A run in this process, without Ray: `trainer.loop.train` as it is, with one engine and one reward server for workers,
and the folder that such a run leaves. And what may be changed in that folder."""

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_models
from core import ledger_table
from core.config import load, to_yaml
from core.pretrained import load_tokenizer
from core.trajectory import Trajectory
from core.under_way import Written
from launch import build, learners, trained
from reward_server.server import RewardServer
from rollout.engines.transformers_engine import stop_ids
from rollout.turns import Turns
from trainer import checkpoint
from trainer.gallery import Gallery
from trainer.learner import Learner
from trainer.ledger import Ledger
from trainer.loop import TrainState, make_probe, train
from trainer.model import load_causal_lm
from trainer.run_log import RunLog
from trainer.weight_sender import WeightPublisher

REWARDS = """
def vowels(completions, offsets, **_):
    return [[float(any(c in "aeiou" for c in text[a:b])) for a, b in at] for text, at in zip(completions, offsets)]

def brevity(completions, **_):
    return [-0.1 * len(text) for text in completions]
"""


class _Workers:
    """They keep the weights that they began with: what is replayed is what the learner made of their responses."""

    counters: Counter[str] = Counter()

    def __init__(self, turns: Turns, chunk_size: int) -> None:
        self._turns, self._chunk_size, self.version = turns, chunk_size, 0

    def start_batch(self, requests, submit) -> Future:
        chunks = [requests[i : i + self._chunk_size] for i in range(0, len(requests), self._chunk_size)]
        future: Future = Future()
        future.set_result(Written(requests=requests, pending=submit(map(self._write, chunks)), seconds=1.0))
        return future

    def finish(self) -> None: ...

    def _write(self, requests) -> list[Trajectory]:
        fields = ("response_ids", "action_mask", "token_offsets", "finish_reason", "kept")
        return [
            Trajectory(
                request=request,
                rollout_logprobs=w.logprobs,
                policy_version=np.full(len(w.response_ids), self.version),
                finished_at=0.0,
                **{name: getattr(w, name) for name in fields},
            )
            for request, w in zip(requests, self._turns.write(requests), strict=True)
        ]


class _Rewards:
    counters: Counter[str] = Counter()
    dropped: set[str] = set()

    def __init__(self, server: RewardServer) -> None:
        self._server = server

    def submit(self, chunks) -> list:
        return list(chunks)

    def collect(self, pending, at_least: int = 0) -> list[Trajectory]:
        return sorted((t for chunk in pending for t in self._server.score(chunk)[0]), key=lambda t: t.order)


class _Transport:
    def open(self, manifest) -> None: ...

    def send(self, index, tensors, raw) -> None: ...

    def offer(self, digests) -> None: ...

    def commit(self, probe, verify) -> int:
        return 0


def make(place: Path, **overrides: object) -> Path:
    """Train three steps; the folder of the run."""
    tiny_models.save_model(place / "model", "gpt2")
    (place / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"the {word} sat"} for word in ("cat", "dog", "mat", "park")]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "model.path": str(place / "model"),
        "model.dtype": "float32",
        "data.path": str(place / "prompts.jsonl"),
        "rollout.batch_size": 16,
        "rollout.n_samples_per_prompt": 2,
        "rollout.chunk_size": 4,
        "rollout.max_new_tokens": 8,
        "rewards.vowels.fn": f"{place / 'rewards.py'}:vowels",
        "rewards.vowels.normalize": "running",
        "rewards.brevity.fn": f"{place / 'rewards.py'}:brevity",
        "rewards.brevity.weight": 0.5,
        "ppo.mini_batch_size": 8,
        "ppo.micro_batch_size": 4,
        "ppo.target_kl": 0.5,
        "optim.lr": 1e-3,
        "log.ledger": 1,
        "log.trackers": [],
        "resources.device": "cpu",
        "run.steps": 3,
        "run.deterministic": True,
        "run.checks": False,
        "run.keep_checkpoints": 5,
        "run.dir": str(place),
        "run.name": "r",
    }
    cfg = load(None, settings | overrides)
    folder = cfg.run.folder
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(cfg))
    with ExitStack() as stack:
        server = stack.enter_context(closing(RewardServer(cfg.rewards, partial(load_tokenizer, cfg.model.path))))
        accelerator, ranks = learners.join(cfg, stack, print)
        tokenizer = load_tokenizer(cfg.model.path)
        prompts, _ = build.prompt_streams(cfg, tokenizer)
        engine = build.engine_loader(cfg, stop_ids(cfg.model.path, tokenizer.eos_token_id), "cpu")()
        workers = _Workers(Turns(engine, tokenizer, None), cfg.rollout.chunk_size)
        lm, ref_lm = load_causal_lm(cfg.model.path, "cpu"), build.reference_lm(cfg, "cpu")
        learner, state = Learner(cfg, accelerator, lm, ref_lm, ranks), TrainState.fresh(cfg)
        bucket_bytes = int(cfg.sync.bucket_mb * 2**20)
        publisher = WeightPublisher(
            learner, _Transport(), make_probe(prompts, 4), bucket_bytes=bucket_bytes, tolerance=1.0
        )
        log = stack.enter_context(RunLog(folder, total_steps=3, trackers=None, console=Console(quiet=True)))
        ledger = Ledger(cfg, folder, tokenizer, print)
        stack.callback(ledger.close)

        def on_step(step, means, uids, prompts_state) -> bool:
            trained.append(folder, trained.Trained(), step, uids)
            inputs = {"rewards": {name: build.source_digest(spec.fn) for name, spec in cfg.rewards.items()}}
            content = {"ranks": 1, "engine": accelerator.distributed_type.value, "inputs": inputs}
            checkpoint.save(folder / "checkpoints", learner, content, keep=5)
            workers.version = step
            return True

        train(
            cfg,
            learner=learner,
            prompts=prompts,
            held_out=None,
            rollouts=workers,
            rewards=_Rewards(server),
            publisher=publisher,
            log=log,
            state=state,
            ledger=ledger,
            gallery=Gallery(cfg, tokenizer, ranks, None),
            on_eval=lambda step, means: None,
            on_step=on_step,
        )
    return folder


def edit_ledger(run: Path, step: int, change: Callable[[list[dict]], list[dict] | None]) -> None:
    """`change` the rows of a step in place, or give others."""
    path = ledger_table.file_of(run, step, 0)
    table = pyarrow.parquet.read_table(path)
    rows = table.to_pylist()
    rows = change(rows) or rows
    pyarrow.parquet.write_table(type(table).from_pylist(rows, schema=table.schema), path)


def edit_said(run: Path, step: int, **fields: object) -> None:
    """Change what a ledger says of its step."""
    path = ledger_table.file_of(run, step, 0)
    table = pyarrow.parquet.read_table(path)
    metadata = dict(table.schema.metadata)
    said = json.loads(metadata[ledger_table.STEP_KEY]) | fields
    metadata[ledger_table.STEP_KEY] = json.dumps(said).encode()
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path)


def edit_config(run: Path, key: str, value: object) -> None:
    path = run / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    *sections, leaf = key.split(".")
    at = tree
    for section in sections:
        at = at[section]
    at[leaf] = value
    path.write_text(yaml.safe_dump(tree))


def edit_tensors(run: Path, step: int, change: Callable[[dict[str, Tensor]], None], *, sealed: bool = True) -> None:
    """Of the policy and value function in a checkpoint."""
    file = run / "checkpoints" / f"step-{step}" / "learner" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    if sealed:
        seal(run, step)


def seal(run: Path, step: int) -> None:
    """A manifest for what a checkpoint holds now."""
    place = run / "checkpoints" / f"step-{step}"
    (place / checkpoint.MANIFEST).unlink()
    checkpoint.write_manifest(place, step)


def move_one_weight(tensors: dict[str, Tensor]) -> None:
    """The embedding of token 65, in one place."""
    name = next(name for name in tensors if name.endswith(("wte.weight", "embed_tokens.weight")))
    tensors[name][65, 0] += 0.125
