"""TrainBatch: scored trajectories as padded tensors, and the cutting of them into mini- and micro-batches.

Legend: B samples of this rank, P padded prompt width, T padded response width. Prompts are padded on the left and
responses on the right, so that response token t stands in column P + t of every row.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from core.trajectory import KeptTokens, Trajectory


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """One writer per field, written once: `fill` refuses to overwrite. Example of two rows, P = 3, T = 2:

    input_ids        [[0, 17, 10, 19, 0], [5, 6, 7, 13, 0]]    the first response was "19 <eos=0>", the second cut
    prompt_lengths   [2, 3]      response_lengths [2, 1]
    response_mask    [[1, 1], [1, 0]]                          from recorded lengths, never from ids
    """

    order: np.ndarray  # [B, 2] (ordinal, k), sorted: trainer/batch
    input_ids: Tensor  # [B, P + T] int64
    prompt_lengths: Tensor  # [B]
    response_lengths: Tensor  # [B]
    response_mask: Tensor  # [B, T] bool, True on tokens that the policy produced
    cut: Tensor  # [B] bool, finish_reason is `length`
    rollout_logprobs: Tensor  # [B, T]
    policy_version: Tensor  # [B, T] int64
    component_rewards: dict[str, Tensor]  # name -> [B, T] float64, raw
    component_mask: dict[str, Tensor]  # name -> [B, T] bool
    kept: tuple[KeptTokens, ...] | None = None  # B of [T]; None: tokens were drawn from the whole vocabulary
    rollout_values: Tensor | None = None  # [B, T] of workers that emit them; None: the learner computes them
    rollout_bootstraps: Tensor | None = None  # [B] likewise; 0 where a response was not cut
    normalized_rewards: dict[str, Tensor] | None = None  # name -> [B, T] core/combine, in the loop
    token_rewards: Tensor | None = None  # [B, T] core/combine, in the loop
    old_logprobs: Tensor | None = None  # [B, T] trainer/learner.annotate
    ref_logprobs: Tensor | None = None  # [B, T] trainer/learner.annotate, or came with the rewards
    # Values, and for responses that were cut V of the state after the last token: of trainer/learner.annotate, where
    # there is one head; else the weighted sum of what each head says, made in the loop.
    values: Tensor | None = None  # [B, T]
    bootstrap_values: Tensor | None = None  # [B]
    head_values: dict[str, Tensor] | None = None  # name -> [B, T] trainer/learner.annotate
    head_bootstraps: dict[str, Tensor] | None = None  # name -> [B] trainer/learner.annotate
    head_returns: dict[str, Tensor] | None = None  # name -> [B, T] trainer/value_heads
    rewards: Tensor | None = None  # [B, T] trainer/ppo, after KL
    advantages: Tensor | None = None  # [B, T] trainer/ppo
    returns: Tensor | None = None  # [B, T] trainer/ppo

    @property
    def prompt_width(self) -> int:
        return self.input_ids.shape[1] - self.response_mask.shape[1]

    def __len__(self) -> int:
        return len(self.input_ids)

    @classmethod
    def collate(cls, trajectories: list[Trajectory], components: Iterable[str] | None = None) -> "TrainBatch":
        """Pad to common widths. Rows are sorted by (ordinal, k), whatever the order of arrival; there may be none.

        `components`: names of the rewards that every trajectory has; needed where there may be no trajectory.
        """
        trajectories = sorted(trajectories, key=lambda t: t.order)
        for t in trajectories:
            over = t.finish_reason in ("stop", "length")
            assert over, f"sample {t.request.sample_uid} was aborted, or is not over, and must not be trained on"
        p = max((len(t.request.prompt_ids) for t in trajectories), default=1)
        width = max((len(t) for t in trajectories), default=1)

        def right(arrays: list[np.ndarray], dtype: type) -> Tensor:
            out = np.zeros((len(arrays), width), dtype=dtype)
            for row, array in zip(out, arrays, strict=True):
                row[: len(array)] = array
            return torch.from_numpy(out)

        prompts = np.zeros((len(trajectories), p), dtype=np.int64)
        for row, t in zip(prompts, trajectories, strict=True):
            row[p - len(t.request.prompt_ids) :] = t.request.prompt_ids
        components = list(trajectories[0].component_rewards if components is None else components)
        given = bool(trajectories) and all(t.ref_logprobs is not None for t in trajectories)
        kept = tuple(t.kept for t in trajectories if t.kept is not None)
        assert len(kept) in (0, len(trajectories)), f"{len(kept)} of {len(trajectories)} responses have kept tokens"
        valued = [t for t in trajectories if t.rollout_values is not None]
        assert len(valued) in (0, len(trajectories)), f"{len(valued)} of {len(trajectories)} responses have values"
        behind = torch.tensor([t.rollout_bootstrap or 0.0 for t in trajectories], dtype=torch.float32)
        rewards = {n: [t.component_rewards[n] for t in trajectories] for n in components}
        masks = {n: [t.component_mask[n] for t in trajectories] for n in components}
        return cls(
            order=np.array([t.order for t in trajectories], dtype=np.int64).reshape(-1, 2),
            input_ids=torch.cat(
                [torch.from_numpy(prompts), right([t.response_ids for t in trajectories], np.int64)], dim=1
            ),
            prompt_lengths=torch.tensor([len(t.request.prompt_ids) for t in trajectories], dtype=torch.int64),
            response_lengths=torch.tensor([len(t) for t in trajectories], dtype=torch.int64),
            response_mask=right([t.action_mask for t in trajectories], np.bool_),
            cut=torch.tensor([t.finish_reason == "length" for t in trajectories], dtype=torch.bool),
            rollout_logprobs=right([t.rollout_logprobs for t in trajectories], np.float32),
            policy_version=right([t.policy_version for t in trajectories], np.int64),
            ref_logprobs=right([t.ref_logprobs for t in trajectories], np.float32) if given else None,
            component_rewards={n: right(arrays, np.float64) for n, arrays in rewards.items()},
            component_mask={n: right(arrays, np.bool_) for n, arrays in masks.items()},
            kept=kept or None,
            rollout_values=right([t.rollout_values for t in trajectories], np.float32) if valued else None,
            rollout_bootstraps=behind if valued else None,
        )

    def idle(self) -> "TrainBatch":
        """One row of one prompt token and no valid response token: what a rank without rows passes through the model,
        so that it meets the others in the collectives of the engine. It weighs nothing in any loss."""

        def blank(x: object) -> object:
            if isinstance(x, dict):
                return {key: blank(value) for key, value in x.items()}
            if isinstance(x, Tensor):
                return torch.zeros((1, 1) if x.ndim == 2 else 1, dtype=x.dtype, device=x.device)
            if isinstance(x, tuple):
                return None  # no token was drawn from anything
            return x[:0] if isinstance(x, np.ndarray) else x

        row = replace(self, **{f.name: blank(getattr(self, f.name)) for f in fields(self)})
        ids = torch.zeros((1, 2), dtype=self.input_ids.dtype, device=self.input_ids.device)
        return replace(row, input_ids=ids, prompt_lengths=torch.ones_like(row.prompt_lengths))

    def fill(self, **tensors: Tensor) -> "TrainBatch":
        """The batch with further streams; each may be written once."""
        for name in tensors:
            assert getattr(self, name) is None, f"{name} is written twice"
        return replace(self, **tensors)

    def writers_logprobs(self, off_policy: bool) -> Tensor:
        """[B, T] of the policy that wrote the tokens, which the KL penalty is about. Of an older one the engine's: by
        the learner's, a token that the policy has since turned away from would earn a bonus, the more the more it is
        avoided. On-policy old_logprobs: the learner's, computed as those of the reference are, unless workers emit
        values too."""
        return self.rollout_logprobs if off_policy else self.old_logprobs

    def rows(self, index: np.ndarray) -> "TrainBatch":
        """Some rows, trimmed to the widths that they need."""
        at = torch.from_numpy(index)
        p, t = self.prompt_width, self.response_mask.shape[1]
        new_p, new_t = int(self.prompt_lengths[at].max()), int(self.response_lengths[at].max())

        def pick(name: str, x: object) -> object:
            if name == "order":
                return x[index]
            if name == "input_ids":
                return x[at, p - new_p : p + new_t]
            if isinstance(x, dict):
                return {key: pick("", value) for key, value in x.items()}
            if isinstance(x, Tensor):
                return x[at, :new_t] if x.ndim == 2 else x[at]
            if isinstance(x, tuple):
                return tuple(x[i] for i in index)
            return x

        assert new_t <= t
        return replace(self, **{f.name: pick(f.name, getattr(self, f.name)) for f in fields(self)})

    def mini_batches(
        self, n_mini: int, *, seed: int, step: int, epoch: int, orders: list[np.ndarray], rank: int = 0
    ) -> Iterator[np.ndarray]:
        """Row indices of this rank in each mini-batch.

        Membership is a function of (seed, step, epoch, ordinal, k) alone: a hash sorts all samples of all ranks, and
        the sorted list is cut into `n_mini` parts of equal size.

        Args:
            orders: `order` ([B, 2]) of every rank.
            rank: which of them is this one.
        """

        def key(sample: tuple[int, int, int, int]) -> bytes:
            text = f"{seed}/{step}/{epoch}/{sample[0]}/{sample[1]}"
            return hashlib.blake2b(text.encode(), digest_size=8).digest()

        everyone = sorted(
            (
                (*order, owner, row)
                for owner, of_rank in enumerate(orders)
                for row, order in enumerate(of_rank.tolist())
            ),
            key=key,
        )
        for part in np.array_split(np.arange(len(everyone)), n_mini):
            members = [everyone[i][2:] for i in part]
            yield np.array([row for owner, row in members if owner == rank], dtype=np.int64)

    def pieces(
        self, index: np.ndarray, size: int, *, tokens: int | None = None, packed: bool = False
    ) -> list[np.ndarray]:
        """`index` in pieces of at most `size` rows and `tokens` tokens. Samples of one prompt stay together.

        `packed`: a prompt that several samples of a piece share counts once and nothing is padded; else each row counts
        with the width of the longest. A row that is too long by itself makes a piece of its own.
        """
        n_prompts, n_responses = self.prompt_lengths.numpy(), self.response_lengths.numpy()
        lengths = n_prompts + n_responses
        longest: dict[int, int] = {}
        for row in index.tolist():
            ordinal = int(self.order[row, 0])
            longest[ordinal] = max(longest.get(ordinal, 0), int(lengths[row]))
        by_length = sorted(
            index.tolist(), key=lambda row: (-longest[o := int(self.order[row, 0])], o, -int(lengths[row]))
        )
        pieces: list[list[int]] = []
        widest_p = widest_r = used = 0
        seen: set[int] = set()
        for row in by_length:
            p, r, ordinal = int(n_prompts[row]), int(n_responses[row]), int(self.order[row, 0])
            piece = pieces[-1] if pieces else []
            if packed:
                cost = used + r + (0 if ordinal in seen else p)
            else:
                cost = (len(piece) + 1) * (max(widest_p, p) + max(widest_r, r))
            if not piece or len(piece) == size or (tokens is not None and cost > tokens):
                pieces.append([])
                widest_p = widest_r = used = 0
                seen = set()
                cost = p + r
            pieces[-1].append(row)
            widest_p, widest_r, used = max(widest_p, p), max(widest_r, r), cost
            seen.add(ordinal)
        return [np.array(piece, dtype=np.int64) for piece in pieces]
