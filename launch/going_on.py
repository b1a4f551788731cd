"""Going on with the run that a folder holds: from which checkpoint, whether it fits, and what happens again."""

from pathlib import Path
from typing import Any

from core.faults import UserError
from core.plain_text import one_line
from launch import build, run_folder, trained
from launch.job import Job
from launch.trained import Trained
from trainer import checkpoint
from trainer.checkpoint import Checkpoint


def go_on_from(job: Job, found: run_folder.Found) -> Checkpoint | None:
    """The checkpoint to go on from, None to begin. On rank 0; changes nothing.

    Raises UserError where it does not fit this launch or these prompts.
    """
    if not found.started:
        return None
    cfg, folder, ranks = job.cfg, job.folder, job.ranks
    saved = checkpoint.latest(folder / run_folder.CHECKPOINTS)
    if saved is not None:
        engine = job.accelerator.distributed_type.value
        was, now = ((saved.state["ranks"], saved.state["engine"]), (ranks.size, engine))
        if was != now and "DEEPSPEED" in (was[1], now[1]):
            raise UserError(
                f"{saved.folder} was written by {was[0]} learner processes as {was[1]}, this launch has {now[0]} as"
                f" {now[1]}: DeepSpeed reads back only its own shards; launch as before, or give another --run.name"
            )
        held_out = f"data.eval_path = {cfg.data.eval_path}"
        was_fed, now_fed = saved.state["inputs"], fingerprints(job)
        for key, given in (("data.path", f"{cfg.data.key} = {cfg.data.label}"), ("data.eval_path", held_out)):
            if was_fed[key] != now_fed[key]:
                raise UserError(
                    f"{given}: its prompts are not those that the run in {folder} was begun with; put them"
                    " back, or give another --run.name"
                )
        if was_fed.get("augment") != now_fed["augment"]:
            raise UserError(
                f"data.augment = {cfg.data.augment}: its source is not what the run in {folder} was begun with, and it"
                " would make other prompts; put it back, or give another --run.name"
            )
        if was_fed.get("environment") != now_fed["environment"]:
            raise UserError(
                f"rollout.environment = {cfg.rollout.environment}: its source is not what the run in {folder} was begun"
                " with, and it would answer otherwise; put it back, or give another --run.name"
            )
        for name in was_fed["rewards"]:
            if was_fed["rewards"][name] != now_fed["rewards"][name]:
                job.console.print(
                    f"warning: rewards.{name}.fn = {cfg.rewards[name].fn}: its source is not what it was at step"
                    f" {saved.step}; from here on it pays by the new one",
                    markup=False,
                    soft_wrap=True,
                )
    return saved


def clear_the_way(job: Job, saved: Checkpoint | None) -> None:
    """Take out of the folder what happens again, or must not be used, and say so. On rank 0, which holds the folder."""

    def tell(text: str) -> None:
        job.console.print(one_line(text), markup=False, soft_wrap=True)

    folder, step = job.folder, saved.step if saved else 0
    for place, damage in saved.damaged if saved else ():
        aside = checkpoint.set_aside(place)
        tell(
            f"warning: the checkpoint {place} is damaged ({damage}); the one before it is used, it is {aside.name} now"
        )
    checkpoint.clear_leftovers(folder / run_folder.CHECKPOINTS)
    checkpoint.put_back(folder / "best")
    proof = Trained(**saved.state["trained"]) if saved else Trained()
    if wrong := trained.cut_to(folder, proof):
        tell(wrong)
    tell(_where_it_goes_on(folder, saved, run_folder.drop_after(folder, step)))


def _where_it_goes_on(folder: Path, saved: Checkpoint | None, dropped: int) -> str:
    text = f"going on from step {saved.step}" if saved else "it stopped before its first checkpoint and begins again"
    rows = f"; {dropped} later rows of metrics.jsonl are dropped" if dropped else ""
    return f"{folder} holds this run: {text}{rows}"


def fingerprints(job: Job) -> dict[str, Any]:
    """Of what a run is fed with: the configuration names it, and may name something else under the same name later."""
    return {
        "data.path": job.prompts.fingerprint,
        "data.eval_path": job.held_out.fingerprint if job.held_out else None,
        "augment": build.source_digest(job.cfg.data.augment) if job.cfg.data.augment else None,
        "environment": build.source_digest(job.cfg.rollout.environment) if job.cfg.rollout.environment else None,
        "rewards": {name: build.source_digest(spec.fn) for name, spec in job.cfg.rewards.items()},
    }
