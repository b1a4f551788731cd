"""Trajectory: one response and everything that is known about it, token by token.

Legend: P prompt tokens, T response tokens. One alignment rule holds everywhere: a per-token array is indexed by the
response token it belongs to. Position t is the action `response_ids[t]`, its log-probability, its reward, and the
value of the state before it.
"""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]


def sample_uid(run_id: str, ordinal: int, k: int) -> str:
    """Identity of sample k of prompt `ordinal` in run `run_id`: 32 hex digits, the same on every host and attempt."""
    return hashlib.blake2b(f"{run_id}/{ordinal}/{k}".encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True)
class PromptRequest:
    """One sample to write: a prompt and the identity of the answer. Written by rollout/prompts, completed by the group.

    `ordinal` numbers the prompts of the logical stream (epoch and index are functions of it); `k` counts the samples
    of one prompt; `attempt` counts executions of the same sample after a worker was lost.
    """

    ordinal: int
    k: int
    sample_uid: str
    prompt_ids: np.ndarray  # [P] int64
    columns: dict[str, Any]  # the row of the dataset, `prompt` included
    seed: int  # of the run, or of the evaluation: with (ordinal, k, t) it decides each random number
    attempt: int = 0


@dataclass(frozen=True, kw_only=True)
class KeptTokens:
    """The ids that each token of a response was drawn from, where filters (top-k, top-p, min-p) left the others out.

    Legend: K ids of all T tokens together. Four bytes an id: as compact as the filters are narrow. Example, the first
    token out of three ids and the second out of one:

        ids     [4, 9, 250, 13]
        starts  [0, 3, 4]
    """

    ids: np.ndarray  # [K] int32, those of one token after those of the other, each once and ascending
    starts: np.ndarray  # [T + 1] int64: those of token t are ids[starts[t] : starts[t + 1]]

    @classmethod
    def of(cls, sets: list[np.ndarray]) -> "KeptTokens":
        """From the ids of each token: T arrays."""
        sizes = np.fromiter(map(len, sets), dtype=np.int64, count=len(sets))
        ids = np.concatenate(sets) if sets else np.zeros(0)
        return cls(ids=ids.astype(np.int32), starts=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))

    def and_undrawn(self, n: int) -> "KeptTokens":
        """With `n` more tokens, which were drawn from nothing: an environment wrote them."""
        return KeptTokens(ids=self.ids, starts=np.append(self.starts, np.repeat(self.starts[-1:], n)))

    def __len__(self) -> int:
        """Number of response tokens T."""
        return len(self.starts) - 1

    def __getitem__(self, t: int) -> np.ndarray:
        """The ids that token t was drawn from."""
        return self.ids[self.starts[t] : self.starts[t + 1]]

    def dense(self, n_vocab: int) -> np.ndarray:
        """[T, n_vocab] bool: True for the ids that each token was drawn from."""
        out = np.zeros((len(self), n_vocab), dtype=bool)
        out[np.repeat(np.arange(len(self)), np.diff(self.starts)), self.ids] = True
        return out

    def hold(self, ids: np.ndarray, mask: np.ndarray) -> bool:
        """Whether each of `ids` ([T]) where `mask` ([T] bool) is one of those that it was drawn from."""
        if len(ids) != len(self):
            return False
        token = np.repeat(np.arange(len(self)), np.diff(self.starts))
        held = np.zeros(len(self), dtype=bool)
        held[token[self.ids == ids[token]]] = True
        return bool(held[mask].all())


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One response, ragged, on the CPU. Each field has one writer (named here) and is written once.

    Example, the prompt "2+2=" answered "4." and stopped, scored by two components:

        prompt_ids        [17, 10, 17, 28]
        response_ids      [ 19,    13,    0]       "4", ".", <eos>
        rollout_logprobs  [-0.1,  -0.7, -0.2]      natural log, of what was sampled from: temperature, filters
        token_offsets     [(0,1), (1,2), (2,2)]    code points of "4."; special tokens are empty
        action_mask       [ 1,     1,    1]        0 on tokens the policy did not produce
        policy_version    [ 3,     3,    3]        weights that produced each token
        component_rewards {"truth": [1, 0, 0], "style": [0, -0.5, 0]}
    """

    request: PromptRequest  # rollout/prompts, rollout/group
    response_ids: np.ndarray  # [T] int64, rollout engine
    rollout_logprobs: np.ndarray  # [T] float32, rollout engine
    action_mask: np.ndarray  # [T] bool, rollout/worker
    token_offsets: np.ndarray  # [T, 2] int64, rollout/worker
    policy_version: np.ndarray  # [T] int64, rollout/worker; several where the response was left and gone on with
    finish_reason: FinishReason | None  # rollout/worker; aborted ones are never trained on. None: it is not over yet
    finished_at: float  # rollout/worker, seconds since the epoch: for reports only, nothing is decided by it
    kept: KeptTokens | None = None  # rollout engine; None: every token was drawn from the whole vocabulary
    rollout_values: np.ndarray | None = None  # [T] float32, rollout engine, with `rollout.emit_values`
    rollout_bootstrap: float | None = None  # rollout engine, likewise, of a cut response: V of the state after the last
    component_rewards: dict[str, np.ndarray] = field(default_factory=dict)  # name -> [T] float64 raw, reward_server
    component_mask: dict[str, np.ndarray] = field(default_factory=dict)  # name -> [T] bool, False: does not apply
    ref_logprobs: np.ndarray | None = None  # [T] float32, reward_server, with `model.reference: reward_server`
    scored_at: float = 0.0  # reward_server

    def __post_init__(self) -> None:
        for name in ("rollout_logprobs", "action_mask", "token_offsets", "policy_version"):
            assert len(getattr(self, name)) == len(self), f"{name} has {len(getattr(self, name))} of {len(self)} tokens"
        if self.rollout_values is not None:
            assert len(self.rollout_values) == len(self), f"{len(self.rollout_values)} values of {len(self)} tokens"
            assert (self.rollout_bootstrap is not None) == (self.finish_reason == "length"), (
                f"a response that ended by {self.finish_reason} has the bootstrap {self.rollout_bootstrap}"
            )
        assert self.kept is None or self.kept.hold(self.response_ids, self.action_mask), (
            "a token is not among those it was drawn from"
        )

    def __len__(self) -> int:
        """Number of response tokens T."""
        return len(self.response_ids)

    @property
    def order(self) -> tuple[int, int]:
        """The place of this sample in every batch: batches are sorted by it, never by arrival."""
        return (self.request.ordinal, self.request.k)

    def scored(
        self,
        rewards: dict[str, np.ndarray],
        mask: dict[str, np.ndarray],
        *,
        scored_at: float,
        ref_logprobs: np.ndarray | None = None,
    ) -> "Trajectory":
        """The same response with its raw component rewards (each [T] float64)."""
        assert not self.component_rewards, f"sample {self.request.sample_uid} was scored twice"
        scores = {"component_rewards": rewards, "component_mask": mask, "ref_logprobs": ref_logprobs}
        return replace(self, **scores, scored_at=scored_at)
