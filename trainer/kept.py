"""What the tokens of a micro-batch were drawn from, where the engine filtered: log-probs are over these ids alone.

Policy, old policy and reference are all taken over the set that the engine recorded, none finds one of its own: at the
edge of a filter the last bits of the logits decide, and a ratio would compare distributions over different ids.

Legend: S samples, T response width, M scored tokens, c of them in a chunk, V vocabulary, K kept ids of all M tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.trajectory import KeptTokens


@dataclass(frozen=True, kw_only=True)
class KeptSets:
    """Example, M = 2, the first token drawn from three ids and the second from one:

    ids [4, 9, 250, 13]    token [0, 0, 0, 1]    starts [0, 3, 4]
    """

    ids: Tensor  # [K] int64
    token: Tensor  # [K] int64, which of the M tokens each id belongs to
    starts: np.ndarray  # [M + 1] int64, on the CPU: to cut a chunk out waits for no device

    @classmethod
    def of(cls, rows: Sequence[KeptTokens], mask: Tensor, device: torch.device) -> "KeptSets":
        """Those of the scored tokens, row by row: `mask` [S, T] bool."""
        scored = [np.flatnonzero(valid) for valid in mask.cpu().numpy()]
        sets = KeptTokens.of([row[t] for row, places in zip(rows, scored, strict=True) for t in places.tolist()])
        token = np.repeat(np.arange(len(sets)), np.diff(sets.starts))
        ids, token = (torch.from_numpy(x.astype(np.int64)).to(device) for x in (sets.ids, token))
        return cls(ids=ids, token=token, starts=sets.starts)

    def keep(self, at: slice, n_vocab: int) -> Tensor:
        """[c, V] bool of some of the tokens, one after the other."""
        start, stop, _ = at.indices(len(self.starts) - 1)
        first, last = self.starts[start], self.starts[stop]
        keep = torch.zeros((stop - start, n_vocab), dtype=torch.bool, device=self.ids.device)
        keep[self.token[first:last] - start, self.ids[first:last]] = True
        return keep
