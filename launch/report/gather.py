"""From the folder of a run to what a report shows of it, and from several of these to what differs."""

import datetime
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.config import to_yaml
from core.diagnosis import Diagnosis, Facts
from core.metrics import COUNTERS, PHASES
from core.schema import Config, leaf_keys
from launch import run_folder
from launch.report import figures, samples
from launch.report.curves import curves_of, evaluations_of, mean_of
from launch.report.record import Component, Difference, EvalRow, Fault, Found, Report, RunRecord
from launch.report.words import LAST, Known, better, checks, figure, headline, meaning_of
from trainer import checkpoint


def gather(folders: Sequence[Path], *, over: bool | None = None) -> Report:
    """What a report of these runs shows. Raises UserError where one is no run.

    Args:
        over: whether the runs are at work no more; None asks their folders.
    """
    configs = [run_folder.configuration(folder) for folder in folders]
    room = samples.MOST_TOKENS // len(folders)
    runs = [run_of(f, cfg, room, over=over) for f, cfg in zip(folders, configs, strict=True)]
    return Report(
        runs=runs,
        differences=differences(configs),
        key_figures=figures.key_figures(runs),
        all_figures=figures.all_figures(runs),
        run_figures={
            "components": [figures.component_figures(i, run) for i, run in enumerate(runs)],
            "gaming": [figures.gaming_figures(i, run) for i, run in enumerate(runs)],
            "time": [figures.time_figures(i, run) for i, run in enumerate(runs)],
        },
        version=importlib.metadata.version("tokenppo"),
        made_at=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def run_of(folder: Path, cfg: Config, most_tokens: int, *, over: bool | None = None) -> RunRecord:
    """One run, at work or not. Reads metrics.jsonl whole and of the ledger a dozen steps."""
    rows, summary = run_folder.read_rows(folder), run_folder.read_summary(folder)
    over = not run_folder.at_work(folder) if over is None else over
    steps = int(rows[-1]["step"]) if rows else 0
    evals = _evals(folder, rows, summary)
    responses = samples.of_run(folder, cfg, most_tokens)
    paid = [name for name, spec in cfg.rewards.items() if spec.paid]
    known = Known(
        rows=rows,
        evals=evals,
        n_prompts=summary.get("eval_prompts"),
        most_prompts=cfg.data.eval_prompts,
        paid=paid,
        metrics=[name for name in cfg.rewards if name not in paid],
        comparable=all(spec.normalize == "none" and spec.clip is None for spec in cfg.rewards.values()),
        found=diagnose(cfg, rows),
        failed=_failed(summary) if over else None,
        over=over,
    )
    return RunRecord(
        name=cfg.run.name,
        state=_state(cfg, summary, steps, over),
        over=over,
        steps=steps,
        planned=cfg.run.steps,
        headline=headline(known),
        tiles=_tiles(known, summary, steps, cfg),
        evals=_eval_rows(evals),
        eval_curves=evaluations_of(rows, {k: v for k, v in evals.get("before", {}).items() if k != "step"}),
        curves=curves_of(rows),
        components=[_component(name, cfg, rows) for name in cfg.rewards],
        checks=checks(known, responses),
        diagnosis=known.found,
        phases=_phases(rows),
        start_s=summary.get("seconds", {}).get("start"),
        faults=_faults(rows),
        responses=responses,
        changed=changed(cfg),
        config=to_yaml(cfg),
        environment=_environment(cfg, summary),
    )


def diagnose(cfg: Config, rows: list[dict[str, Any]]) -> list[Found]:
    """What core/diagnosis.py says of the rows: the same as the run itself said."""
    diagnosis = Diagnosis(Facts.of(cfg))
    for row in rows:
        diagnosis.add(int(row["step"]), {k: float("nan") if v is None else float(v) for k, v in row.items()})
    return [
        Found(
            rule=v.rule,
            step=v.step,
            text=f"{v.title}: {v.metric} is {v.value:.3g} (bound {v.bound:.3g})",
            remedy=v.remedy,
            holds=any(v is held for held in diagnosis.active),
        )
        for v in diagnosis.verdicts
    ]


def _evals(folder: Path, rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """before, after and best, as far as they are known: summary.json is written at the end, a checkpoint before it.
    The last evaluation stands in a row."""
    found = summary.get("eval") or _saved_evals(folder)
    evaluated = [row for row in rows if "eval/reward/total" in row]
    if evaluated:
        last = evaluated[-1]
        after = {name.removeprefix("eval/"): x for name, x in last.items() if name.startswith("eval/")}
        found = found | {"after": after | {"step": int(last["step"])}}
    return found


def _saved_evals(folder: Path) -> dict[str, dict[str, float]]:
    for step in checkpoint.steps_saved(folder / run_folder.CHECKPOINTS):
        try:
            state = json.loads((folder / run_folder.CHECKPOINTS / f"step-{step}" / "state.json").read_text())
            return state["eval"]
        except (OSError, ValueError, KeyError):  # being deleted, or damaged: an older one may do
            continue
    return {}


def _failed(summary: dict[str, Any]) -> str | None:
    code = summary.get("exit")
    if code in (0, None):
        return None
    return f"The run ended before its end (exit {code}): {summary.get('error', 'it does not say why')}"


def _state(cfg: Config, summary: dict[str, Any], steps: int, over: bool) -> str:
    done = f"step {steps} of {cfg.run.steps}"
    if not over:
        return f"at work: {done}"
    if summary.get("stopped"):
        return f"stopped by run.{summary['stopped']} after {done}"
    if summary.get("exit") == 0:
        return f"finished: {done}"
    return f"ended early: {done}" if summary else f"not at work, and it left no summary: {done}"


def _tiles(known: Known, summary: dict[str, Any], steps: int, cfg: Config) -> list[tuple[str, str, str]]:
    before, after = known.evals.get("before", {}), known.evals.get("after", {})
    tiles = []
    for name in ("reward/total", *known.metrics[:2]):
        full = name if "/" in name else f"eval/{name}"
        if before.get(name) is not None and after.get(name) is not None:
            label = "held-out reward" if name == "reward/total" else f"held-out {name}"
            tiles.append((label, figure(full, after[name]), f"from {figure(full, before[name])} before training"))
    seconds = summary.get("seconds", {}).get("whole_run")
    tiles.append(("steps", f"{steps:,}", f"of {cfg.run.steps:,}, {cfg.rollout.batch_size:,} prompts each"))
    if known.rows:
        kl = mean_of(known.rows[-LAST:], "objective/kl")
        tiles.append(("KL to the reference", figure("objective/kl", kl), "nats a response, last steps"))
        step_s = mean_of(known.rows, "time/total")
        if step_s is not None:
            tiles.append(("time", duration(seconds) if seconds else f"{step_s:.2g} s", _pace(step_s, seconds)))
    return tiles


def _pace(step_s: float, seconds: float | None) -> str:
    return f"the whole run; {step_s:.2g} s a step" if seconds else "a step"


def duration(seconds: float) -> str:
    """In the two units that matter."""
    s = round(seconds)
    if s < 60:
        return f"{seconds:.1f} s"
    return f"{s // 60} min {s % 60} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60} min"


def _eval_rows(evals: dict[str, dict[str, float]]) -> list[EvalRow]:
    names = list(dict.fromkeys(n for when in ("after", "before") for n in evals.get(when, {}) if n != "step"))
    names.sort(key=lambda n: (n != "reward/total", "/" in n))
    out = []
    for name in names:
        meaning, unit, _ = meaning_of(f"eval/{name}")
        values = {when: evals.get(when, {}).get(name) for when in ("before", "after", "best")}
        out.append(EvalRow(name=name, unit=unit, better=better(name), meaning=meaning, **values))
    return out


def _component(name: str, cfg: Config, rows: list[dict[str, Any]]) -> Component:
    spec = cfg.rewards[name]

    def last(what: str) -> float | None:
        return mean_of(rows[-LAST:], f"reward/{name}/{what}")

    weight = rows[-1].get(f"reward/{name}/weight") if rows else None
    return Component(
        name=name,
        fn=spec.fn.rsplit("/", 1)[-1],
        paid=spec.paid,
        weight=spec.weight_at(0) if weight is None else weight,
        first=mean_of(rows[:1], f"reward/{name}/raw"),
        last=last("raw"),
        adds=last("weighted"),
        share=last("variance_share"),
        length_corr=last("length_corr"),
    )


def _phases(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of the steps, by phase; those that took none are left out."""
    sums = {phase: sum(row.get(f"time/{phase}") or 0.0 for row in rows) for phase in PHASES if phase != "total"}
    return {phase: round(s, 3) for phase, s in sums.items() if s > 0}


def _faults(rows: list[dict[str, Any]]) -> list[Fault]:
    last = rows[-1] if rows else {}
    return [Fault(name=n, count=int(last.get(f"faults/{n}") or 0), meaning=text) for n, text in COUNTERS.items()]


def changed(cfg: Config) -> list[tuple[str, str, str]]:
    """Settings that are not the schema's default: key, value, default."""
    defaults = {key: default for key, (_, default, _) in leaf_keys().items()}
    out = []
    for key, value in run_folder.flat(cfg).items():
        parts = key.split(".")
        known = ".".join(["rewards", "NAME", *parts[2:]]) if parts[0] == "rewards" else key
        default = defaults.get(known, "")
        if known not in defaults or default == "required" or value != _as_json(default):
            out.append((key, text_of(value), "" if default == "required" else text_of(_as_json(default))))
    return out


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def text_of(value: Any) -> str:
    """A value of the configuration as its file has it."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def differences(configs: list[Config]) -> list[Difference]:
    """Settings in which the runs are not all the same, their names aside."""
    flats = [run_folder.flat(cfg) for cfg in configs]
    keys = list(dict.fromkeys(key for flat in flats for key in flat if key not in ("run.name", "run.dir")))
    out = []
    for key in keys:
        values = [text_of(flat[key]) if key in flat else "absent" for flat in flats]
        if len(set(values)) > 1:
            out.append(Difference(key=key, values=values))
    return out


def _environment(cfg: Config, summary: dict[str, Any]) -> list[tuple[str, str]]:
    known = [(name, str(version)) for name, version in summary.get("versions", {}).items()]
    if not known:
        known = [("versions", "written at the end of the run")]
    known.append(("device", cfg.resources.device))
    known.append(("rollout workers", str(cfg.rollout.workers)))
    if summary.get("resumed_from") is not None:
        known.append(("went on from step", str(summary["resumed_from"])))
    return known


def as_json(report: Report) -> dict[str, Any]:
    """What the page draws from: curves, samples and figures; what is words is in its HTML already."""
    wanted = ("name", "curves", "eval_curves", "responses")
    return {
        "runs": [{k: v for k, v in asdict(run).items() if k in wanted} for run in report.runs],
        "figures": [asdict(figure) for figure in figures.every(report)],
    }
