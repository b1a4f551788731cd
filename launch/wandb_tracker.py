"""W&B, through the class of Accelerate: numbers, sample tables, histograms, alerts and files of one run.

It writes `<folder>/wandb/`, online where there are credentials, else offline; a WANDB_MODE that needs no login is
obeyed. It can neither print nor ask for a login: its own output is off, and our lines say where the run is. Standard
output is not captured, because the panel redraws itself twice a second.

Steps that go backwards under one id: `run.log` drops a step below the largest of *this process*, with a line in its
logs. Online, a resumed run starts at the step after the last that the service holds, so replayed rows would be dropped
one by one; we leave them out and say so. Offline nothing knows what another process wrote: the resumed process has a
second `offline-run-*-<id>` folder, and `wandb sync` reads every row of both. So the last step is kept beside them
(`wandb/<id>.last-step`) and replayed rows are left out there too. Either way a run id has each step once, rising; the
rows between checkpoint and crash are those of the process that crashed. A kill within FLUSH_S of a row loses that row.
A killed process leaves no exit record: online the service calls the run crashed when it hears no more of it.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.tracking import WandBTracker

from core.diagnosis import Verdict
from core.schema import Config
from launch import heat_map, wandb_view
from launch.shown import HIDDEN, shown
from launch.wandb_login import logged_in
from trainer.gallery import Exhibit

FLUSH_S = 0.5  # between writes of W&B's file; by itself it writes every 15 s, and a kill takes what it has not written
SERVICE = "wandb-core"  # the process of its own that W&B's client starts and talks to


class WandB:
    def __init__(
        self,
        cfg: Config,
        folder: Path,
        run_id: str,
        after: int,
        note: Callable[[str], None],
        *,
        init_s: float,
        finish_s: float,
    ) -> None:
        """`after`: the last step before this process, -1 for none. `init_s`, `finish_s`: W&B's own deadlines."""
        home = folder / "wandb"
        home.mkdir(exist_ok=True)
        if not os.access(home, os.W_OK):
            raise PermissionError(f"{home} cannot be written to")  # W&B would go to the system's temporary folder
        # Silent is what forbids its login prompt; the caches would be in the home folder. Read when its process starts.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_CACHE_DIR", str(home / "cache"))
        os.environ.setdefault("WANDB_DATA_DIR", str(home / "data"))
        settings = {
            "silent": True,
            "console": "off",
            "x_transaction_log_flush_interval": FLUSH_S,
            "init_timeout": init_s,
            "finish_timeout": finish_s,
        }
        if HIDDEN in json.dumps(shown(cfg)):
            settings["x_disable_meta"] = True  # W&B records the command line, where the secret may stand too
        asked = os.environ.get("WANDB_MODE", "")
        no_login = asked in ("", "online", "run", "shared") and not logged_in(Path.cwd())
        self._tracker = WandBTracker(
            cfg.log.project,
            id=run_id,
            name=cfg.run.name,
            dir=str(folder),
            config=shown(cfg),
            resume="allow",
            reinit="create_new",  # else a run that a notebook has open would get our numbers
            settings=settings,
            **({"mode": "offline"} if no_login else {}),
        )
        self._tracker.start()
        self._cfg, self._folder, self._note = cfg, folder, note
        self._run = run = self._tracker.tracker
        run.define_metric("*", step_metric="step")
        # The numbers whose better end is known: the one that chooses best/, and the whole reward. A component may have
        # a negative weight.
        for name, best in best_of(cfg).items():
            run.define_metric(name, step_metric="step", summary=f"{best},last")
        self._last = home / f"{run_id}.last-step"
        self._seen = (run.starting_step or 0) - 1
        if run.disabled:
            note("W&B is disabled by its settings: nothing is recorded")
        elif run.offline:
            self._seen = int(self._last.read_text()) if self._last.exists() else -1
            why = "no W&B login" if no_login else "W&B is offline"
            note(f"{why}: recorded in the run folder; upload with: wandb sync {Path(run.dir).parent}")
        else:
            note(f"W&B: {run.url}")
        self._offline = run.offline and not run.disabled
        self._view_due = not (run.offline or run.disabled)
        self._looks: dict[int, dict[str, Any]] = {}  # what goes into the row of a step, which is not there yet
        if self._seen > max(after, 0):
            note(f"W&B run {run_id} holds steps up to {self._seen}; those are not sent again")

    def log(self, values: dict[str, float], step: int) -> None:
        look = self._looks.pop(step, {})
        if step <= self._seen:
            return
        if self._offline:  # first: a kill between the two may cost a row, and no step is there twice
            new = self._last.with_suffix(".new")
            new.write_text(str(step))
            os.replace(new, self._last)
        # Committed at once: else a row waits for the next one, and is lost with the process.
        self._tracker.log({"step": step, **values, **look}, step=step, commit=True)
        if self._view_due:
            self._view_due = False
            self._save_view()

    def _save_view(self) -> None:
        try:
            url = wandb_view.ensure(self._run.entity, self._run.project, self._cfg)
        except Exception as error:  # of a preview of theirs: the numbers arrive all the same
            self._note(f"warning: W&B has no saved view of this project: {type(error).__name__}: {error}")
        else:
            if url is not None:
                self._note(f"W&B: the charts in the order of docs/metrics.md are in {url}")

    def alert(self, verdict: Verdict) -> None:
        if verdict.step > self._seen:
            self._run.alert(title=verdict.title, text=verdict.text, level="WARN")

    def show(self, exhibit: Exhibit) -> None:
        """A small table of each look, under one name: a table that grows would be uploaded whole every time."""
        import wandb

        if exhibit.step <= self._seen or self._run.disabled:
            return
        components = [*self._cfg.rewards]
        columns = ["step", "prompt", "response", "tokens", "reward", "ended", "tokens' worth"]
        table = wandb.Table(columns=[*columns, *(f"reward/{name}" for name in components)])
        for s in exhibit.samples:
            page = wandb.Html(heat_map.html(s), inject=False, data_is_not_path=True)
            sums = [float(s.weighted[name].sum()) if name in s.weighted else None for name in components]
            table.add_data(exhibit.step, s.prompt, s.text, int(s.written.sum()), s.total, s.finish_reason, page, *sums)
        self._looks[exhibit.step] = {"samples": table} | {
            name: wandb.Histogram(np_histogram=(h.counts.tolist(), h.edges.tolist()))
            for name, h in exhibit.histograms.items()
        }

    def checkpoint(self, folder: Path, step: int) -> None:
        if "checkpoints" in self._cfg.log.artifacts:
            self._keep("checkpoint", "model", {folder: ""}, aliases=[f"step-{step}"])

    def close(self, exit_code: int) -> None:
        try:
            self._keep_results(exit_code)
        finally:
            self._run.finish(exit_code=exit_code)  # Accelerate's finish() has no exit code

    def _keep_results(self, exit_code: int) -> None:
        wanted, folder = self._cfg.log.artifacts, self._folder
        if "record" in wanted:
            settings = folder / "wandb" / "settings.json"  # config.yaml may hold secrets
            settings.write_text(json.dumps(shown(self._cfg), indent=1) + "\n")
            files = [folder / "metrics.jsonl", settings]
            if exit_code == 0:  # else they are of an earlier process of the run
                files += [folder / "summary.json", folder / "report.html"]
            self._keep("record", "run-record", {file: file.name for file in files if file.is_file()})
        for which in ("final", "best"):
            if which in wanted and exit_code == 0 and (folder / which).is_dir():
                self._keep(which, "model", {folder / which: ""})

    def _keep(self, name: str, kind: str, paths: dict[Path, str], aliases: list[str] | None = None) -> None:
        """Files, or folders, as a version of the artifact `<run id>-<name>`. W&B copies them first: training may delete
        a checkpoint before it is uploaded."""
        import wandb

        if self._run.disabled:
            return
        artifact = wandb.Artifact(f"{self._run.id}-{name}", type=kind)
        for path, within in paths.items():
            if path.is_dir():
                artifact.add_dir(str(path), skip_cache=True)
            else:
                artifact.add_file(str(path), name=within, skip_cache=True)
        self._run.log_artifact(artifact, aliases=["latest", *(aliases or [])])


def best_of(cfg: Config) -> dict[str, str]:
    """Metric -> `max` or `min`: whose best value the summary of a run holds beside the last."""
    chosen = cfg.run.best_metric
    return {
        "eval/reward/total": "max",
        f"eval/{chosen.removeprefix('-')}": "min" if chosen.startswith("-") else "max",
    }
