"""Trackers: the numbers of a run to TensorBoard and W&B, through the tracker classes of Accelerate.

    trackers = Trackers.open(cfg, folder, ids={}, resumed_from=None, note=print)    # the main process only
    trackers({"reward/total": 2.41}, 1)                                             # what RunLog calls
    trackers.ids                                                                    # into every checkpoint
    trackers.close(exit_code)                                                       # waits CLOSE_S per tracker at most

One run and one writer per job: other ranks never make one of these. No tracker is worth a run, nor another tracker:
what fails is said once in one line, and RunLog counts the step that some tracker did not get.

**TensorBoard** writes `<folder>/<log.project>/`, one file per process with the settings in it. After a resume the new
file begins with a mark (`purge_step`) that hides what the lost process wrote after the checkpoint.

**W&B** writes `<folder>/wandb/`, online where there are credentials, else offline; a WANDB_MODE that needs no login is
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
import netrc
import os
import re
import uuid
from collections.abc import Callable
from configparser import ConfigParser
from configparser import Error as ConfigError
from pathlib import Path
from threading import Thread
from typing import Any, Protocol
from urllib.parse import urlsplit

import psutil
from accelerate.tracking import TensorBoardTracker, WandBTracker

from core.config import OPTION
from core.diagnosis import Verdict
from core.schema import Config
from launch import run_folder
from trainer.run_log import AlreadySaid

INIT_S = 60.0  # for W&B to answer; its client adds up to 10 s before it gives up
CLOSE_S = 60.0  # for a tracker to write or upload what it still holds
FLUSH_S = 0.5  # between writes of W&B's file; by itself it writes every 15 s, and a kill takes what it has not written
SERVICE = "wandb-core"  # the process of its own that W&B's client starts and talks to

SECRET = {"apikey", "authorization", "credential", "credentials", "key", "passwd", "password", "secret", "token"}
HIDDEN = "(hidden)"


class _Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...

    def alert(self, verdict: Verdict) -> None: ...

    def close(self, exit_code: int) -> None: ...


class Trackers:
    """The trackers of one job. Callable as RunLog wants it; steps up to `resumed_from` are there already and ignored.

    Attributes:
        ids: tracker name -> run id, to be saved in checkpoints and given back when the run is resumed.
    """

    def __init__(self, *, ids: dict[str, str], resumed_from: int | None, note: Callable[[str], None]) -> None:
        self.ids = dict(ids)
        self._after = -1 if resumed_from is None else resumed_from
        self._note = note
        self._open: dict[str, _Tracker] = {}
        self._failed: set[str] = set()  # each is named once
        self._absent = 0  # asked for, but could not be opened

    @classmethod
    def open(
        cls,
        cfg: Config,
        folder: Path,
        *,
        ids: dict[str, str],
        resumed_from: int | None,
        note: Callable[[str], None],
    ) -> "Trackers":
        """Open what `cfg.log.trackers` names. A tracker that cannot be opened is said, and missing.

        Args:
            folder: the run folder; nothing is written outside it.
            ids: `ids` of the process that this one continues, {} for a new run.
            resumed_from: the last step in the checkpoint that training continues from, None for a new run.
            note: says one line to the user.
        """
        self = cls(ids=ids, resumed_from=resumed_from, note=note)
        folder = Path(folder).absolute()
        if "wandb" in cfg.log.trackers:
            self.ids.setdefault("wandb", uuid.uuid4().hex[:12])
        makers: dict[str, Callable[[], _Tracker]] = {
            "tensorboard": lambda: _TensorBoard(cfg, folder, resumed_from),
            "wandb": lambda: _WandB(cfg, folder, self.ids["wandb"], self._after, note),
        }
        for name in dict.fromkeys(cfg.log.trackers):
            try:
                self._open[name] = makers[name]()
            except Exception as error:  # of any client of any service
                self._absent += 1
                self._say(name, "could not be opened", error)
        return self

    def __call__(self, values: dict[str, float], step: int) -> None:
        """Every tracker gets the values, whatever the others do.

        Raises:
            AlreadySaid: some tracker did not get them; RunLog counts it.
        """
        if step <= self._after:
            return
        missed = self._absent
        for name, tracker in self._open.items():
            try:
                tracker.log(values, step)
            except Exception as error:
                missed += 1
                self._say(name, f"failed at step {step}", error)
        if missed:
            raise AlreadySaid(f"{missed} of the trackers did not get step {step}")

    def alert(self, verdict: Verdict) -> None:
        """W&B sends it to whoever asked for alerts, TensorBoard shows it under its texts."""
        if verdict.step <= self._after:
            return
        for name, tracker in self._open.items():
            try:
                tracker.alert(verdict)
            except Exception as error:
                self._say(name, f"did not take the verdict of step {verdict.step}", error)

    def close(self, exit_code: int) -> None:
        """Write or upload the rest; W&B shows a run with another exit code than 0 as failed. May be called twice."""
        for name, tracker in self._open.items():
            try:
                _within(CLOSE_S, lambda tracker=tracker: tracker.close(exit_code))
            except Exception as error:
                self._say(name, "did not close well", error)
        self._open = {}

    def _say(self, name: str, what: str, error: Exception) -> None:
        if name not in self._failed:
            self._failed.add(name)
            words = " ".join(f"{type(error).__name__}: {error}".split())
            self._note(f"warning: {name} {what}, training goes on without it: {words}")


class _TensorBoard:
    def __init__(self, cfg: Config, folder: Path, resumed_from: int | None) -> None:
        from torch.utils.tensorboard.summary import hparams

        # A project may hold anything, "/" and ".." too; this folder stays inside the run's.
        name = re.sub(r"[^\w.-]+", "_", cfg.log.project).strip(".") or "tensorboard"
        purge = None if resumed_from is None else resumed_from + 1
        self._tracker = TensorBoardTracker(name, folder, purge_step=purge)
        self._tracker.start()
        if resumed_from is None:
            # Not `store_init_configuration`: it makes a second run with a clock reading for a name beside this one.
            plain = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in shown(cfg).items()}
            for summary in hparams(plain, {}):
                self._tracker.tracker.file_writer.add_summary(summary)

    def log(self, values: dict[str, float], step: int) -> None:
        self._tracker.log(values, step=step)

    def alert(self, verdict: Verdict) -> None:
        self._tracker.writer.add_text(f"diagnosis/{verdict.rule}", verdict.text, verdict.step)

    def close(self, exit_code: int) -> None:
        self._tracker.finish()


class _WandB:
    def __init__(self, cfg: Config, folder: Path, run_id: str, after: int, note: Callable[[str], None]) -> None:
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
            "init_timeout": INIT_S,
            "finish_timeout": CLOSE_S / 2,  # before `close` gives up on its process, so that there is an exit code
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
        run = self._tracker.tracker
        run.define_metric("*", step_metric="step")
        # The number that chooses best/. No other has a known better end: a component may have a negative weight.
        run.define_metric("eval/reward/total", step_metric="step", summary="max,last")
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
        if self._seen > max(after, 0):
            note(f"W&B run {run_id} holds steps up to {self._seen}; those are not sent again")

    def log(self, values: dict[str, float], step: int) -> None:
        if step <= self._seen:
            return
        # Committed at once: else a row waits for the next one, and is lost with the process.
        self._tracker.log({"step": step, **values}, step=step, commit=True)
        if self._offline:
            new = self._last.with_suffix(".new")
            new.write_text(str(step))
            os.replace(new, self._last)

    def alert(self, verdict: Verdict) -> None:
        if verdict.step > self._seen:
            self._tracker.tracker.alert(title=verdict.title, text=verdict.text, level="WARN")

    def close(self, exit_code: int) -> None:
        self._tracker.tracker.finish(exit_code=exit_code)  # Accelerate's finish() has no exit code


def shown(cfg: Config) -> dict[str, Any]:
    """The flat configuration as trackers may see it: no option with a secret's name, no password in a URL.

    Options of rewards and of the environment are the only free names: `rewards.judge.options.api_key` and `apiKey` are
    secrets, a component that is called `key`, or `data.max_prompt_tokens`, is none.
    """
    return {key: _clean("".join(OPTION.split(key, 1)[1:]), value) for key, value in run_folder.flat(cfg).items()}


def _clean(key: str, value: Any) -> Any:
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower())
    if SECRET & set(words) and value is not None:
        return HIDDEN
    if isinstance(value, dict):
        return {name: _clean(str(name), item) for name, item in value.items()}
    if isinstance(value, list):
        return [_clean("", item) for item in value]
    return re.sub(r"://[^/@\s]+@", f"://{HIDDEN}@", value) if isinstance(value, str) else value


def logged_in(working_folder: Path) -> bool:
    """Whether W&B would find credentials for its host: in the environment, its settings files, or netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = ConfigParser(interpolation=None)
    system = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser() / "settings"
    try:
        settings.read([system, working_folder / "wandb" / "settings"])
    except (ConfigError, OSError, UnicodeDecodeError):
        pass  # W&B skips a file that it cannot read
    found = dict(settings["default"]) if settings.has_section("default") else {}
    if found.get("api_key"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or found.get("base_url") or "https://api.wandb.ai").netloc
    named = os.environ.get("NETRC")
    files = [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    file = next((file for file in files if file.exists()), None)
    try:
        entry = netrc.netrc(file).authenticators(host) if file else None
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError):
        return False
    return bool(entry and entry[2])


def _within(deadline_s: float, close: Callable[[], None]) -> None:
    """Run `close` and raise what it raises, or TimeoutError after the deadline.

    What has missed it would keep the interpreter from exiting as well: W&B's client waits for its process there. So
    that process is ended; it is found among our own children.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            close()
        except BaseException as error:
            raised.append(error)

    thread = Thread(target=run, name="close-tracker", daemon=True)
    thread.start()
    thread.join(deadline_s)
    if thread.is_alive():
        for child in psutil.Process().children():
            try:
                if child.name().startswith(SERVICE):
                    child.kill()
            except psutil.NoSuchProcess:
                pass
        thread.join(1.0)  # it now learns that nobody will answer
        raise TimeoutError(f"no end after {deadline_s:g} s; what was not written is lost")
    if raised:
        raise raised[0]
