"""What `rollout.round_tokens` has under way, in a checkpoint: a Parquet file for each learner rank."""

import json
from typing import TYPE_CHECKING

from core.schema import Config
from core.trajectory import Trajectory
from core.under_way import Saved, UnderWay, deal
from rollout.prompts import PromptStream
from rollout.rounds import RoundPlan
from trainer.backlog import READY

if TYPE_CHECKING:
    from trainer.checkpoint import Checkpoint


def file_of(rank: int) -> str:
    """Its path in the folder of a checkpoint."""
    return f"under_way/rank-{rank}.parquet"


def refuse_columns(cfg: Config, prompts: PromptStream) -> None:
    """Raise UserError for rows that no checkpoint could give back; of augmented ones the first is looked at."""
    if not cfg.rollout.in_rounds:
        return
    from core.trajectory_table import json_text

    rows = zip(prompts.rows, prompts.places, strict=True)
    if cfg.data.augment is not None:
        rows = [(prompts.first(1)[0].columns, f"data.augment = {cfg.data.augment}: prompt 0")]
    for row, where in rows:
        json_text(row, f"rollout.round_tokens = {cfg.rollout.round_tokens}: {where}")


def read(saved: "Checkpoint", plan: RoundPlan) -> tuple[UnderWay, list[Trajectory]]:
    """What this rank has under way, and all its responses; of another number of ranks they are dealt out anew."""
    of_ranks = [_read(saved, rank) for rank in range(saved.state["ranks"])]
    trajectories, ready = deal(of_ranks, plan.n_ranks, plan.rank, plan.owner)
    return UnderWay.restored(trajectories, ready), trajectories


def _read(saved: "Checkpoint", rank: int) -> Saved:
    import pyarrow.parquet

    from core.trajectory_table import from_table

    table = pyarrow.parquet.read_table(saved.folder / file_of(rank))
    return from_table(table), json.loads(table.schema.metadata[READY])
