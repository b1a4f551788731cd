"""TrainBatch: scored trajectories as padded tensors, and the cutting of them into mini- and micro-batches.

Legend: B samples of this rank, P padded prompt width, T padded response width. Prompts are padded on the left and
responses on the right, so that response token t stands in column P + t of every row.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from core.trajectory import Trajectory


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
    token_rewards: Tensor | None = None  # [B, T] core/combine, in the loop
    old_logprobs: Tensor | None = None  # [B, T] trainer/learner.annotate
    ref_logprobs: Tensor | None = None  # [B, T] trainer/learner.annotate
    values: Tensor | None = None  # [B, T] trainer/learner.annotate
    bootstrap_values: Tensor | None = None  # [B] trainer/learner.annotate: V of the state after the last token, if cut
    rewards: Tensor | None = None  # [B, T] trainer/ppo, after KL
    advantages: Tensor | None = None  # [B, T] trainer/ppo
    returns: Tensor | None = None  # [B, T] trainer/ppo

    @property
    def prompt_width(self) -> int:
        return self.input_ids.shape[1] - self.response_mask.shape[1]

    def __len__(self) -> int:
        return len(self.input_ids)

    @classmethod
    def collate(cls, trajectories: list[Trajectory]) -> "TrainBatch":
        """Pad to common widths. Rows are sorted by (ordinal, k), whatever the order of arrival."""
        trajectories = sorted(trajectories, key=lambda t: t.order)
        for t in trajectories:
            assert t.finish_reason != "abort", f"sample {t.request.sample_uid} was aborted and must not be trained on"
        p = max(len(t.request.prompt_ids) for t in trajectories)
        width = max(len(t) for t in trajectories)

        def right(arrays: list[np.ndarray]) -> Tensor:
            out = np.zeros((len(arrays), width), dtype=arrays[0].dtype)
            for row, array in zip(out, arrays, strict=True):
                row[: len(array)] = array
            return torch.from_numpy(out)

        prompts = np.zeros((len(trajectories), p), dtype=np.int64)
        for row, t in zip(prompts, trajectories, strict=True):
            row[p - len(t.request.prompt_ids) :] = t.request.prompt_ids
        names = trajectories[0].component_rewards
        return cls(
            order=np.array([t.order for t in trajectories], dtype=np.int64),
            input_ids=torch.cat([torch.from_numpy(prompts), right([t.response_ids for t in trajectories])], dim=1),
            prompt_lengths=torch.tensor([len(t.request.prompt_ids) for t in trajectories]),
            response_lengths=torch.tensor([len(t) for t in trajectories]),
            response_mask=right([t.action_mask for t in trajectories]),
            cut=torch.tensor([t.finish_reason == "length" for t in trajectories]),
            rollout_logprobs=right([t.rollout_logprobs for t in trajectories]),
            policy_version=right([t.policy_version for t in trajectories]),
            component_rewards={n: right([t.component_rewards[n] for t in trajectories]) for n in names},
            component_mask={n: right([t.component_mask[n] for t in trajectories]) for n in names},
        )

    def fill(self, **tensors: Tensor) -> "TrainBatch":
        """The batch with further streams; each may be written once."""
        for name in tensors:
            assert getattr(self, name) is None, f"{name} is written twice"
        return replace(self, **tensors)

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
                return {key: value[at, :new_t] for key, value in x.items()}
            if isinstance(x, Tensor):
                return x[at, :new_t] if x.ndim == 2 else x[at]
            return x

        assert new_t <= t
        return replace(self, **{f.name: pick(f.name, getattr(self, f.name)) for f in fields(self)})

    def to(self, device: torch.device) -> "TrainBatch":
        moved = {}
        for f in fields(self):
            x = getattr(self, f.name)
            if isinstance(x, Tensor):
                moved[f.name] = x.to(device)
            elif isinstance(x, dict):
                moved[f.name] = {key: value.to(device) for key, value in x.items()}
        return replace(self, **moved)

    def mini_batches(
        self, n_mini: int, *, seed: int, step: int, epoch: int, gather: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[np.ndarray]:
        """Row indices of this rank in each mini-batch.

        Membership is a function of (seed, step, epoch, ordinal, k) alone: a hash sorts all samples of all ranks, and
        the sorted list is cut into `n_mini` parts of equal size.

        Args:
            gather: [B, 2] orders of this rank -> [all, 2] orders of every rank.
        """

        def key(order: np.ndarray) -> bytes:
            text = f"{seed}/{step}/{epoch}/{order[0]}/{order[1]}"
            return hashlib.blake2b(text.encode(), digest_size=8).digest()

        everyone = sorted(map(tuple, gather(self.order).tolist()), key=key)
        mine = {tuple(order): row for row, order in enumerate(self.order.tolist())}
        for part in np.array_split(np.arange(len(everyone)), n_mini):
            members = [mine[everyone[i]] for i in part if everyone[i] in mine]
            yield np.array(members, dtype=np.int64)

    def micro_batches(self, index: np.ndarray, size: int) -> Iterator["TrainBatch"]:
        """The rows of `index` in pieces of at most `size`, longest together, so that little is padding."""
        lengths = (self.prompt_lengths + self.response_lengths)[torch.from_numpy(index)].numpy()
        by_length = index[np.argsort(-lengths, kind="stable")]
        for start in range(0, len(index), size):
            yield self.rows(by_length[start : start + size])
