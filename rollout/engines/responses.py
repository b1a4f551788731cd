"""Responses while they are written, on the device of the model: ids, log-probs, values, where each ends.

Legend: B requests, S slots, E of them that have ended, V vocabulary. Lengths are recorded, never read off ids.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.trajectory import KeptTokens, PromptRequest
from rollout.engines.engine import Begun, Generation


def uniforms(request: PromptRequest, n: int) -> np.ndarray:
    """[n] float64 in [0, 1): number t decides token t. Counter based: a function of (seed, ordinal, k, t)."""
    key = np.array([request.seed, (request.ordinal << 20) | request.k], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(n)


@dataclass(frozen=True)
class Responses:
    """What is being written, on the device of the model. With values there is a column more than steps: what comes
    behind a full response is written there, and its value is the bootstrap."""

    steps: int
    random: Tensor  # [B, steps] float64: number t decides token t
    ids: Tensor  # [B, columns]
    logprobs: Tensor  # [B, columns]
    limits: Tensor  # [B] of its tokens, where each is left
    lengths: Tensor  # [B]
    stopped: Tensor  # [B] bool
    begun: Tensor  # [B] tokens that were there before
    turn: Tensor  # [B] where the turn that is written starts
    values: Tensor | None  # [B, columns] of the states before them
    kept: list[list[np.ndarray]] | None  # of each request, of each token: the ids it was drawn from; None: no filter

    @classmethod
    def of(
        cls,
        requests: list[PromptRequest],
        begun: list[Begun | None],
        steps: int,
        device: torch.device,
        *,
        filtered: bool,
        most: int | None,
        valued: bool,
    ) -> "Responses":
        n, columns = len(requests), steps + valued
        ids, logprobs = torch.zeros((n, columns), dtype=torch.long), torch.zeros((n, columns), dtype=torch.float32)
        starts = torch.zeros(n, dtype=torch.long)
        turn = torch.tensor([0 if start is None else start.turn for start in begun], dtype=torch.long)
        kept: list[list[np.ndarray]] = [[] for _ in requests]
        for i, start in enumerate(begun):
            if start is not None:
                starts[i] = len(start.response_ids)
                assert starts[i] < steps, f"a response of {steps} tokens was begun with {starts[i]}"
                ids[i, : starts[i]] = torch.tensor(start.response_ids)
                logprobs[i, : starts[i]] = torch.tensor(start.logprobs)
                if filtered:
                    kept[i] = [start.kept[t] for t in range(len(start.kept))]
        limits = torch.full((n,), steps) if most is None else (starts + most).clamp(max=steps)
        return cls(
            steps=steps,
            random=torch.from_numpy(np.stack([uniforms(r, steps) for r in requests])).to(device),
            ids=ids.to(device),
            logprobs=logprobs.to(device),
            limits=limits.to(device),
            lengths=limits.to(device, copy=True),
            stopped=torch.zeros(n, dtype=torch.bool, device=device),
            begun=starts.to(device),
            turn=turn.to(device),
            values=torch.zeros((n, columns), device=device) if valued else None,
            kept=kept if filtered else None,
        )

    def write(
        self,
        request: Tensor,
        number: Tensor | int,
        token: Tensor,
        logprob: Tensor,
        kept: list[np.ndarray] | None,
        value: Tensor | None,
    ) -> None:
        """Token `number` of each `request`, all [B], and the ids that each was drawn from."""
        self.ids[request, number], self.logprobs[request, number] = token, logprob
        if value is not None:
            self.values[request, number] = value
        if kept is not None:
            for row, ids in zip(request.tolist(), kept, strict=True):
                self.kept[row].append(ids)

    def generations(self, ended: Tensor) -> Iterator[tuple[int, Generation]]:
        """Of the requests `ended` [E], with their numbers, by these."""
        ended = ended.sort().values
        ids, logprobs = self.ids[ended].cpu().numpy(), self.logprobs[ended].cpu().numpy()
        values = None if self.values is None else self.values[ended].cpu().numpy()
        rows = (ended.tolist(), self.lengths[ended].tolist(), self.stopped[ended].tolist())
        for row, (i, length, stop) in enumerate(zip(*rows, strict=True)):
            yield (
                i,
                Generation(
                    response_ids=ids[row, :length].copy(),
                    logprobs=logprobs[row, :length].copy(),
                    finish_reason="stop" if stop else "length" if length == self.steps else None,
                    kept=None if self.kept is None else KeptTokens.of(self.kept[i][:length]),
                    values=None if values is None else values[row, :length].copy(),
                    bootstrap=None if values is None or stop else float(values[row, length]),
                ),
            )
