"""`tokenppo doctor`: what keeps this machine from training, a line for each check, with a remedy.

    lane of each quick check   thread: look --------------------------------------> finding
    lane of the heavy ones     thread: look, then the next, since all import torch -> finding
    main thread                waits for each in the order of CHECKS, until its deadline, and prints it

A check that does not answer in time is a FAIL of its own, and its thread is left behind: nothing else waits for it.
"""

import argparse
import json
import os
import queue
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from core.config import load
from core.faults import Fault
from launch import arguments
from launch.cluster import prepare_environment
from launch.doctor import devices, fit, network, ranks, software, storage
from launch.doctor.finding import Check, Finding, Situation, fail, warn

CHECKS = (
    Check(
        name="packages",
        looks_at="versions against the bounds of pyproject.toml; combinations that were seen to fail",
        says="FAIL: a package is not installed, or this run would meet a bad combination; warn: outside the bounds",
        look=software.look_at_packages,
        deadline_s=30,
    ),
    Check(
        name="limits",
        looks_at="open files and threads that the system allows",
        says="FAIL: fewer than Ray needs to start; warn: few for many workers",
        look=devices.look_at_limits,
    ),
    Check(
        name="memory",
        looks_at="memory that is free, of the machine or of the container",
        says="FAIL: less than the smallest run takes; warn: less than 4 GiB",
        look=devices.look_at_memory,
    ),
    Check(
        name="shared memory",
        looks_at="/dev/shm against `resources.object_store_mb`",
        says="FAIL: Ray's objects do not fit; warn: hardly",
        look=storage.look_at_shared,
    ),
    Check(
        name="disk",
        looks_at="room where `run.dir` is; writes 32 MiB and five small files there, with fsync, and removes them",
        says="FAIL: cannot be written to, or full; warn: under 2 GiB, under 30 MiB/s, or an fsync over 0.2 s",
        look=storage.look_at_disk,
        deadline_s=45,
    ),
    Check(
        name="file locks",
        looks_at="whether that file system refuses a second lock (flock), O_EXCL on a file, and renames whole",
        says="FAIL: it does not: two runs would write into each other",
        look=storage.look_at_locks,
    ),
    Check(
        name="clock",
        looks_at="the date; the time that the file system gives a new file; whether a time service keeps it",
        says="FAIL: before this program was made; warn: files are dated otherwise, or no service with several machines",
        look=storage.look_at_clock,
    ),
    Check(
        name="ports",
        looks_at="free ports, whether 127.0.0.1 can be listened at, whether the machine's name has an address",
        says="FAIL: no loopback, or fewer ports than the run takes; warn: few, or a name that others cannot find",
        look=network.look_at_ports,
    ),
    Check(
        name="Ray",
        looks_at="the token and who can read it; `resources.ray_address`: does it answer, with and without the token",
        says="FAIL: no answer, no token or a wrong one; warn: a token that others can read, a cluster without tokens",
        look=network.look_at_ray,
    ),
    Check(
        name="W&B",
        looks_at="a login, WANDB_MODE, whether the server answers; never the key",
        says="warn: `log.trackers` has wandb and there is no login or no answer: runs are recorded in their folders",
        look=network.look_at_wandb,
    ),
    Check(
        name="hub",
        looks_at="whether the Hugging Face hub answers, a login, what is in its cache",
        says="warn: no answer: models and data come from the cache, or are folders",
        look=network.look_at_hub,
    ),
    Check(
        name="GPUs",
        looks_at="what the driver lists and what torch sees of it; MIG; memory that others have",
        says="FAIL: the driver fails, or there is none and `resources.device` is cuda; warn: torch sees fewer, MIG",
        look=devices.look_at_gpus,
        deadline_s=60,
    ),
    Check(
        name="compilers",
        looks_at=(
            "locks of DeepSpeed's compiler that a killed process left; compiles decode steps and draws, as a run would"
        ),
        says="warn: there is one: others wait for it for ever, a run of ours removes it; or a run writes slower",
        look=software.look_at_compilers,
        deadline_s=60,
        imports_torch=True,
    ),
    Check(
        name="ranks",
        looks_at="two processes add up 8 MiB over gloo, and over NCCL where there are two GPUs",
        says="FAIL: they do not meet within a minute, or the sum is wrong; warn: slow",
        look=ranks.look_at_ranks,
        deadline_s=2 * ranks.DEADLINE_S + 10,
    ),
    Check(
        name="config",
        looks_at="with a configuration: all that `--dry-run` asks",
        says="FAIL: what that refuses",
        look=fit.look_at_config,
        deadline_s=120,
        of_config=True,
        imports_torch=True,
    ),
    Check(
        name="fit",
        looks_at="with a configuration: memory of learners, workers and servers (below) against what is free here",
        says="FAIL: weights, gradients, AdamW and reference alone do not fit; warn: the longest responses would not",
        look=fit.look_at_fit,
        deadline_s=120,
        of_config=True,
        imports_torch=True,
    ),
)
# Where no configuration is given: the two sections that count are those of the command line.
STAND_IN = {"model.path": "none", "data.path": "none.jsonl", "rewards.none.fn": "none.py:none"}


def main(args: argparse.Namespace) -> int:
    """Print the findings. Returns the exit code: 0, that of a configuration that cannot work, or of a process fault."""
    situation = situation_of(args)
    checks = [check for check in CHECKS if situation.whole or not check.of_config]
    found: list[tuple[str, Finding]] = []
    for name, finding in examine(situation, checks):
        found.append((name, finding))
        if not args.json:
            print(line(name, finding), flush=True)
    if args.json:
        print(json.dumps(as_json(found), indent=1))
    else:
        print(summary(found, situation.whole))
    return exit_code(found)


def situation_of(args: argparse.Namespace) -> Situation:
    """Raises UserError for a command line, or a configuration, that cannot be read."""
    words = ["--config", args.config] if args.config is not None else []
    words += ["--accelerate", args.accelerate] if args.accelerate is not None else []
    words += ["--num-processes", args.num_processes] if args.num_processes is not None else []
    for reward in args.reward:
        words += ["--reward", reward]
    train = arguments.parse(words)
    train.overrides |= args.overrides
    sections = {key.partition(".")[0] for key in train.overrides}
    whole = train.config is not None or bool(sections & {"model", "data", "rewards"})
    cfg = train.load() if whole else load(None, STAND_IN | train.overrides)
    return Situation(cfg=cfg, whole=whole, sharding=train.sharding)


def examine(situation: Situation, checks: Sequence[Check]) -> Iterator[tuple[str, Finding]]:
    """All checks at once, but those that import torch into this process one after the other; in their order."""
    prepare_environment()
    answers: dict[str, Future[list[Finding]]] = {check.name: Future() for check in checks}
    lanes = [[check] for check in checks if not check.imports_torch]
    lanes.append([check for check in checks if check.imports_torch])
    until: dict[str, float] = {}
    begun = time.monotonic()
    for lane in lanes:
        left: queue.SimpleQueue[Check] = queue.SimpleQueue()
        due = begun
        for check in lane:
            due += check.deadline_s
            until[check.name] = due
            left.put(check)
        threading.Thread(target=_look, args=(situation, left, answers), daemon=True).start()
    for check in checks:
        try:
            findings = answers[check.name].result(timeout=max(0.0, until[check.name] - time.monotonic()))
        except TimeoutError:
            findings = [judge_late(until[check.name] - begun, devices.busy())]
        for finding in findings:
            yield check.name, finding


def judge_late(waited_s: float, busy: bool) -> Finding:
    """`busy`: this machine has more to do than it can."""
    seen = f"no answer within {waited_s:.0f} s"
    if busy:
        return warn(f"{seen}, on a busy machine", "ask again when it has less to do (uptime)")
    return fail(seen, "what it looks at hangs: dmesg and mounts that do not answer may say why")


def _look(situation: Situation, checks: "queue.SimpleQueue[Check]", answers: dict[str, Future]) -> None:
    while not checks.empty():
        check = checks.get()
        try:
            findings = check.look(situation)
        except Fault as fault:
            findings = [of_fault(fault)]
        except Exception as error:  # a bug of ours in one check must not hide what the others found
            findings = [warn(f"this check failed itself: {type(error).__name__}: {error}", "report it: a bug of ours")]
        answers[check.name].set_result(findings)


def of_fault(fault: Fault) -> Finding:
    """What a run would end with, cut where its remedy begins."""
    seen, _, remedy = " / ".join(str(fault).splitlines()).rpartition("; ")
    return Finding(status="FAIL", seen=seen or remedy, remedy=remedy if seen else "", exit_code=fault.exit_code)


WIDTH = max(len(check.name) for check in CHECKS)
COLOURS = {"ok": "32", "warn": "33", "FAIL": "1;31"}


def line(name: str, finding: Finding) -> str:
    """`ok    disk           ...; remedy`, wrapped under itself on a terminal, one line elsewhere."""
    text = f"{finding.seen}; {finding.remedy}" if finding.remedy else finding.seen
    text = " ".join(text.split())
    status, indent = f"{finding.status:<4}", 6 + WIDTH + 2
    if sys.stdout.isatty():
        columns = max(60, shutil.get_terminal_size().columns)
        edge = " " * indent
        settings = {"break_long_words": False, "break_on_hyphens": False}
        text = textwrap.fill(text, columns, initial_indent=edge, subsequent_indent=edge, **settings).lstrip()
        if "NO_COLOR" not in os.environ:
            status = f"\033[{COLOURS[finding.status]}m{status}\033[0m"
    return f"{status}  {name:<{WIDTH}}  {text}"


def counts(found: Sequence[tuple[str, Finding]]) -> dict[str, int]:
    return {status: sum(f.status == status for _, f in found) for status in ("ok", "warn", "FAIL")}


def exit_code(found: Sequence[tuple[str, Finding]]) -> int:
    """That of a machine before that of a configuration: 3 before 2; 0 without a FAIL."""
    return max((f.exit_code for _, f in found if f.status == "FAIL"), default=0)


def summary(found: Sequence[tuple[str, Finding]], whole: bool) -> str:
    n = counts(found)
    code = exit_code(found)
    what = "this run" if whole else "a run"
    says = f"{what} would stop (exit {code})" if code else f"nothing here keeps {what} from training"
    more = "" if whole else "; --config F asks whether that configuration fits"
    return f"{n['ok']} ok, {n['warn']} warn, {n['FAIL']} FAIL: {says}{more}"


def as_json(found: Sequence[tuple[str, Finding]]) -> dict[str, Any]:
    checks = [{"name": name} | {k: v for k, v in asdict(f).items() if k != "exit_code"} for name, f in found]
    return {"checks": checks, "summary": counts(found) | {"exit_code": exit_code(found)}}


def table() -> str:
    """The checks as docs/doctor.md has them."""
    rows = [f"| `{check.name}` | {check.looks_at} | {check.says} |" for check in CHECKS]
    return "\n".join(["| check | what it looks at | what it says |", "|---|---|---|", *rows])
