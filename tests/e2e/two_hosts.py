"""Two hosts on one machine: network namespaces with an address each, a cable between them, a Ray over both.

    here 10.77.0.1   head of the cluster, learner, reward server   ---cable---   there 10.77.0.2   a node of it

Names have the process id, so that two of them do not collide; addresses and ports are of the namespaces alone.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

HERE, THERE, PORT = "10.77.0.1", "10.77.0.2", 6379
UP_S = 240.0


def refuse_without_namespaces() -> None:
    """Skip where no namespaces can be made."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("wants network namespaces: Linux, root, and iproute2 (apt-get install iproute2)")
    name = f"tokenppo-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"wants network namespaces, which this machine refuses: {made.stderr.strip()}")
    subprocess.run(["ip", "netns", "delete", name], check=True)


class TwoHosts:
    """Call `close`, whatever happens in between."""

    def __init__(self, folder: Path) -> None:
        """`folder`: for logs; its path is short, since sockets lie in it."""
        self.folder, self._nodes, self.started = folder, dict[str, subprocess.Popen](), 0
        self.here, self.there = f"tokenppo-{os.getpid()}-a", f"tokenppo-{os.getpid()}-b"
        token = folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.environment |= {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        # Ray gives a node up after five questions without an answer: here after half a minute, else after one.
        self.environment |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "5000"}
        self.environment.pop("RAY_ADDRESS", None)

    def build(self) -> None:
        """Namespaces, the cable, and the head of the cluster."""
        for name in (self.here, self.there):
            _ip("netns", "add", name)
        _ip("link", "add", "cable", "netns", self.here, "type", "veth", "peer", "name", "cable", "netns", self.there)
        for name, address in ((self.here, HERE), (self.there, THERE)):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", name, "link", "set", device, "up")
        head = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self.folder}/r"]
        self._start(self.here, *head, f"--node-ip-address={HERE}")

    def add_node(self) -> None:
        """The node there; a new one, where there was one that is lost."""
        self._start(self.there, f"--address={HERE}:{PORT}", f"--node-ip-address={THERE}")

    def remove_node(self) -> None:
        """What is left of the node there."""
        _end(self._nodes.pop(self.there))
        _sweep(self.there)

    def pids_here(self) -> set[int]:
        return _pids(self.here)

    def pids_there(self) -> set[int]:
        return _pids(self.there)

    def command(self, *words: str) -> list[str]:
        """Has the words run here."""
        variables = [f"{name}={self.environment[name]}" for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")]
        return ["ip", "netns", "exec", self.here, "env", *variables, *words]

    def cut(self) -> None:
        _ip("-n", self.there, "link", "set", "cable", "down")

    def mend(self) -> None:
        _ip("-n", self.there, "link", "set", "cable", "up")

    def close(self) -> None:
        """Ends what was started in both and takes them away."""
        for process in self._nodes.values():
            _end(process)
        for name in (self.here, self.there):
            _sweep(name)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def _start(self, name: str, *options: str) -> None:
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats", "--num-cpus=1"]
        command = ["ip", "netns", "exec", name, *ray, f"--object-store-memory={80 * 2**20}", *options]
        deadline = time.monotonic() + UP_S
        while True:
            self.started += 1
            log = self.folder / f"node-{self.started}.log"
            with log.open("wb") as out:
                io = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
                self._nodes[name] = subprocess.Popen(command, env=self.environment, **io)
            while True:
                ended = self._nodes[name].poll() is not None
                words = log.read_text(errors="replace")  # after that look, or the last of them may be missing
                if "Ray runtime started" in words:
                    return
                assert time.monotonic() < deadline, f"no Ray after {UP_S:g} s:\n{words[-3000:]}"
                if ended:
                    break
                time.sleep(0.1)
            # Ray allows a node 30 s to register, whatever else the machine is doing.
            assert "timed out during startup" in words, f"Ray did not start:\n{words[-3000:]}"
            _sweep(name)


def _pids(name: str) -> set[int]:
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    return {int(pid) for pid in found.stdout.split()}


def _sweep(name: str) -> None:
    """End whoever lives on in a namespace: of a node that Ray gave up, some do."""
    for pid in _pids(name):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def _end(process: subprocess.Popen) -> None:
    """A node and all that it started."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    if process.poll() is None:
        process.kill()
    process.wait(30)
