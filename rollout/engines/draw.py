"""Tokens drawn by compiled code (compiled_draw.cpp), on a CPU: what sampling.py draws.

A vocabulary of 150,000 ids costs sampling.py as much as some steps of the model: it looks at all of them ten times, in
float64, and sorts thousands of them where they are filtered. Here it is a few looks in float32, whose sums are added up
in float64.

Legend: B rows, V vocabulary.
"""

from ctypes import c_double, c_float, c_int64, c_void_p

import numpy as np
import torch
from torch import Tensor

from rollout.engines import compiler
from rollout.engines.compiler import NotCompiled
from rollout.engines.sampling import Filters, sample

TOLERANCE = 1e-5  # of probabilities and log-probs, against sampling in float64
ASKED = (5, 320, 4099)  # ids of the distributions that are drawn from to see whether it is right
CPU = torch.device("cpu")
NONE = Filters()


class CompiledDraw:
    """Called as `sampling.sample` is: token [B] int64, log-prob [B] float32, and with filters the kept ids of each row
    (int32, ascending). A filter may keep an id at its very edge that sampling.py does not, or the other way round: the
    last digits decide there."""

    def __init__(self) -> None:
        """Raises compiler.NotCompiled where there is no compiler, or what it made draws other tokens."""
        self._draw = compiler.load(compiler.DRAW).draw
        self._draw.restype = None
        asked = [(ids, filters) for ids in ASKED for filters in (None, Filters(top_k=ids // 2, top_p=0.8, min_p=0.01))]
        if not all(self._is_right(ids, filters) for ids, filters in asked):
            raise NotCompiled(f"{compiler.DRAW.name}, compiled, draws other tokens")

    @staticmethod
    def fits(temperature: float) -> bool:
        """Whether logits over it are numbers of float32 too."""
        return 1e-20 < temperature < 1e20

    def __call__(
        self, logits: Tensor, random: Tensor, temperature: float, filters: Filters | None = None
    ) -> tuple[Tensor, Tensor, list[np.ndarray] | None]:
        """`logits` [B, V] of any dtype and `random` [B] float64 in [0, 1), on a CPU."""
        logits, random = logits.float().contiguous(), random.contiguous()
        rows, ids = logits.shape
        assert ids and random.shape == (rows,) and random.dtype == torch.float64, (logits.shape, random)
        assert logits.device == random.device == CPU and self.fits(temperature), (logits.device, temperature)
        token = torch.empty(rows, dtype=torch.long, device=CPU)
        logprob = torch.empty(rows, dtype=torch.float32, device=CPU)
        kept = None if filters is None else np.empty((rows, ids), dtype=np.int32)  # touched as far as ids are kept
        n_kept = None if filters is None else np.empty(rows, dtype=np.int64)
        of = filters or NONE
        self._draw(
            c_void_p(logits.data_ptr()),
            c_int64(rows),
            c_int64(ids),
            c_void_p(random.data_ptr()),
            c_float(temperature),
            c_void_p(token.data_ptr()),
            c_void_p(logprob.data_ptr()),
            c_int64(of.top_k or 0),
            c_double(of.top_p),
            c_double(of.min_p),
            *(c_void_p(None if x is None else x.ctypes.data) for x in (kept, n_kept)),
            c_int64(torch.get_num_threads()),
        )
        return token, logprob, None if kept is None else [row[:n].copy() for row, n in zip(kept, n_kept, strict=True)]

    def _is_right(self, ids: int, filters: Filters | None) -> bool:
        """By the distribution itself: at the edge of an id float32 may draw its neighbour. And by the kept ids: of one
        row an edge may fall otherwise."""
        rng, temperature = torch.Generator(CPU).manual_seed(0), 0.7
        logits = 4 * torch.randn(40, ids, generator=rng, dtype=torch.float32, device=CPU)
        random = torch.rand(40, generator=rng, dtype=torch.float64, device=CPU)
        token, logprob, kept = self(logits, random, temperature, filters)
        if bool(((token < 0) | (token >= ids)).any()):
            return False
        same = torch.ones(40, dtype=torch.bool, device=CPU)
        heated = logits.double() / temperature
        if kept is not None:
            _, _, keep = sample(logits, random, temperature, filters)
            found = torch.zeros_like(keep)
            for row, of_row in zip(found, kept, strict=True):
                row[torch.from_numpy(of_row).long()] = True
            same, heated = (found == keep).all(-1), heated.masked_fill(~found, -torch.inf)
        logp = torch.log_softmax(heated, dim=-1)
        at, edges = token[:, None], logp.exp().cumsum(-1)
        end, before = edges.gather(1, at)[:, 0], (edges - logp.exp()).gather(1, at)[:, 0]
        off = torch.stack([before - random, random - end, (logprob - logp.gather(1, at)[:, 0]).abs()])
        return bool((off <= TOLERANCE).all()) and int(same.sum()) >= 39
