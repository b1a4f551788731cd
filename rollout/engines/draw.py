"""Tokens drawn by compiled code (compiled_draw.cpp) on a CPU: what sampling.py draws where nothing is filtered.

A vocabulary of 150,000 ids costs sampling.py as much as a step of half a billion parameters: it looks at all of them
ten times, in float64. Here it is two looks in float32, whose sums are added up in float64.

Legend: B rows, V vocabulary.
"""

from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from rollout.engines import compiler
from rollout.engines.compiler import NotCompiled

TOLERANCE = 1e-5  # of probabilities and log-probs, against sampling in float64
ASKED = (5, 320, 4099)  # ids of the distributions that are drawn from to see whether it is right
CPU = torch.device("cpu")


class CompiledDraw:
    """Called as `sampling.sample` is, without filters: token [B] int64 and log-prob [B] float32."""

    def __init__(self) -> None:
        """Raises compiler.NotCompiled where there is no compiler, or what it made draws other tokens."""
        self._draw = compiler.load(compiler.DRAW).draw
        self._draw.restype = None
        if not all(map(self._is_right, ASKED)):
            raise NotCompiled(f"{compiler.DRAW.name}, compiled, draws other tokens")

    @staticmethod
    def fits(temperature: float) -> bool:
        """Whether logits over it are numbers of float32 too."""
        return 1e-20 < temperature < 1e20

    def __call__(self, logits: Tensor, random: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """`logits` [B, V] of any dtype and `random` [B] float64 in [0, 1), on a CPU."""
        logits, random = logits.float().contiguous(), random.contiguous()
        rows, ids = logits.shape
        assert ids and random.shape == (rows,) and random.dtype == torch.float64, (logits.shape, random)
        assert logits.device == random.device == CPU and self.fits(temperature), (logits.device, temperature)
        token = torch.empty(rows, dtype=torch.long, device=CPU)
        logprob = torch.empty(rows, dtype=torch.float32, device=CPU)
        sizes, threads = (c_int64(rows), c_int64(ids)), c_int64(torch.get_num_threads())
        given, drawn = (logits, random), (token, logprob)
        first, second, third, fourth = (c_void_p(x.data_ptr()) for x in (*given, *drawn))
        self._draw(first, *sizes, second, c_float(temperature), third, fourth, threads)
        return token, logprob

    def _is_right(self, ids: int) -> bool:
        """By the distribution itself: at the edge of an id float32 may draw its neighbour."""
        rng, temperature = torch.Generator(CPU).manual_seed(0), 0.7
        logits = 4 * torch.randn(40, ids, generator=rng, dtype=torch.float32, device=CPU)
        random = torch.rand(40, generator=rng, dtype=torch.float64, device=CPU)
        token, logprob = self(logits, random, temperature)
        if bool(((token < 0) | (token >= ids)).any()):
            return False
        logp = torch.log_softmax(logits.double() / temperature, dim=-1)
        at, edges = token[:, None], logp.exp().cumsum(-1)
        end, before = edges.gather(1, at)[:, 0], (edges - logp.exp()).gather(1, at)[:, 0]
        off = torch.stack([before - random, random - end, (logprob - logp.gather(1, at)[:, 0]).abs()])
        return bool((off <= TOLERANCE).all())
