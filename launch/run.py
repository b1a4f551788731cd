"""One run from its configuration to `final/`: wires the parts, trains, and ends everything it started.

Each learner process runs this. Rank 0 owns the run folder, Ray, the trackers and the terminal; the others join its Ray.
"""

import functools
import json
import os
import sys
import time
import uuid
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from core.diagnosis import Diagnosis, Facts
from core.faults import INTERRUPTED, TERMINATED, Paused, StorageFault, UserError, exit_code_of
from core.plain_text import one_line
from core.schema import Config
from launch import build, cluster, early, environment, going_on, learners, room, run_folder, trained, under_way
from launch.exchange import Exchange
from launch.job import NOTHING, Inline, Job
from launch.last_words import on_sigterm, undisturbed_end
from launch.reservation import seats_of_run
from launch.stopping import Stopping
from launch.trackers import Trackers
from launch.trained import Trained
from launch.weight_transport import make_transport
from rollout.prompts import leak
from trainer import checkpoint
from trainer.checkpoint import Checkpoint, save_pretrained
from trainer.evaluate import summary_of
from trainer.gallery import Gallery
from trainer.learner import Learner
from trainer.ledger import Ledger
from trainer.loop import TrainState, make_probe, train
from trainer.model import load_causal_lm
from trainer.ranks import Ranks
from trainer.run_log import RunLog
from trainer.weight_sender import WeightPublisher

PROBE_TOKENS = 64  # of the fixed prompt whose log-probs are compared after each weight sync


@dataclass(frozen=True)
class RunResult:
    folder: Path
    summary: dict[str, Any]
    was_finished: bool = False  # nothing was left to do


def run(cfg: Config, inline: Inline = NOTHING, *, lives_on: bool = True) -> RunResult:
    """Train as configured: anew, or on from the last checkpoint of the same run in its folder.

    `lives_on`: whether the process has more to do than to tell a fault and end.

    Raises:
        Fault: by kind, KeyboardInterrupt on Ctrl-C. Either way summary.json holds the exit code and what was reached,
            and the Ray that was started for this run is gone.
    """
    started = time.perf_counter()
    console = Console()
    with ExitStack() as stack, undisturbed_end(stack, lives_on):
        accelerator, ranks = learners.join(cfg, stack, functools.partial(console.print, markup=False, soft_wrap=True))
        with ranks.together():
            job = Job(
                cfg=cfg,
                inline=inline,
                accelerator=accelerator,
                ranks=ranks,
                console=console,
                share=build.shares(cfg, ranks.index, ranks.size),
                **_read_input(cfg, inline),
            )
        if ranks.is_main and (warning := leak(job.prompts, job.held_out)):
            console.print(warning, markup=False, soft_wrap=True)
        with ranks.together():
            found = run_folder.examine(cfg) if ranks.is_main else None
            if ranks.is_main:
                room.refuse_too_little(cfg, build.model_shape(cfg.model.path).parameters)
        found = ranks.from_main(found)
        if found.finished:
            return RunResult(job.folder, run_folder.read_summary(job.folder), was_finished=True)
        with ranks.together():
            saved = going_on.go_on_from(job, found) if ranks.is_main else None
        saved = ranks.from_main(saved)
        resumed_from = saved.step if saved else 0 if found.started else None
        reached = saved.state["eval"] if saved else {}
        summary = {"eval": reached, "seconds": {}, "steps": resumed_from or 0, "exit": 1, "resumed_from": resumed_from}
        summary["versions"] = run_folder.versions()
        if job.held_out is not None:
            summary["eval_prompts"] = min(cfg.data.eval_prompts, len(job.held_out.rows))
        with ranks.together():
            if ranks.is_main:
                stack.enter_context(run_folder.opened(cfg))
                if found.started:
                    going_on.clear_the_way(job, saved)
        try:
            with on_sigterm(lambda: _note_the_end(job, summary)):
                with ranks.together():
                    if ranks.is_main:
                        for path, rows in ((cfg.data.path, inline.rows), (cfg.data.eval_path, inline.eval_rows)):
                            if rows is not None:
                                run_folder.write_rows(Path(path), rows)
                with ExitStack() as parts:
                    with (
                        job.ranks.may_lose_peers(),
                        undisturbed_end(stack, lives_on),
                    ):  # closes before `parts`, which ends what was started
                        _train(job, found, saved, parts, stack, summary)
            summary["exit"] = 0
            if ranks.is_main:  # a wish that came too late is none for the next start, which may have more steps
                (job.folder / run_folder.PAUSE).unlink(missing_ok=True)
        except BaseException as error:
            summary |= {"exit": exit_code_of(error), "error": f"{type(error).__name__}: {error}".removesuffix(": ")}
            raise
        finally:
            summary["seconds"]["whole_run"] = round(time.perf_counter() - started, 3)
            if ranks.is_main:
                try:
                    run_folder.write_summary(job.folder, summary)
                except StorageFault as error:
                    if summary["exit"] == 0:
                        raise
                    console.print(f"warning: {error}", markup=False, soft_wrap=True)  # what ended the run is said after
                _report(job, summary)
        return RunResult(job.folder, summary)


def _report(job: Job, summary: dict[str, Any]) -> None:
    """report.html, of a run that got somewhere and was not told to hurry. The run is what it is without it."""
    if not summary["steps"] or summary["exit"] in (INTERRUPTED, TERMINATED):
        return
    try:
        from launch.report import render  # packages that nothing else of a run needs: without them it trains as well

        render.write([job.folder], over=True)
    except Exception as error:  # of a disk, or a bug of ours: training is done and all else is written
        what = one_line(" ".join(f"{type(error).__name__}: {error}".split()))
        job.console.print(
            f"warning: no report ({what}); tokenppo report {job.folder} tries again", markup=False, soft_wrap=True
        )


def _note_the_end(job: Job, summary: dict[str, Any]) -> None:
    """Of a run that was told to end: there may be no later. What ends in order writes its summary again."""
    if job.ranks.is_main:
        print("tokenppo: SIGTERM: ending what was started", file=sys.stderr, flush=True)
        run_folder.write_summary(job.folder, summary | {"exit": TERMINATED, "error": f"SystemExit: {TERMINATED}"})


def _read_input(cfg: Config, inline: Inline) -> dict[str, Any]:
    """Tokenizer and prompts; the rewards are only checked here. Raises UserError."""
    early.check_rewards(cfg, inline.functions)
    environment.check(cfg)
    tokenizer = build.load_tokenizer(cfg.model.path)
    prompts, held_out = build.prompt_streams(cfg, tokenizer, inline.rows, inline.eval_rows)
    early.check_rewards(cfg, inline.functions, prompts.columns)
    under_way.refuse_columns(cfg, prompts)
    return {"tokenizer": tokenizer, "prompts": prompts, "held_out": held_out}


def _train(
    job: Job,
    found: run_folder.Found,
    saved: Checkpoint | None,
    parts: ExitStack,
    last: ExitStack,
    summary: dict[str, Any],
) -> None:
    """Start the parts, train, write `final/`. `parts` ends all that was started, whatever happens; `last` closes after
    all else of the run is written."""
    started = time.perf_counter()
    cfg, ranks, folder, console = job.cfg, job.ranks, job.folder, job.console
    who = "" if ranks.is_main else f"learner rank {ranks.index}: "
    tell = [lambda text: console.print(one_line(who + text), markup=False, soft_wrap=True)]

    def note(text: str) -> None:  # the log takes over once it is open
        tell[-1](text)

    if ranks.is_main:
        console.print(f"{folder}: starting Ray, {_parts_in_words(cfg, ranks)}", soft_wrap=True)
    exchange = _join_ray(job, parts)
    seats, share = seats_of_run(cfg, ranks, job.accelerator.device, note), job.share
    with ranks.together():
        rollouts = build.rollouts(
            cfg, job.tokenizer, job.accelerator.device.type, note, share=share, exchange=exchange, seats=seats
        )
        parts.callback(rollouts.close)
        rewards = build.reward_client(cfg, job.inline.functions, note, rank=ranks.index, seats=seats)
        parts.callback(rewards.close)
        lm = load_causal_lm(cfg.model.path, job.accelerator.device)
        ref_lm = build.reference_lm(cfg, job.accelerator.device)
        critic = build.critic(cfg, job.accelerator.device)
        texts = build.texts(cfg, job.tokenizer)
    learner = Learner(cfg, job.accelerator, lm, ref_lm, ranks, critic=critic, texts=texts)
    if ranks.is_main and learner.policy.reader.slower is not None:
        note(f"note: {learner.policy.reader.slower}")
    with ranks.together():
        servers = rewards.wait_ready()
        rollouts.wait_ready()
    of_servers = {f"reward-server{_of(ranks.index)}{f'.{i}' if i else ''}": pid for i, pid in enumerate(servers)}
    _write_processes(job, of_servers | rollouts.pids)
    if job.inline.make_transport is not None:
        transport = job.inline.make_transport(rollouts, cfg.sync.timeout_s)
    else:
        followers = tuple(range(1, min(ranks.size, cfg.rollout.workers)))
        transport = make_transport(
            cfg.sync, rollouts, exchange, followers, ranks=ranks, device=job.accelerator.device, note=note
        )
    # No longer than a response, so that it fits into any window.
    probe = make_probe(job.held_out or job.prompts, min(PROBE_TOKENS, cfg.rollout.max_new_tokens))
    reference = learner.reference_logprobs(probe)
    publisher = WeightPublisher(
        learner,
        transport,
        probe,
        bucket_bytes=int(cfg.sync.bucket_mb * 2**20),
        tolerance=learner.probe_tolerance,
        drives_workers=bool(share.workers),
    )
    state, stopping, proof = TrainState.fresh(cfg), Stopping.of(cfg.run), Trained()
    if saved is not None:
        moved = float(np.abs(np.array(saved.state["reference"], dtype=np.float32) - reference).max())
        if not moved <= learner.probe_tolerance:
            raise UserError(
                f"model.path = {cfg.model.path}: not the model that the run in {folder} was begun with (log-probs of"
                f" the reference differ by {moved:.2g}), and the KL would be against another one; put it back"
            )
        learner.load_state(saved.folder / "learner", step=saved.step)
        state.restore(saved.state["train"])
        state.faults.update(saved.state["faults"])
        state.faults["checkpoints_damaged"] += len(saved.damaged)
        stopping.restore(saved.state["stopping"])
        proof = Trained(**saved.state["trained"])
        end = saved.state["end"]
        if end is not None and getattr(cfg.run, end["stopped"]) == end["limit"]:
            summary |= end  # it died between this checkpoint and the end that was decided on
        job.prompts.restore(saved.state["prompts"])
        if (plan := build.round_plan(cfg, share)) is not None:
            left, responses = under_way.read(saved, plan)
            rollouts.restore(left)
            state.backlog.restore(left, responses)
    summary["seconds"]["start"] = round(time.perf_counter() - started, 3)

    inputs = going_on.fingerprints(job) if ranks.is_main else {}

    def on_eval(step: int, means: dict[str, float]) -> None:
        shown = ranks.from_main(summary_of(means) | {"step": step})
        summary["eval"]["before" if step == 0 else "after"] = shown
        if step and stopping.is_best(shown):
            summary["eval"]["best"] = shown
            whole = learner.whole_policy()
            with ranks.together():
                if ranks.is_main:
                    save_pretrained(learner.policy, whole, job.tokenizer, folder / "best", step=step)

    def on_step(step: int, means: dict[str, float], uids: list[str], prompts_state: dict[str, Any]) -> bool:
        nonlocal proof
        summary["steps"] = step
        # Means over all ranks are the same on each; that the run ends is said by one all the same.
        reason, paused = None, False
        if step < cfg.run.steps:
            reason, paused = ranks.from_main((stopping.reason(means), (folder / run_folder.PAUSE).exists()))
        uids_of_all = [uid for of_rank in ranks.gather(uids) for uid in of_rank]
        with ranks.together():
            if ranks.is_main:
                proof = trained.append(folder, proof, step, uids_of_all)
        if reason is not None:
            summary.update(stopped=reason, limit=getattr(cfg.run, reason))
        if step % cfg.run.save_every and step != cfg.run.steps and reason is None and not paused:
            return True
        with log.time("checkpoint"):
            with ranks.together():
                if ranks.is_main:
                    trained.flush(folder)
            content = {
                "ranks": ranks.size,
                "engine": job.accelerator.distributed_type.value,
                "train": state.to_json(),
                "faults": {
                    name.removeprefix("faults/"): int(n) for name, n in means.items() if name.startswith("faults/")
                },
                "stopping": stopping.to_json(),
                "end": {"stopped": reason, "limit": getattr(cfg.run, reason)} if reason is not None else None,
                "trained": proof.to_json(),
                "prompts": prompts_state,
                "inputs": inputs,
                "reference": reference.tolist(),
                "eval": summary["eval"],
                "trackers": trackers.ids if trackers else {},
                "config": cfg.model_dump(mode="json"),
            }
            with ranks.together():  # a row of the data may be one that no table holds
                tables = {under_way.file_of(ranks.index): state.backlog.table()} if cfg.rollout.in_rounds else None
            where, keep = folder / run_folder.CHECKPOINTS, cfg.run.keep_checkpoints
            checkpoint.save(where, learner, content, keep=keep, tables=tables)
            if trackers is not None:
                trackers.checkpoint(where / f"step-{step}", step)
        if paused and reason is None:
            with ranks.together():
                if ranks.is_main:
                    (folder / run_folder.PAUSE).unlink(missing_ok=True)  # done; the next start goes on
            raise Paused(f"paused after step {step}, as {folder / run_folder.PAUSE} asks; the same command goes on")
        return reason is None

    title = f"{cfg.run.name}: {Path(cfg.model.path).name} on {', '.join(Path(p).name for p in cfg.data.sources)}"
    log, trackers, diagnosis = RunLog.silent(), None, Diagnosis(Facts.of(cfg))
    if ranks.is_main:
        trackers = Trackers.open(
            cfg,
            folder,
            ids=run_folder.tracker_ids(folder) if found.started else {},
            resumed_from=summary["resumed_from"],
            note=note,
        )
        run_folder.write_tracker_ids(folder, trackers.ids)
        # At a good end after summary and report, which they may keep; else at once, since there may be little time.
        parts.push(lambda kind, error, trace: trackers.close(exit_code_of(error)) if error else None)
        last.push(lambda kind, error, trace: trackers.close(exit_code_of(error) if error else 0))
        before = {f"eval/{name}": x for name, x in summary["eval"].get("before", {}).items() if name != "step"}
        log = RunLog(
            folder,
            total_steps=cfg.run.steps,
            trackers=trackers,
            console=console,
            title=title,
            before=before,
            diagnosis=diagnosis,
            alert=trackers.alert,
        )
    device = job.accelerator.device.type
    ledger = Ledger(cfg, folder, job.tokenizer, note, rank=ranks.index, ranks=ranks.size, device=device)
    parts.callback(ledger.close)
    gallery = Gallery(cfg, job.tokenizer, ranks, trackers.show if trackers else None)
    with log:
        if ranks.is_main:
            tell.append(log.note)
        try:
            if "stopped" not in summary:
                train(
                    cfg,
                    learner=learner,
                    prompts=job.prompts,
                    held_out=job.held_out,
                    rollouts=rollouts,
                    rewards=rewards,
                    publisher=publisher,
                    log=log,
                    state=state,
                    ledger=ledger,
                    gallery=gallery,
                    on_eval=on_eval,
                    on_step=on_step,
                )
        finally:
            del tell[1:]
            summary["steps"] = learner.step
            summary["verdicts"] = [asdict(verdict) for verdict in diagnosis.verdicts]
            summary["seconds"] |= {phase: round(spent, 3) for phase, spent in log.seconds.items()}
    whole = learner.whole_policy()
    with ranks.together():
        if ranks.is_main:
            save_pretrained(learner.policy, whole, job.tokenizer, folder / "final", step=learner.step)
    if not ranks.is_main:  # Ray is rank 0's: the others leave it first
        parts.close()
    ranks.gather(None)


def _join_ray(job: Job, parts: ExitStack) -> Exchange | None:
    """Ray on every rank: rank 0 starts it or joins the user's, the others join rank 0's. The exchange between ranks."""
    cfg, ranks = job.cfg, job.ranks
    name, address, exchange = None, None, None
    deadline = cfg.resources.collective_timeout_s
    with ranks.together():
        if ranks.is_main:
            address = parts.enter_context(cluster.ray_session(cfg))
            cluster.wait_for_nodes(cfg)
            if ranks.size > 1:
                name = f"tokenppo-{uuid.uuid4().hex}"
                exchange = Exchange.create(name, deadline)
    if ranks.size == 1:
        return None
    name, address = ranks.from_main((name, address))
    with ranks.together():
        if not ranks.is_main:
            parts.enter_context(cluster.ray_session(cfg, address))
            exchange = Exchange.join(name, deadline)
    return exchange


def _write_processes(job: Job, pids: dict[str, int]) -> None:
    """processes.json: for people, tests and `tokenppo health`, which look at, or kill, a process of this run."""
    of_ranks = job.ranks.gather(pids | {f"learner{_of(job.ranks.index)}": os.getpid()})
    if job.ranks.is_main:
        merged = {name: pid for pids in of_ranks for name, pid in pids.items()}
        run_folder.write_whole(job.folder / "processes.json", json.dumps(merged) + "\n")


def _of(rank: int) -> str:
    return f"-{rank}" if rank else ""


def _parts_in_words(cfg: Config, ranks: Ranks) -> str:
    def count(n: int, what: str) -> str:
        return f"{n} {what}{'s' * (n > 1)}"

    learner = "the learner" if ranks.size == 1 else f"{ranks.size} learner processes"
    servers = ranks.size * cfg.resources.reward_servers
    server = "a reward server" if servers == 1 else f"{servers} reward servers"
    return f"{count(cfg.rollout.workers, 'rollout worker')}, {server} and {learner}"
