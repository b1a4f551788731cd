"""Backlog: what `rollout.round_tokens` leaves behind a step, on one learner rank.

    rounds of step s ──> responses that are over ──> scored ──> the batch of step s
                                                     └ the others of their prompt are not over, or the batch is full:
                                                       they wait here, with their scores

Without rounds a batch is all that was asked for, and nothing is ever left.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from core.faults import InvariantFault
from core.metrics import AllReduce
from core.trajectory import Trajectory
from core.under_way import UnderWay, Written

if TYPE_CHECKING:
    import pyarrow as pa

READY = b"tokenppo.ready"  # in the metadata of the table: ordinals, the next one to be trained on first


class Backlog:
    def __init__(self, *, in_rounds: bool = False) -> None:
        self._in_rounds, self._rounds = in_rounds, 0
        self._under_way = UnderWay()
        self._scored: dict[str, Trajectory] = {}  # by uid, in no batch yet

    def restore(self, under_way: UnderWay, trajectories: Iterable[Trajectory]) -> None:
        """Go on with what a checkpoint has; of the trajectories those that are over."""
        self._under_way = under_way
        self._scored = {t.request.sample_uid: t for t in trajectories if t.finish_reason is not None}

    def batch(self, written: Written, scored: list[Trajectory]) -> list[Trajectory]:
        """The trajectories of a batch, by (ordinal, k), out of all that were scored since the last one and before.

        Raises InvariantFault for one that was not asked for, or came before.
        """
        uids = [t.request.sample_uid for t in scored]
        wanted = {r.sample_uid for r in written.requests}
        known = self._scored.keys() | (wanted | written.under_way.uids)
        if len({*uids}) != len(uids) or self._scored.keys() & {*uids} or not known.issuperset(uids):
            raise InvariantFault(f"of {len(uids)} scored samples some were not asked for, or came before")
        everything = self._scored | dict(zip(uids, scored, strict=True))
        self._scored = {uid: t for uid, t in everything.items() if uid not in wanted}
        self._under_way, self._rounds = written.under_way, written.rounds
        return sorted((everything[uid] for uid in wanted & everything.keys()), key=lambda t: t.order)

    def oldest(self, gather: Callable[[Any], list[Any]]) -> int | None:
        """The first prompt of all ranks that is under way; None where none is. `gather`: as Ranks.gather."""
        if not self._in_rounds:
            return None
        mine = min(self._under_way.prompts, default=None)
        return min((ordinal for ordinal in gather(mine) if ordinal is not None), default=None)

    def means(self, trained: Sequence[Trajectory], all_reduce: AllReduce) -> dict[str, float]:
        """partial/*, over all ranks; nothing without rounds. `trained`: the batch of this step."""
        if not self._in_rounds:
            return {}
        waiting = [*self._under_way.unfinished, *self._scored.values()]
        mine = [len(trained), sum(map(len, trained)), len(waiting), sum(map(len, waiting)), self._rounds, 1]
        n, tokens, n_waiting, tokens_waiting, rounds, ranks = all_reduce([float(x) for x in mine])
        ratio = tokens / n / ((tokens + tokens_waiting) / (n + n_waiting))
        return {
            "partial/waiting": n_waiting,
            "partial/length_ratio": ratio,
            "partial/rounds": rounds / ranks,
        }

    def table(self) -> "pa.Table":
        """For a checkpoint: each response under way, over or not, by (ordinal, k); and which prompts are ready."""
        from core.trajectory_table import to_table

        table = to_table(sorted([*self._under_way.unfinished, *self._scored.values()], key=lambda t: t.order))
        return table.replace_schema_metadata(
            table.schema.metadata | {READY: json.dumps(self._under_way.ready).encode()}
        )
