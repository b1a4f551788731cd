"""What the conformance suite is made of: trajectories with every oddity at once, learners, and the gradients they take.

The tests that use this know the learner by its contract alone (DESIGN.md sections 4 and 7): trajectories go in, streams
and gradients come out. Nothing here pads, packs or shifts.

Legend: P prompt tokens, T response tokens, V vocabulary.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

import tiny_models
from core.combine import Combined, combine
from core.config import load
from core.schema import Config
from core.trajectory import PromptRequest, Trajectory, sample_uid
from trainer.batch import TrainBatch
from trainer.learner import Learner
from trainer.loop import credit
from trainer.ranks import Ranks

EOS = 0  # of tiny_models; it pads too, as in every model that ships without a pad token
KL_COEF = 0.05


def configured(**overrides: object) -> Config:
    """Two paid components and a metric. The run-time checks are off: most tests want a reference that differs."""
    return load(
        None,
        {
            **tiny_models.LEARNER_SETTINGS,
            "rewards.a.weight": 0.7,
            "rewards.b.fn": "r.py:f",
            "rewards.b.weight": -0.4,
            "rewards.c.fn": "r.py:f",
            "rewards.c.weight": 0.0,
            "rollout.batch_size": 8,
            "ppo.mini_batch_size": 8,
            "ppo.micro_batch_size": 3,
            "ppo.ppo_epochs": 1,
            "optim.lr": 0.0,  # a gradient is what most tests want, and a learner that stays as it is
            "optim.max_grad_norm": 1e9,
            "run.checks": False,
            **overrides,
        },
        folder=Path("/nowhere"),
    )


def fresh_accelerate() -> None:
    """Accelerate keeps its state for the process: forget it."""
    AcceleratorState._reset_state(reset_partial_state=True)


def learner(
    cfg: Config,
    name: str = "llama-tied",
    *,
    wide: bool = False,
    ref_seed: int = 1,
    head_std: float = 0.3,
    change: Callable[[torch.nn.Module], object] = lambda lm: None,
) -> Learner:
    """A learner of a random model, its value head not at zero, its reference another model.

    Args:
        wide: all in float64. GPT-2 alone computes so: the RMS norm of the others goes through float32.
        change: done to both models.
    """
    lm, ref_lm = tiny_models.make_model(name), tiny_models.make_model(name, seed=ref_seed)
    with torch.no_grad():
        change(lm)
        change(ref_lm)
    if wide:
        lm, ref_lm = lm.double(), ref_lm.double()
    it = Learner(cfg, Accelerator(cpu=True), lm, ref_lm)
    assert it.policy.reader.packed and it._ref.packed, "the model is read in another way than these tests are about"
    if wide:
        it.policy.value_head.double()
    torch.manual_seed(3)
    torch.nn.init.normal_(it.policy.value_head.weight, std=head_std)
    torch.nn.init.normal_(it.policy.value_head.bias, std=head_std)
    return it


def trajectory(
    ordinal: int,
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    cut: bool = False,
    actions: Sequence[bool] | None = None,
    rewards: dict[str, Sequence[float]] | None = None,
    applies: dict[str, Sequence[bool]] | None = None,
    logprobs: Sequence[float] | None = None,
) -> Trajectory:
    """`actions`: False on tokens that a tool wrote; all True if None. Rewards that are not given are 0."""
    n = len(response)
    zero, one = np.zeros(n), np.ones(n, dtype=bool)
    return Trajectory(
        request=PromptRequest(
            ordinal=ordinal,
            k=0,
            sample_uid=sample_uid("t", ordinal, 0),
            prompt_ids=np.array(prompt, dtype=np.int64),
            columns={"prompt": ""},
            seed=0,
        ),
        response_ids=np.array(response, dtype=np.int64),
        rollout_logprobs=np.array([-1.0] * n if logprobs is None else logprobs, dtype=np.float32),
        action_mask=one if actions is None else np.array(actions, dtype=bool),
        token_offsets=np.zeros((n, 2), dtype=np.int64),
        policy_version=np.zeros(n, dtype=np.int64),
        finish_reason="length" if cut else "stop",
        finished_at=0.0,
        component_rewards={c: np.array((rewards or {}).get(c, zero), dtype=np.float64) for c in "abc"},
        component_mask={c: np.array((applies or {}).get(c, one), dtype=bool) for c in "abc"},
    )


def random_trajectories(seed: int, n: int) -> list[Trajectory]:
    """Prompts of 1 to 7 and responses of 1 to 8 tokens; eos stands anywhere, in prompts too, and need not end a
    response that stopped; a third is cut; tools wrote the middle, the start, the end, or all of some; half share their
    prompt with an earlier one."""
    rng, sharing = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    out = []
    for ordinal in rng.permutation(n).tolist():
        p, t = int(rng.integers(1, 8)), int(rng.integers(1, 9))
        ids = rng.integers(1, tiny_models.VOCABULARY, size=p + t)
        ids[rng.random(p + t) < 0.15] = EOS
        actions = np.ones(t, dtype=bool)
        kind = rng.integers(0, 6)
        if kind == 1:
            actions = rng.random(t) < 0.6
        elif kind == 2:
            actions[: t // 2] = False
        elif kind == 3:
            actions[(t + 1) // 2 :] = False
        out.append(
            trajectory(
                ordinal,
                sharing.choice(out).request.prompt_ids if out and sharing.random() < 0.5 else ids[:p],
                ids[p:],
                cut=bool(rng.random() < 1 / 3),
                actions=actions,
                rewards={c: rng.normal(size=t) for c in "abc"},
                applies={c: np.ones(t, dtype=bool) if c == "a" else rng.random(t) < 0.8 for c in "abc"},
                logprobs=-rng.random(t),
            )
        )
    return out


def combined(cfg: Config, batch: TrainBatch, all_reduce: Callable[[Tensor], Tensor] = lambda x: x) -> Combined:
    return combine(
        batch.component_rewards, batch.component_mask, batch.response_mask, cfg.rewards, {}, all_reduce=all_reduce
    )


def credited(it: Learner, trajectories: list[Trajectory], *, kl_coef: float = KL_COEF) -> TrainBatch:
    """The batch as `trainer.loop` hands it to `update`."""
    batch, _ = it.annotate(TrainBatch.collate(trajectories, it.cfg.rewards))
    return credit(it.cfg, batch.fill(token_rewards=combined(it.cfg, batch).token_rewards), kl_coef, lambda x: x)


@contextmanager
def optimizer_steps(it: Learner) -> Iterator[list[dict[str, Tensor]]]:
    """What each optimizer step inside the block takes: parameter name -> gradient."""
    steps, names = [], {id(p): name for name, p in it.policy.named_parameters()}

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if id(parameters[0]) not in names:
            return  # the hook is one for all optimizers, and this is another learner's
        steps.append(
            {names[id(p)]: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters}
        )

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield steps
    finally:
        handle.remove()


def gradient(it: Learner, batch: TrainBatch) -> dict[str, Tensor]:
    """Of the single optimizer step of one update."""
    with optimizer_steps(it) as steps:
        it.update(batch)
    assert len(steps) == 1, f"{len(steps)} optimizer steps"
    return steps[0]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of two gradients in units of the largest element of `a`."""
    assert a.keys() == b.keys()
    size = max(float(x.abs().max()) for x in a.values())
    assert size > 0, "a gradient of zeros is like any other"
    return max(float((x - b[name]).abs().max()) for name, x in a.items()) / size


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def streams(batch: TrainBatch) -> dict[str, Tensor]:
    """Every per-token tensor that is written, by name."""
    out = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return {name: x for name, x in out.items() if isinstance(x, Tensor)}


class Meeting:
    """Where threads that play the ranks of a job exchange what they have. Between two exchanges one at a time runs:
    Accelerate keeps for the process whether the next backward is the last of its optimizer step."""

    def __init__(self, size: int) -> None:
        self.size, self.turn = size, threading.Lock()
        self._barrier, self._mailbox = threading.Barrier(size, timeout=20), [None] * size

    def exchange(self, rank: int, item: object) -> list:
        self._mailbox[rank] = item
        self.turn.release()
        try:
            self._barrier.wait()
            items = list(self._mailbox)
            self._barrier.wait()  # nobody writes the next one before all have read this one
        finally:
            self.turn.acquire()
        return items

    def leave(self) -> None:
        self._barrier.abort()


class ThreadRanks(Ranks):
    """One of the ranks of a job, in a thread."""

    def __init__(self, index: int, meeting: Meeting) -> None:
        super().__init__()
        self.index, self.size, self._meeting = index, meeting.size, meeting

    def gather(self, item: object) -> list:
        return self._meeting.exchange(self.index, item)

    def sum(self, values: Tensor) -> Tensor:
        return torch.stack(self.gather(values)).sum(0)


def on_ranks(work: Callable[[ThreadRanks], object], size: int = 2) -> list:
    """`work` on `size` threads; what each returned, by rank."""
    meeting, results = Meeting(size), [None] * size

    def run(rank: int) -> None:
        with meeting.turn:
            try:
                results[rank] = work(ThreadRanks(rank, meeting))
            except BaseException as error:
                meeting.leave()
                results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error  # the cause before what it broke
    return results
