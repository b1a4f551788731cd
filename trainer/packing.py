"""Rows of a batch as one sequence without padding, each prompt once, and attention over its segments.

Legend: N tokens of the sequence, S samples (rows), M tokens that are scored (the valid response tokens), H heads, D
head width. Example of two samples of one prompt "5 6 7", responses "8 9" and "4":

    ids        5 6 7 | 8 9 | 4          positions  0 1 2 | 3 4 | 3
    segments   the prompt sees itself; each response sees the prompt and itself
    state_at   2 3 2                    where the state before each scored token stands (twice the prompt's last)
    token      8 9 4                    the scored tokens
    after_at   4 5                      the state after each response

A sample that shares its prompt with no other is one segment, prompt and response together. On a GPU the segments are
what variable-length attention takes; elsewhere segments of like length are attended in one call.
"""

import inspect
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

ATTENTION = "tokenppo_segments"  # name of our attention function in transformers
_WASTE = 0.15  # share of padding that a group of segments may have before it is cut in two
_MOST_SCORES = 1 << 25  # entries of one mask: more segments than fit go into the next call


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Segments of like length that are attended in one call, padded among themselves."""

    queries: Tensor | None  # [G * Lq] rows of the sequence, padding points at row 0; None: the sequence as it stands
    keys: Tensor | None  # [G * Lk] rows that the queries see; None: the queries themselves, causally
    mask: Tensor | None  # [G, 1, Lq, Lk] bool; None where `keys` is
    size: int  # G
    valid: Tensor | None  # which of the G * Lq outputs count; None: all


@dataclass(frozen=True, kw_only=True)
class _Varlen:
    """The same for a kernel that takes lengths: queries are the whole sequence in order, keys are gathered."""

    keys: Tensor | None  # [sum of key lengths] rows of the sequence; None: the sequence itself
    q_starts: Tensor  # [segments + 1] int32, cumulative
    k_starts: Tensor  # [segments + 1] int32
    longest_q: int
    longest_k: int


class Segments:
    """Who sees whom in a packed sequence. `spans`: (start, length, prompt start, prompt length), the last two 0 for a
    segment that sees itself alone."""

    def __init__(self, spans: np.ndarray, device: torch.device) -> None:
        self._spans, self._device = spans, device  # [segments, 4] int64

    @cached_property
    def groups(self) -> tuple[list[_Group], Tensor | None]:
        """The groups, and where in their concatenated outputs each row of the sequence stands (None: in order)."""
        spans, groups, rows = self._spans, [], []
        for alone in (True, False):
            kind = spans[(spans[:, 3] == 0) == alone]
            # Longest first; those of one length stay in order, so that a batch of one length needs no gather at all.
            kind = kind[np.lexsort((kind[:, 0], -kind[:, 1], -kind[:, 1] - kind[:, 3]))]
            start = 0
            while start < len(kind):
                stop = self._group_end(kind, start)
                group, of_rows = self._group(kind[start:stop], alone)
                groups.append(group)
                rows.append(of_rows)
                start = stop
        order = np.concatenate(rows)
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        in_order = bool((inverse == np.arange(len(order))).all())
        return groups, None if in_order else torch.from_numpy(inverse).to(self._device)

    @staticmethod
    def _group_end(spans: np.ndarray, start: int) -> int:
        widest_k, widest_q, used, stop = 0, 0, 0, start
        while stop < len(spans):
            q, k = int(spans[stop, 1]), int(spans[stop, 1] + spans[stop, 3])
            widest_q, widest_k = max(widest_q, q), max(widest_k, k)
            n, used = stop - start + 1, used + q + k
            padded = n * (widest_q + widest_k)
            if n > 1 and (padded - used > _WASTE * padded or n * widest_q * widest_k > _MOST_SCORES):
                break
            stop += 1
        return stop

    def _group(self, spans: np.ndarray, alone: bool) -> tuple[_Group, np.ndarray]:
        starts, lengths = spans[:, 0], spans[:, 1]
        width = int(lengths.max())
        column = np.arange(width)
        valid = column < lengths[:, None]  # [G, Lq]
        queries = np.where(valid, starts[:, None] + column, 0)
        rows = queries[valid]
        keys = mask = None
        if not alone:
            prompts, n_prompt = spans[:, 2], spans[:, 3]
            widest = int((n_prompt + lengths).max())
            at = np.arange(widest)
            in_prompt = at < n_prompt[:, None]
            in_response = ~in_prompt & (at < (n_prompt + lengths)[:, None])
            keys = np.where(in_prompt, prompts[:, None] + at, starts[:, None] + at - n_prompt[:, None])
            keys = np.where(in_prompt | in_response, keys, 0)
            # Query j of a response sees the whole prompt and the response up to itself; a padded query sees key 0.
            mask = at[None, None, :] <= (n_prompt[:, None] + column)[:, :, None]
            mask &= (in_prompt | in_response)[:, None, :]
        group = _Group(
            queries=None if self._is_whole(queries) else self._tensor(queries.reshape(-1)),
            keys=None if keys is None else self._tensor(keys.reshape(-1)),
            mask=None if mask is None else self._tensor(mask[:, None]),
            size=len(spans),
            valid=None if valid.all() else self._tensor(np.flatnonzero(valid)),
        )
        return group, rows

    def _is_whole(self, rows: np.ndarray) -> bool:
        """Whether `rows` are all rows of the sequence in order."""
        n = int((self._spans[:, 0] + self._spans[:, 1]).max())
        return rows.size == n and bool((rows.reshape(-1) == np.arange(n)).all())

    @cached_property
    def varlen(self) -> _Varlen:
        spans = self._spans[np.argsort(self._spans[:, 0], kind="stable")]
        q_lengths, k_lengths = spans[:, 1], spans[:, 1] + spans[:, 3]
        shared = bool(spans[:, 3].any())
        keys = np.concatenate([np.r_[p : p + n, s : s + t] for s, t, p, n in spans]) if shared else None
        return _Varlen(
            keys=None if keys is None else self._tensor(keys),
            q_starts=self._tensor(np.r_[0, q_lengths.cumsum()].astype(np.int32)),
            k_starts=self._tensor(np.r_[0, k_lengths.cumsum()].astype(np.int32)),
            longest_q=int(q_lengths.max()),
            longest_k=int(k_lengths.max()),
        )

    def _tensor(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self._device)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A micro-batch as the policy reads it; see the example above."""

    ids: Tensor  # [1, N] int64
    positions: Tensor  # [1, N] int64
    segments: Segments
    state_at: Tensor  # [M] rows of the sequence
    token: Tensor  # [M] int64
    after_at: Tensor  # [S]
    row: Tensor  # [M] which sample each scored token belongs to
    column: Tensor  # [M] and which of its response tokens it is

    def __len__(self) -> int:
        """N, what a forward of the trunk costs."""
        return self.ids.shape[1]

    def unpack(self, flat: Tensor, shape: torch.Size | tuple[int, int]) -> Tensor:
        """[M] -> [S, T], 0 where nothing was scored."""
        out = flat.new_zeros(tuple(shape))
        out[self.row, self.column] = flat
        return out

    def pick(self, x: Tensor) -> Tensor:
        """[S, T] -> [M]."""
        return x[self.row, self.column]


def pack(
    ids: Tensor,
    prompt_lengths: Tensor,
    response_lengths: Tensor,
    response_mask: Tensor,
    device: torch.device | str = "cpu",
) -> Packed:
    """Rows of a padded batch (prompts on the left, responses on the right) -> one sequence.

    Args:
        ids: [S, P + T]; `response_mask` [S, T] says which response tokens are scored; lengths [S]. Rows whose prompts
            are the same, id by id, share one.
    """
    ids, mask = ids.cpu().numpy(), response_mask.cpu().numpy()
    n_prompts, n_responses = prompt_lengths.cpu().numpy(), response_lengths.cpu().numpy()
    p = ids.shape[1] - mask.shape[1]
    flat: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    spans: list[tuple[int, int, int, int]] = []
    starts = np.zeros(len(ids), dtype=np.int64)  # of each response
    lasts = np.zeros(len(ids), dtype=np.int64)  # of the prompt's last token
    n = 0
    of_prompt: dict[bytes, list[int]] = {}
    for row, n_prompt in enumerate(n_prompts.tolist()):
        of_prompt.setdefault(ids[row, p - n_prompt : p].tobytes(), []).append(row)
    for leader, *others in of_prompt.values():
        members = [leader, *others]
        n_prompt, prompt_start = int(n_prompts[leader]), n
        flat.append(ids[leader, p - n_prompt : p])
        positions.append(np.arange(n_prompt))
        n += n_prompt
        if len(members) > 1:
            spans.append((prompt_start, n_prompt, 0, 0))
        for row in members:
            t = int(n_responses[row])
            starts[row], lasts[row] = n, prompt_start + n_prompt - 1
            if len(members) > 1:
                spans += [(n, t, prompt_start, n_prompt)] if t else []
            else:
                spans.append((prompt_start, n_prompt + t, 0, 0))
            flat.append(ids[row, p : p + t])
            positions.append(np.arange(n_prompt, n_prompt + t))
            n += t
    rows, columns = np.nonzero(mask)
    at = starts[rows] + columns
    joined = np.concatenate(flat)

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    return Packed(
        ids=tensor(joined)[None],
        positions=tensor(np.concatenate(positions))[None],
        segments=Segments(np.array(spans, dtype=np.int64), torch.device(device)),
        state_at=tensor(np.where(columns > 0, at - 1, lasts[rows])),
        token=tensor(joined[at]),
        after_at=tensor(np.where(n_responses > 0, starts + n_responses - 1, lasts)),
        row=tensor(rows),
        column=tensor(columns),
    )


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    **other: object,
) -> tuple[Tensor, None]:
    """Attention of a packed sequence, in the form that transformers calls: query [1, H, N, D] -> [1, N, H, D].

    Raises NotImplementedError for what it does not compute (a window shorter than a segment, soft caps, biases, sinks).
    """
    for what in ("softcap", "s_aux", "position_bias"):
        if other.get(what) is not None:
            raise NotImplementedError(f"attention over segments has no {what}")
    if attention_mask is not None or query.shape[0] != 1:
        raise NotImplementedError("attention over segments takes one packed sequence and no mask")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = other.get("sliding_window")
    if window is not None and segments.varlen.longest_k > window:
        raise NotImplementedError(f"attention over segments has no window, and a segment is longer than {window}")
    if torch.is_autocast_enabled(
        query.device.type
    ):  # rotations leave float32 behind them, kernels want one narrow dtype
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # [N, H, D]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and _varlen_attn is not None:
        return _attend_varlen(*rows, segments.varlen, scale)[None], None
    return _attend_groups(*rows, segments.groups, scale)[None], None


def _attend_groups(q: Tensor, k: Tensor, v: Tensor, groups: tuple[list[_Group], Tensor | None], scale: float) -> Tensor:
    heads, kv_heads, width = q.shape[1], k.shape[1], q.shape[2]
    flat_q, flat_k, flat_v = (x.reshape(len(x), -1) for x in (q, k, v))
    outs = []
    for g in groups[0]:

        def gathered(flat: Tensor, at: Tensor | None, n_heads: int, g: _Group = g) -> Tensor:
            picked = flat if at is None else _Rows.apply(flat, at)
            return picked.view(g.size, -1, n_heads, width).transpose(1, 2)  # [G, H, L, D]

        keys = g.queries if g.keys is None else g.keys
        out = F.scaled_dot_product_attention(
            gathered(flat_q, g.queries, heads),
            gathered(flat_k, keys, kv_heads),
            gathered(flat_v, keys, kv_heads),
            attn_mask=g.mask,
            is_causal=g.mask is None,
            scale=scale,
            enable_gqa=heads != kv_heads,
        )
        out = out.transpose(1, 2).reshape(-1, heads * width)
        outs.append(out if g.valid is None else _Rows.apply(out, g.valid))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    inverse = groups[1]
    return (out if inverse is None else _Rows.apply(out, inverse)).view(-1, heads, width)


def take_rows(x: Tensor, at: Tensor) -> Tensor:
    """x[at], [N, W] and [M] -> [M, W]."""
    return _Rows.apply(x, at)


class _Rows(torch.autograd.Function):
    """x[at] for [N, W] x: autograd's own gradient of it on a CPU adds element by element, this one row by row."""

    @staticmethod
    def forward(ctx, x, at):  # noqa: ANN001, ANN205
        ctx.save_for_backward(at)
        ctx.n = len(x)
        return x.index_select(0, at)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        (at,) = ctx.saved_tensors
        return grad.new_zeros(ctx.n, grad.shape[1]).index_add_(0, at, grad.contiguous()), None


try:
    from torch.nn.attention.varlen import varlen_attn as _varlen_attn
except ImportError:  # an older torch: groups serve on a GPU too
    _varlen_attn = None


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, at: _Varlen, scale: float) -> Tensor:
    options = _varlen_options()
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in _VARLEN:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if at.keys is not None:
        k, v = (_Rows.apply(x.reshape(len(x), -1), at.keys).view(-1, *x.shape[1:]) for x in (k, v))
    q, k, v = (x.contiguous() for x in (q, k, v))
    return _varlen_attn(q, k, v, at.q_starts, at.k_starts, at.longest_q, at.longest_k, scale=scale, **options)


_VARLEN = inspect.signature(_varlen_attn).parameters if _varlen_attn is not None else {}


def _varlen_options() -> dict[str, object]:
    """Causal, aligned at the last query and key, in the words of this torch."""
    return {"window_size": (-1, 0)} if "window_size" in _VARLEN else {"is_causal": True}


AttentionInterface.register(ATTENTION, attend)
