"""One node of a job: its Ray, the learner processes on it if it has any, and an end that leaves nothing behind.

    python -m launch.submit.node --meet FOLDER --node I --nodes N --learner-nodes L ... -- words of tokenppo train

Every node of a job starts this once, in any order. They meet in a folder that all of them see:

    node 0       token, 0600    ray start --head    head.json    learners ...  end.json
    other nodes                 (wait for head.json)    ray start --address    learners, if any    (wait for end.json)

Node 0 asks the system for every port, so that jobs that share a node do not collide. What is ended is what was started
here, found as descendants of this process. Waits have deadlines; the exit code of every node is that of node 0.
"""

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from core.faults import Fault, ProcessFault, exit_code_of
from launch import arguments, cli, cluster, early, run_folder
from launch.last_words import raise_terminated

MEET_S = 600.0  # for a node of the job to be given its first process, after the first node was
RAY_S = 120.0
GRACE_S = 15.0  # for Ray's processes to end when they are told to
STARTED = "Ray runtime started."


def main(argv: list[str]) -> int:
    """Returns the exit code of the job."""
    signal.signal(signal.SIGTERM, raise_terminated)
    cluster.adopt_orphans()
    cluster.prepare_environment()
    parser = argparse.ArgumentParser(prog="python -m launch.submit.node", allow_abbrev=False)
    parser.add_argument("--meet", type=Path, required=True)
    parser.add_argument("--node", type=int, default=os.environ.get("SLURM_PROCID"), help="default $SLURM_PROCID")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--learner-nodes", type=int, default=1)
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--accelerate", default="cpu")
    parser.add_argument("words", nargs="*")
    args = parser.parse_args(argv)
    if args.node is None:
        parser.error("--node: which one is this? Outside of SLURM nobody says")
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(args.meet / "token")}
    os.environ.pop("RAY_AUTH_TOKEN", None)  # of another cluster; it would count before the file
    return head(args) if args.node == 0 else other(args)


def head(args: argparse.Namespace) -> int:
    """Node 0: it makes the meeting place and says when all is over."""
    code = 1
    try:
        args.meet.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            train = arguments.parse(args.words)
            cfg = train.load()
            if run_folder.examine(cfg).finished:
                print(run_folder.farewell(cfg.run.folder, run_folder.read_summary(cfg.run.folder), was_finished=True))
                code = 0
                return code
            early.refuse(cfg)
            write_token(args.meet / "token")
            ports = free_ports(3)
            folder = tempfile.mkdtemp(prefix="tp", dir="/tmp")  # short: a socket in it may have 107 bytes
            with ray_node(args, cfg.resources.object_store_mb, head_options(ports, folder), folder) as address:
                meeting = {"ray": address, "host": address.rpartition(":")[0], "learners": ports[2], "folder": folder}
                run_folder.write_whole(args.meet / "head.json", json.dumps(meeting))
                code = learners(args, meeting)
        except (Fault, KeyboardInterrupt, SystemExit) as error:
            if isinstance(error, Fault):
                print(f"tokenppo: {error}", file=sys.stderr, flush=True)
            code = exit_code_of(error)
    finally:
        (args.meet / "token").unlink(missing_ok=True)
        run_folder.write_whole(args.meet / "end.json", json.dumps({"exit": code}))
    return code


def other(args: argparse.Namespace) -> int:
    """A node that is not the first: it gives its Ray, and learners where it has some, until node 0 says it is over."""
    meet, code = args.meet, 1
    try:
        wait(lambda: (meet / "head.json").exists() or (meet / "end.json").exists(), MEET_S, "node 0 of this job")
        if not (meet / "end.json").exists():
            meeting = json.loads((meet / "head.json").read_text())
            store = arguments.parse(args.words).load().resources.object_store_mb
            agent = free_ports(1)[0]
            options = [f"--address={meeting['ray']}", f"--dashboard-agent-listen-port={agent}"]
            with ray_node(args, store, options, meeting["folder"]):
                if args.node < args.learner_nodes:
                    code = learners(args, meeting)
                wait(lambda: (meet / "end.json").exists() or _ray_ended(), None, "the end of node 0")
                if not (meet / "end.json").exists():
                    raise ProcessFault(f"node {args.node}: Ray ended here before node 0 said that the job is over")
    except (Fault, KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, Fault):
            print(f"tokenppo: {error}", file=sys.stderr, flush=True)
        code = exit_code_of(error)
    end = meet / "end.json"
    return json.loads(end.read_text())["exit"] if end.exists() else code


def learners(args: argparse.Namespace, meeting: dict[str, Any]) -> int:
    """The learner processes of this node; the exit code that they end with."""
    words = [*args.words, "--resources.ray_address", meeting["ray"], "--resources.nodes", str(args.nodes)]
    train = arguments.parse(["--accelerate", args.accelerate, *words])
    ranks = args.ranks_per_node * args.learner_nodes
    machines = ["--num_processes", str(ranks), "--num_machines", str(args.learner_nodes)]
    machines += ["--machine_rank", str(args.node), "--main_process_ip", meeting["host"]]
    machines += ["--main_process_port", str(meeting["learners"])]
    return cli.launch(words, train, train.load(), machines=machines if ranks > 1 else [])


def head_options(ports: list[int], folder: str) -> list[str]:
    """Of `ray start --head`, with `ports` of ours where Ray would take fixed ones."""
    return [
        "--head",
        "--port=0",
        f"--temp-dir={folder}",
        "--include-dashboard=false",
        f"--ray-client-server-port={ports[0]}",
        f"--dashboard-agent-listen-port={ports[1]}",
    ]


_started: list[subprocess.Popen] = []  # the `ray start` of this node


def _ray_ended() -> bool:
    return any(process.poll() is not None for process in _started)


@contextmanager
def ray_node(args: argparse.Namespace, object_store_mb: int, options: list[str], folder: str) -> Iterator[str]:
    """A Ray node up to the end of the block; gives the address of its cluster. Ends all it started, by descent, and
    moves Ray's logs from `folder`, where Ray has its files, to where the nodes meet."""
    log = args.meet / f"ray-node-{args.node}.log"
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats", *options]
    command += [f"--num-cpus={cluster.cores()}", f"--num-gpus={args.gpus}"]
    command += [f"--object-store-memory={object_store_mb * 2**20}"]
    with open(log, "wb") as out:
        # In a session of its own: what signals this process has is for it to pass on.
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    _started.append(process)
    try:

        def is_up() -> bool:
            said = log.read_text(errors="replace")
            if process.poll() is not None:
                last = [line for line in said.splitlines() if line.strip()][-3:]
                raise ProcessFault(f"node {args.node}: Ray did not start here: {' '.join(last)}")
            return STARTED in said

        wait(is_up, RAY_S, f"Ray on node {args.node}, which writes to {log}")
        yield _address(log.read_text(errors="replace"), options)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would leave half of it
        _started.remove(process)
        end_family(process)
        for logs in Path(folder).glob("session_2*/logs"):
            shutil.copytree(logs, args.meet / f"ray-logs-node-{args.node}", dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _address(said: str, options: list[str]) -> str:
    for option in options:
        if option.startswith("--address="):
            return option.partition("=")[2]
    # ray start --head tells how to join it: `ray start --address='1.2.3.4:5678'`.
    for word in said.split():
        if word.startswith("--address='"):
            return word.split("'")[1]
    raise ProcessFault(f"ray start --head did not say its address: {' '.join(said.split())[:300]}")


def end_family(process: subprocess.Popen) -> None:
    """End a process and all its descendants: first asked, after GRACE_S killed."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(GRACE_S)
    for each in family:
        if each.is_running():
            each.terminate()
    _, alive = psutil.wait_procs(family, timeout=GRACE_S)
    for each in alive:
        each.kill()
    psutil.wait_procs(alive, timeout=GRACE_S)


def write_token(path: Path) -> None:
    """A new token that this user alone can read, before Ray would write one that everybody can."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def free_ports(n: int) -> list[int]:
    """Of the system, which gives the same one twice only after all others."""
    held = [socket.socket() for _ in range(n)]
    try:
        for one in held:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


def wait(until: Callable[[], bool], deadline_s: float | None, what: str) -> None:
    """Return once `until()` is true. Raises ProcessFault after `deadline_s` seconds; None: `until` ends by itself."""
    deadline = time.monotonic() + deadline_s if deadline_s is not None else None
    while not until():
        if deadline is not None and time.monotonic() > deadline:
            raise ProcessFault(f"{what}: not there after {deadline_s:.0f} s")
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
