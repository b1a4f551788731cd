"""`tokenppo replay RUN --step N`: is a step what its run says that it was? Computed again and compared, stage by stage.

No Ray and no workers: responses are those of the ledger, rewards and learner are in this process. Nothing is written.
What the stages are and how each is compared: trainer/replay.py.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pyarrow.lib import ArrowException
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor

from core import config, ledger_table
from core.combine import RunningMoments
from core.faults import InvariantFault, StorageFault, UserError
from core.plain_text import one_line
from core.pretrained import load_tokenizer
from core.schema import Config
from core.trajectory import Trajectory
from core.weights import stream_digest
from launch import build, cluster, learners, run_folder, trained
from launch.evaluate import WITHOUT_GPUS
from reward_server.server import RewardServer
from trainer import checkpoint, engine_weights, replay
from trainer.learner import Learner
from trainer.ledger import device_name
from trainer.model import load_causal_lm
from trainer.recorded import RecordedStep
from trainer.replay import Comparison, Stage, Tolerances

SHARDED = ("DEEPSPEED", "FSDP")  # engines whose checkpoints only as many processes of the same engine read
# Where a file lies is no number; what it holds shows in the stages.
_PATHS = re.compile(rf"{'|'.join(map(re.escape, config.PATHS))}|{config.FUNCTION.pattern}")
_WIDTH = len("advantages and returns")
WANTS_ALL = "all samples of the step must be in the ledger: train with --log.ledger 1"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The step that is replayed, and what there is to replay it from."""

    run: Path
    cfg: Config  # of the run as its config.yaml has it now, as long a run as it was then
    recorded: RecordedStep
    whole: bool  # the ledger has all samples of the step
    row: dict[str, Any] | None  # of metrics.jsonl
    inputs: Stage
    scores_on: str  # device of components that are models
    place: Path | None  # the checkpoint before the step; None: there is none, or the model of step 0
    no_weights: str | None  # why the policy before the step cannot be had
    why_not_exact: str | None  # None: the same bits are promised

    @property
    def step(self) -> int:
        return self.recorded.step

    @property
    def tolerances(self) -> Tolerances:
        dtype = self.cfg.model.dtype
        near = Tolerances.of(dtype)
        if self.why_not_exact is not None:
            return near.by_workers(dtype) if self.cfg.rollout.emit_values else near
        others_beside = self.cfg.rollout.in_rounds or self.cfg.resources.reward_batch_size is not None
        exact = Tolerances(scores=near.scores if others_beside else 0.0)
        return exact.by_workers(dtype) if self.cfg.rollout.emit_values else exact


def replay_run(run: Path, step: int, *, as_json: bool = False, console: Console | None = None) -> int:
    """Compare and print; returns 0, or InvariantFault's code where a stage differs. Raises UserError, StorageFault."""
    console = console or Console()
    subject = find(run, step)
    if not as_json:
        _tell(console, heading(subject))
    stages: list[Stage] = []
    for stage in stages_of(subject, lambda text: None if as_json else _tell(console, text)):
        stages.append(stage)
        if not as_json:
            for line in lines_of(stage):
                _tell(console, line)
    first = next((s.name for s in stages if s.verdict == "differs"), None)
    if as_json:
        of_stages = [s.to_json() for s in stages]
        said = {"step": step, "first_differing": first, "why_not_exact": subject.why_not_exact}
        print(json.dumps(said | {"stages": of_stages}, allow_nan=False))
    else:
        _tell(console, verdict(stages))
    return 0 if first is None else InvariantFault.exit_code


def find(run: Path, step: int) -> Subject:
    """Read the ledger, look for the checkpoint, compare the inputs. Raises UserError, StorageFault."""
    asked = run_folder.configuration(run)
    if (world := cluster.launched()[1]) > 1:
        raise UserError(f"{world} processes were launched: replay is one; start it without accelerate launch")
    try:
        table, said = ledger_table.read(run, step)
    except (ArrowException, OSError) as error:
        raise StorageFault(
            f"{run / ledger_table.FOLDER}: step {step} cannot be read ({str(error).splitlines()[0]}); replay another"
        ) from None
    try:
        begun = Config.model_validate(
            said[0]["config"]
        )  # of all ranks the same; keys that came since at their defaults
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"{run}: step {step} was made by another version of tokenppo ({key} is no key of this one, or has other"
            " values); replay it with that"
        ) from None
    overrides: dict[str, Any] = {"run.steps": begun.run.steps}  # a schedule spans them, and they may grow
    now = run_folder.flat(asked)
    # Where workers sat and how weights travelled to them does not matter here, and is not open to every machine.
    scores_on = "cuda" if torch.cuda.is_available() and now["resources.reward_gpus"] else "cpu"
    overrides |= WITHOUT_GPUS | {"sync.transport": "object_store", "run.checks": False}
    if not torch.cuda.is_available():
        overrides["resources.device"] = "cpu"
    cfg = run_folder.configuration(run, overrides)
    recorded = RecordedStep.of(table, said, scored_reference=cfg.reference == "reward_server")
    c = Comparison("inputs", uids=recorded.uids)
    _compare_config(c, run_folder.flat(begun), now)
    for t in recorded.trajectories:
        c.same("seed of a sample", t.request.seed, cfg.run.seed, t.request.sample_uid)
    whole = _compare_samples(c, run, recorded, len(said))
    place, no_weights = _checkpoint(c, run, cfg, step)
    inputs = c.stage()
    row = next((row for row in run_folder.read_rows(run) if row["step"] == step), None)
    return Subject(
        run=run,
        cfg=cfg,
        recorded=recorded,
        whole=whole,
        row=row,
        inputs=inputs,
        scores_on=scores_on,
        place=place,
        no_weights=no_weights,
        why_not_exact=_why_not_exact(cfg, recorded.said, whole),
    )


def _compare_config(c: Comparison, was: dict[str, Any], now: dict[str, Any]) -> None:
    for key in dict.fromkeys([*was, *now]):
        if key in run_folder.MAY_CHANGE:
            continue
        if _PATHS.fullmatch(key) and was.get(key) != now.get(key):
            c.note(f"{key} = {now.get(key)}: the step was made with {was.get(key)}")
        else:
            c.same(key, was.get(key), now.get(key))


def _compare_samples(c: Comparison, run: Path, recorded: RecordedStep, files: int) -> bool:
    """Whether the ledger has all samples that the step was trained on. `files`: of learner processes, that it has."""
    said, uids = recorded.said, recorded.uids
    try:
        trained_on = set(trained.uids_by_step(run)[recorded.step])
    except (OSError, ValueError, KeyError):
        c.note(f"{trained.FILE} does not say which samples the step was trained on")
        trained_on = {*uids}
    for uid in uids:
        c.same("a sample that was trained on", True, uid in trained_on, uid)
    missing = len(trained_on - {*uids})
    if said["fraction"] == 1:
        c.same("files of learner processes", said["ranks"], files)
        c.same("samples that are not there", 0, missing)
    whole = said["fraction"] == 1 and files == said["ranks"] and not missing
    if not whole:
        c.note(f"the ledger has {len(uids)} of the {len(uids) + missing} samples; {WANTS_ALL}")
    return whole


def _checkpoint(c: Comparison, run: Path, cfg: Config, step: int) -> tuple[Path | None, str | None]:
    """The checkpoint before the step, or why there is no use of one. Step 1 begins with the model of model.path."""
    if step == 1:
        return None, None
    place = run / run_folder.CHECKPOINTS / f"step-{step - 1}"
    if not place.is_dir():
        return None, (
            f"there is no checkpoint of step {step - 1}; train with --run.save_every 1 and as many"
            " --run.keep_checkpoints as steps are to be replayed"
        )
    damage = checkpoint.damage_of(place)
    c.same(f"checkpoint {place.name}", "whole", damage or "whole")
    if damage is not None:
        return None, f"the checkpoint {place.name} is damaged ({damage})"
    state = json.loads((place / "state.json").read_text(encoding="utf-8"))
    for name, digest in state["inputs"]["rewards"].items():
        if name in cfg.rewards:
            c.same(f"source of rewards.{name}.fn", digest, _source(cfg.rewards[name].fn))
    if state["engine"] in SHARDED:
        return None, (
            f"the checkpoint {place.name} is of {state['ranks']} processes as {state['engine']}, and only such read its"
            " shards; a run as launch/accelerate/ddp.yaml is replayed whole"
        )
    return place, None


def _source(fn: str) -> str | None:
    try:
        return build.source_digest(fn)
    except OSError as error:
        return f"not there ({error.strerror})"


def _why_not_exact(cfg: Config, said: dict[str, Any], whole: bool) -> str | None:
    device = device_name(cluster.device(cfg))
    reasons = {
        "run.deterministic is off": not cfg.run.deterministic,
        f"{said['ranks']} learner processes made it, one replays it": said["ranks"] > 1,
        f"it was made on {said['device']}, this is {device}": said["device"] != device,
        f"it was made with torch {said['torch']}, this is {torch.__version__}": said["torch"] != torch.__version__,
        "of some of its samples, beside which others stand here": not whole,
    }
    return next((why for why, holds in reasons.items() if holds), None)


def stages_of(subject: Subject, note: Callable[[str], None]) -> Iterator[Stage]:
    """Each stage as it is done."""
    cfg, recorded, tolerances = subject.cfg, subject.recorded, subject.tolerances
    yield subject.inputs
    yield _rewards(subject)
    running = {name: RunningMoments(**moments) for name, moments in recorded.said["before"]["running"].items()}
    normalizers = [f"rewards.{name}.normalize" for name, spec in cfg.rewards.items() if spec.normalize != "none"]
    if normalizers and not subject.whole:
        yield Stage.out_of_reach("weighted rewards", f"{normalizers[0]} is over the whole batch; {WANTS_ALL}")
    else:
        yield replay.weigh(recorded, cfg, running, tolerances)
    with ExitStack() as stack:
        learner, no_weights = (None, subject.no_weights) if subject.no_weights else _learner(subject, stack, note)
        annotated = None
        if learner is None:
            yield Stage.out_of_reach("log-probs and values", no_weights)
        else:
            stage, annotated = replay.annotate(recorded, learner, tolerances)
            yield stage
        no_row = f"metrics.jsonl has no row of step {subject.step}" if subject.row is None else None
        no_heads = f"{no_weights}; the ledger has not what each value head says" if cfg.value_heads else None
        over_all = None if subject.whole else WANTS_ALL
        of_rewards = (no_heads if learner is None else None) or (over_all if cfg.ppo.scale_rewards != "none" else None)
        if of_rewards is not None:
            yield Stage.out_of_reach("rewards after KL", of_rewards)
        else:
            row = subject.row or {}
            stage, credited, batch = replay.reward_and_credit(recorded, cfg, running, annotated, row, tolerances)
            yield stage
        why = of_rewards or over_all or no_row
        yield Stage.out_of_reach("advantages and returns", why) if why else credited
        why = why or (no_weights if learner is None else None)
        if why is not None:
            yield Stage.out_of_reach("losses and gradients", why)
            yield Stage.out_of_reach("weights", why)
        else:
            yield replay.update(recorded, learner, batch, subject.row, tolerances)
            yield _weights(subject, learner)


def _rewards(subject: Subject) -> Stage:
    """The stored responses, scored again in the chunks in which workers wrote them."""
    cfg, recorded = subject.cfg, subject.recorded
    tokenizer = functools.partial(load_tokenizer, cfg.model.path)
    scored: dict[str, Trajectory | str] = {}
    try:
        server = RewardServer(cfg.rewards, tokenizer, device=subject.scores_on, reference=build.reference_spec(cfg))
        with closing(server):
            for at in range(0, len(recorded.trajectories), cfg.rollout.chunk_size):
                chunk = [_unscored(t) for t in recorded.trajectories[at : at + cfg.rollout.chunk_size]]
                answered, failures = server.score(chunk)
                for failure in failures:  # once more, alone, as a run does
                    again, failed = server.score([failure.trajectory])
                    answered += again
                    scored |= {f.trajectory.request.sample_uid: f.reason for f in failed}
                scored |= {t.request.sample_uid: t for t in answered}
    except UserError as error:  # a component that is not there, or was handed over by a script
        return Stage.out_of_reach("rewards", str(error))
    return replay.compare_rewards(recorded, scored, subject.tolerances)


def _unscored(t: Trajectory) -> Trajectory:
    return replace(t, component_rewards={}, component_mask={}, ref_logprobs=None, scored_at=0.0)


def _learner(subject: Subject, stack: ExitStack, note: Callable[[str], None]) -> tuple[Learner | None, str | None]:
    """The policy as it was before the step, or why there is none. `stack` ends what it holds."""
    cfg = subject.cfg
    accelerator, ranks = learners.join(cfg, stack, note)
    device = accelerator.device
    lm, ref_lm = load_causal_lm(cfg.model.path, device), build.reference_lm(cfg, device)
    texts = build.texts(cfg, load_tokenizer(cfg.model.path))
    learner = Learner(cfg, accelerator, lm, ref_lm, ranks, critic=build.critic(cfg, device), texts=texts)
    if subject.place is not None:
        try:
            learner.load_state(subject.place / "learner", step=subject.step - 1)
        except (RuntimeError, ValueError, KeyError) as error:
            return None, (
                f"the checkpoint {subject.place.name} does not fit model.path = {cfg.model.path}"
                f" ({str(error).strip().splitlines()[0]}); put the model of the run back"
            )
    return learner, None


def _weights(subject: Subject, learner: Learner) -> Stage:
    cfg, was = subject.cfg, subject.recorded.said["policy_digest"]
    now = stream_digest(learner.stream_weights(), subject.step, int(cfg.sync.bucket_mb * 2**20))
    if subject.why_not_exact is not None and now != was:
        return Stage.out_of_reach(
            "weights", f"other bits, which may be ({subject.why_not_exact}), and a digest knows no distance"
        )
    return replay.compare_weights(subject.recorded, now, _saved_weights(subject), learner)


def _saved_weights(subject: Subject) -> dict[str, Tensor] | None:
    """Name -> parameter of the checkpoint of this very step; None where there is none that says something."""
    from safetensors.torch import load_file

    place = subject.run / run_folder.CHECKPOINTS / f"step-{subject.step}"
    if subject.why_not_exact is not None or not place.is_dir() or checkpoint.damage_of(place) is not None:
        return None
    files = (place / "learner" / name for name in ("model.safetensors", engine_weights.TRAINED_FILE))
    return {name: x for file in files if file.is_file() for name, x in load_file(file).items()} or None


def heading(subject: Subject) -> str:
    recorded, why = subject.recorded, subject.why_not_exact
    n, tokens = len(recorded.trajectories), int(recorded.batch.response_mask.sum())
    how = "bit for bit" if why is None else f"within tolerances: {why}"
    return f"{subject.run}, step {subject.step}: {n} responses, {tokens} tokens, compared {how}"


def lines_of(stage: Stage) -> list[str]:
    """One line, and more where there is more to say."""
    much = f"{stage.compared} compared"
    distance = f"largest distance {stage.largest:.2g}"
    words = {
        "equal": f"equal ({much})",
        "within tolerance": f"equal within {stage.tolerance:.0e} ({much}, {distance})",
        "differs": f"DIFFERS: {stage.differing} of {stage.compared}"
        + (f" by more than {stage.tolerance:.0e}" if stage.tolerance else "")
        + (f", {distance}" if stage.largest else ""),
        "out of reach": f"out of reach: {stage.notes[0] if stage.notes else ''}",
    }
    lines = [f"{stage.name:<{_WIDTH}}  {words[stage.verdict]}"]
    if (first := stage.first) is not None:
        where = f"sample {first.uid}, " if first.uid else ""
        where += f"token {first.token}, " if first.token is not None else ""
        lines.append(f"first: {where}{first.what}: {first.recorded} in the run, {first.replayed} now")
    lines += [f"note: {text}" for text in (stage.notes if stage.verdict != "out of reach" else ())]
    return [lines[0], *(f"{'':<{_WIDTH}}  {one_line(line)}" for line in lines[1:])]


def verdict(stages: list[Stage]) -> str:
    first = next((s.name for s in stages if s.verdict == "differs"), None)
    beyond = sum(s.verdict == "out of reach" for s in stages)
    if first is not None:
        return f"the first stage that differs: {first}"
    return f"{len(stages) - beyond} stages equal" + (f", {beyond} out of reach" if beyond else ", none differs")


def _tell(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
