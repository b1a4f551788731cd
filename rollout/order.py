"""Which row each prompt of the endless stream is: pure functions of (groups, seed, ordinal), of the rows left out, and
of the difficulties that were measured before an epoch began.

Rows fall into groups: one for each dataset of a mixture and each value of the balanced column, else one of all. Two
steps lead from an ordinal to a row, and each can be computed by any process for any ordinal:

1. The group. Ordinals come in blocks of BLOCK. Block b shares its places out by systematic sampling: the points
   (i + v_b) / BLOCK, i = 0 .. BLOCK - 1, fall into the intervals [C_(g-1), C_g) of the cumulative shares, and v_b =
   frac(v_0 + b * golden ratio) is a Weyl sequence, which spreads evenly (Niederreiter 1992, chapter 3). So each
   group has floor or ceil of BLOCK * share places in every block. A random order within the block follows.
2. The row. The m-th draw of a group belongs to an epoch of that group, a permutation of its rows by (seed, epoch,
   group). In the first epochs a curriculum sorts by (1 - e/E) * rank/n + e/E * uniform; and rows that were left out are
   missing from later epochs. Measured difficulties sort E epochs from the second on, by what was known when the first
   ordinal of the epoch was asked for: that is kept, so what comes to be known later moves nothing that was drawn.

Legend: G groups, N rows, n rows of one group.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 128
GOLDEN = (5**0.5 - 1) / 2
MAX_GROUPS = 1024  # more are no classes but single rows, and each block shares out BLOCK places only
STAYS = np.iinfo(np.int64).max
# Last word of the seeds of what is drawn besides permutations of rows, so that no two draws share numbers.
OF_BLOCKS, OF_OFFSET, OF_AUGMENTATION = 1, 2, 3


@dataclass(frozen=True)
class Group:
    rows: np.ndarray  # [n] int64, in the order of the files
    share: float  # of all prompts


def make_groups(
    source_of: Sequence[int], weights: Sequence[float], classes: Sequence[Hashable] | None, balance: float
) -> list[Group]:
    """Groups of rows with the share of the prompts that each gets; the shares sum to 1.

    A dataset gets its share of the weights. Within it a class with n rows is drawn in proportion to n^(1 - balance).

    Args:
        source_of: [N] which dataset each row is of.
        weights: of the datasets.
        classes: [N] value of the balanced column of each row; None: nothing is balanced.

    Example: 8 rows of `a` and 2 of `b` in one dataset, balance 0.5: 8^0.5 / (8^0.5 + 2^0.5) = 2/3 and 1/3.
    """
    if classes is None or balance == 0:
        classes = [None] * len(source_of)
    members: dict[tuple[int, Hashable], list[int]] = {}
    for row, key in enumerate(zip(source_of, classes, strict=True)):
        members.setdefault(key, []).append(row)
    pull = {key: len(rows) ** (1.0 - balance) for key, rows in members.items()}
    of_source = {source: sum(p for key, p in pull.items() if key[0] == source) for source, _ in members}
    whole = sum(weights[source] for source in of_source)
    return [
        Group(np.array(rows, dtype=np.int64), weights[key[0]] / whole * pull[key] / of_source[key[0]])
        for key, rows in members.items()
    ]


class Order:
    """Row of each ordinal. Its state is `left_out`, and `measured` where difficulties are."""

    def __init__(
        self,
        groups: list[Group],
        *,
        seed: int,
        shuffle: bool,
        difficulty: Sequence[float] | None = None,
        curriculum_epochs: int = 1,
        measures: bool = False,
    ) -> None:
        """`difficulty`: [N], low for easy; None: no curriculum by it. `measures`: see data.measure_difficulty."""
        self.groups, self._seed, self._shuffle = groups, seed, shuffle
        n_rows = sum(len(group.rows) for group in groups)
        self._group_of = np.zeros(n_rows, dtype=np.int64)
        for g, group in enumerate(groups):
            self._group_of[group.rows] = g
        self._leaves = np.full(n_rows, STAYS)
        self._difficulty = None if difficulty is None else np.asarray(difficulty, dtype=np.float64)
        self._curriculum_epochs, self.measures = curriculum_epochs, measures
        self._measured = np.full(n_rows, np.nan)  # of the last visit of each row
        self._known: dict[tuple[int, int], np.ndarray] = {}  # (group, epoch) -> of its rows, when that epoch began
        # Rounded, so that the last bit of a machine's power function decides nothing.
        self._cumulative = np.round(np.cumsum([group.share for group in groups]), 12)
        self._cumulative[-1] = 1.0
        self._offset = float(np.random.default_rng([seed, 0, 0, OF_OFFSET]).random())
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None
        self._before = (0, np.zeros(len(groups), dtype=np.int64))  # block, draws of each group before it
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}  # group -> the epoch last asked for, its rows
        self._lengths: dict[int, list[tuple[int, int, int]]] = {}  # group -> stretches of epochs of one length

    @classmethod
    def of_all(cls, n_rows: int, *, seed: int, shuffle: bool) -> "Order":
        """Every row once in each epoch."""
        return cls([Group(np.arange(n_rows), 1.0)], seed=seed, shuffle=shuffle)

    @property
    def left_out(self) -> dict[int, int]:
        """Row -> the first epoch of its group that it is left out of."""
        return {int(row): int(self._leaves[row]) for row in np.flatnonzero(self._leaves != STAYS)}

    @left_out.setter
    def left_out(self, leaves: dict[int, int]) -> None:
        self._leaves[:] = STAYS
        for row, epoch in leaves.items():
            self._leaves[row] = epoch
        self._lengths.clear()
        self._epochs.clear()

    @property
    def measured(self) -> dict[str, list]:
        """Plain values: difficulties by row, and those by which the epochs under way are ordered."""
        rows = np.flatnonzero(~np.isnan(self._measured)).tolist()
        known = [[*key, [None if np.isnan(x) else x for x in of.tolist()]] for key, of in sorted(self._known.items())]
        return {"rows": [[row, float(self._measured[row])] for row in rows], "epochs": known}

    @measured.setter
    def measured(self, saved: dict[str, list]) -> None:
        self._measured[:] = np.nan
        for row, difficulty in saved["rows"]:
            self._measured[row] = difficulty
        self._known = {(g, e): np.array(of, dtype=np.float64) for g, e, of in saved["epochs"]}
        self._epochs.clear()

    def measure(self, row: int, difficulty: float) -> None:
        """How hard a row was found at this visit; counts from the next epoch of its group that nobody has begun."""
        self._measured[row] = difficulty

    def forget_before(self, ordinal: int) -> None:
        """Nobody will ask again for rows of ordinals below this one. A step may lie in several epochs of a group."""
        for g, epoch in list(self._known):
            drawn = self.drawn(g, ordinal)
            if drawn and epoch < self._epoch(g, drawn - 1)[0]:
                del self._known[g, epoch]

    def leave_out(self, rows: Iterable[int], position: int) -> None:
        """Leave rows out of all epochs of their groups that no ordinal below `position` has begun."""
        rows = np.array([row for row in rows if self._leaves[row] == STAYS], dtype=np.int64)
        for g in np.unique(self._group_of[rows]).tolist():
            drawn = self.drawn(g, position)
            self._leaves[rows[self._group_of[rows] == g]] = self._epoch(g, drawn - 1)[0] + 1 if drawn else 0
            self._lengths.pop(g, None)
            self._epochs.pop(g, None)

    def row_at(self, ordinal: int) -> int:
        """Which row prompt `ordinal` is."""
        g, m = self._draw(ordinal)
        epoch, place = self._epoch(g, m)
        if g not in self._epochs or self._epochs[g][0] != epoch:
            self._epochs[g] = (epoch, self._rows_in_order(g, epoch))
        return int(self._epochs[g][1][place])

    def drawn(self, g: int, position: int) -> int:
        """How many ordinals below `position` fall to group g."""
        if len(self.groups) == 1:
            return position
        block, i = divmod(position, BLOCK)
        kinds, _ = self._places(block)
        return int(self._drawn_before(block)[g] + np.count_nonzero(kinds[:i] == g))

    def _draw(self, ordinal: int) -> tuple[int, int]:
        """The group of an ordinal, and how many draws of that group come before it."""
        if len(self.groups) == 1:
            return 0, ordinal
        block, i = divmod(ordinal, BLOCK)
        kinds, numbers = self._places(block)
        return int(kinds[i]), int(numbers[i])

    def _places(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """[BLOCK] group of each place of a block, and the number of that draw within its group."""
        if self._block is None or self._block[0] != block:
            counts = np.diff(self._edges(np.array([block]))[0], prepend=0)
            kinds = np.random.default_rng([self._seed, block, 0, OF_BLOCKS]).permutation(
                np.repeat(np.arange(len(counts)), counts)
            )
            numbers, before = np.empty(BLOCK, dtype=np.int64), self._drawn_before(block)
            for g in np.unique(kinds):
                here = kinds == g
                numbers[here] = before[g] + np.arange(np.count_nonzero(here))
            self._block = (block, kinds, numbers)
        return self._block[1], self._block[2]

    def _edges(self, blocks: np.ndarray) -> np.ndarray:
        """[len(blocks), G] how many of the points of each block lie below C_g."""
        v = np.modf(self._offset + blocks * GOLDEN)[0]
        return np.ceil(BLOCK * self._cumulative[None, :] - v[:, None]).clip(0, BLOCK).astype(np.int64)

    def _drawn_before(self, block: int) -> np.ndarray:
        """[G] draws of each group in all blocks before this one; from where it was last asked for, or from 0."""
        at, total = self._before if self._before[0] <= block else (0, np.zeros(len(self.groups), dtype=np.int64))
        piece = max(1, 2**20 // len(self.groups))
        for start in range(at, block, piece):
            edges = self._edges(np.arange(start, min(block, start + piece)))
            total = total + np.diff(edges.sum(axis=0), prepend=0)
        self._before = (block, total)
        return total

    def _epoch(self, g: int, m: int) -> tuple[int, int]:
        """Epoch and place in it of draw m of group g."""
        if g not in self._lengths:
            self._lengths[g] = self._stretches(g)
        first, start, length = next(s for s in reversed(self._lengths[g]) if s[1] <= m)
        epochs, place = divmod(m - start, length)
        return first + epochs, place

    def _stretches(self, g: int) -> list[tuple[int, int, int]]:
        """(first epoch, draws before it, rows in each of its epochs), a new one wherever rows are left out."""
        rows = self.groups[g].rows
        leaves = np.sort(self._leaves[rows])
        firsts = [0, *(int(e) for e in np.unique(leaves) if 0 < e < STAYS)]
        found, start = [], 0
        for first, until in zip(firsts, [*firsts[1:], None], strict=True):
            length = (len(rows) - int(np.searchsorted(leaves, first, side="right"))) or len(rows)
            found.append((first, start, length))
            start += (until - first) * length if until is not None else 0
        return found

    def _rows_in_order(self, g: int, epoch: int) -> np.ndarray:
        """The rows of one epoch of a group. Where all are left out, all are back: there is nothing else to draw."""
        rows = self.groups[g].rows
        stay = self._leaves[rows] > epoch
        if not stay.any():
            stay[:] = True
        rows = rows[stay]
        if not self._shuffle:
            return rows
        rng = np.random.default_rng([self._seed, epoch, g])
        difficulty, ordered = self._difficulty_in(g, epoch), epoch
        if self.measures and epoch:
            ordered -= 1  # the first epoch that a measure orders is the second
        if difficulty is None or ordered >= self._curriculum_epochs:
            return rng.permutation(rows)
        noise, looseness = rng.random(len(rows)), ordered / self._curriculum_epochs
        value = difficulty[stay]
        rank = np.searchsorted(np.sort(value), value) / len(rows)  # equally hard rows have one rank
        return rows[np.lexsort((noise, (1 - looseness) * rank + looseness * noise))]

    def _difficulty_in(self, g: int, epoch: int) -> np.ndarray | None:
        """[n] difficulty of each row of a group by which one of its epochs is ordered; None: there is none."""
        rows = self.groups[g].rows
        if not self.measures or epoch == 0:
            return None if self._difficulty is None else self._difficulty[rows]
        if (g, epoch) not in self._known:
            later = [e for group, e in self._known if group == g and e > epoch]
            assert not later, f"epoch {epoch} of group {g} is over: what was known when it began is kept no longer"
            self._known[g, epoch] = self._measured[rows]
        known = self._known[g, epoch]
        if np.isnan(known).all():
            return None
        return np.where(np.isnan(known), np.nanmedian(known), known)  # one that was never answered is in the middle
