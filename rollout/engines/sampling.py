"""Drawing tokens: temperature, filters, and the inverse of the distribution function.

    logits ──/ temperature──> top-k ──> top-p ──> min-p ──> softmax of what is kept ──> token, log-prob, kept ids

The filters come in the order of transformers, and each looks at the distribution that the one before it has left. The
log-prob is that of the distribution that was drawn from. The learner cannot find it by filtering its own logits, which
differ in the last bits and now and then by an id at the edge: the kept ids themselves go with the response.

Legend: B rows, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.logprobs import logprobs_from_logits


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which ids a token may be drawn from. At least the most probable one is kept; equal logits are never told apart by
    chance."""

    top_k: int | None = None  # the k most probable ids, and those as probable as the last of them
    top_p: float = 1.0  # the fewest ids whose probabilities reach it; of equal ones the higher ids
    min_p: float = 0.0  # ids at least this fraction as probable as the most probable one

    def keep(self, heated: Tensor) -> Tensor:
        """[B, V] float64 logits, after temperature -> [B, V] bool."""
        keep = heated > -torch.inf
        if self.top_k is not None and self.top_k < heated.shape[-1]:
            keep &= heated >= heated.topk(self.top_k).values[:, -1:]
        if self.top_p < 1:
            keep &= _nucleus(heated.masked_fill(~keep, -torch.inf).softmax(-1), self.top_p)
        if self.min_p > 0:  # a ratio of probabilities: what the other filters left out does not change it
            keep &= heated >= heated.amax(-1, keepdim=True) + math.log(self.min_p)
        return keep


def _nucleus(p: Tensor, top_p: float) -> Tensor:
    """[B, V] probabilities -> [B, V] bool: an id stays while those before it, the more probable ones, miss `top_p`."""
    ids = _candidates(p, top_p)
    ascending, order = (p if ids is None else p.gather(-1, ids)).sort(dim=-1, stable=True)
    before = ascending.flip(-1).cumsum(-1).flip(-1) - ascending
    order = order if ids is None else ids.gather(-1, order)
    return torch.zeros_like(p, dtype=torch.bool).scatter_(-1, order, before < top_p)


def _candidates(p: Tensor, top_p: float) -> Tensor | None:
    """[B, n] ascending ids, among them all that stay; None: all ids. To sort a large V takes far longer."""
    for n in (128, 1024, 8192):
        if 4 * n > p.shape[-1]:
            break
        most, ids = p.topk(n, sorted=False)
        # Which of those that equal the last one are among them is left to chance: they must not be needed.
        sure = most > most.amin(-1, keepdim=True)
        if bool(((most * sure).sum(-1) >= top_p).all()):
            return ids.sort(dim=-1).values
    return None


def sets_of(keep: Tensor) -> list[np.ndarray]:
    """[B, V] bool -> the ids of each row, int32 and ascending."""
    ids = keep.nonzero()[:, 1].int().cpu().numpy()
    return np.split(ids, keep.sum(-1).cumsum(-1)[:-1].cpu().numpy())


def sample(
    logits: Tensor, random: Tensor, temperature: float, filters: Filters | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inverse-CDF sampling from softmax(logits / temperature) over the ids that the filters keep.

    Args:
        logits: [B, V].
        random: [B] float64 in [0, 1).
    Returns:
        token [B] int64, its log-prob [B] float32 under the very distribution that was sampled from, and the kept ids
        as [B, V] bool (None without filters).
    """
    heated = logits.double() / temperature
    keep = None
    if filters is not None:
        keep = filters.keep(heated)
        heated = heated.masked_fill(~keep, -torch.inf)
    cdf = torch.softmax(heated, dim=-1).cumsum(-1)
    # right=True never picks a token of probability 0; the last entry scales away the rounding of the sum.
    token = torch.searchsorted(cdf, (random * cdf[:, -1]).unsqueeze(-1), right=True).clamp(max=logits.shape[-1] - 1)
    of_kept = None if keep is None else keep.unsqueeze(1)
    logprob = logprobs_from_logits(logits.unsqueeze(1), token, temperature, of_kept).squeeze(-1).float()
    return token.squeeze(-1), logprob, keep
