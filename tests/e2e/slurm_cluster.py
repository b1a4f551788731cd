"""A SLURM of two nodes on this machine: Debian's daemons in a scratch folder, with ports and a key of their own."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from launch.submit.node import free_ports

DAEMONS = ("munged", "slurmctld", "slurmd")
INSTALL_S = 180


def absent() -> str | None:
    """Why there can be no SLURM here; None where there can. Installs Debian's packages if need be."""
    if os.geteuid() != 0:
        return "a SLURM of the test's own wants root"
    if all(map(_found, DAEMONS)):
        return None
    if shutil.which("apt-get") is None:
        return "there is no SLURM (slurmctld, slurmd, munged), and no apt-get to install it"
    command = ["apt-get", "install", "--yes", "--no-install-recommends", "slurm-wlm", "munge"]
    try:
        if subprocess.run(["apt-get", "update"], capture_output=True, timeout=INSTALL_S).returncode == 0:
            subprocess.run(
                command,
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive", "POLICYRCD": ""},
                capture_output=True,
                timeout=INSTALL_S,
            )
    except subprocess.TimeoutExpired:
        return f"apt-get did not bring slurm-wlm and munge within {INSTALL_S} s"
    return None if all(map(_found, DAEMONS)) else "apt-get brings no slurm-wlm and munge here"


def _found(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Cluster:
    def __init__(self, folder: Path) -> None:
        """`folder`: short, since sockets lie in it."""
        self.folder = folder
        host = os.uname().nodename
        ctld, first, second = free_ports(3)
        self.conf = folder / "slurm.conf"
        self.conf.write_text(
            f"""
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
MailProg=/bin/true
ReturnToService=2
KillWait=15
UnkillableStepTimeout=60
SlurmdTimeout=300
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=8 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=8 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
        )
        (folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
        self.environ = os.environ | {
            "SLURM_CONF": str(self.conf),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        self._daemons: list[subprocess.Popen] = []
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        folder.chmod(0o755)
        munged = [_found("munged") or "munged", "--foreground", "--force", f"--key-file={key}"]
        munged += [f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
        munged += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir()
        try:
            self._begin(munged)
        except BaseException:  # Ctrl-C too leaves no daemon behind
            self.end()
            raise

    def _begin(self, munged: list[str]) -> None:
        self._start(munged)
        self.wait_for(lambda: (self.folder / "munge.socket").exists(), 30)
        self._start([_found("slurmctld") or "slurmctld", "-D", "-f", str(self.conf)])
        for name in ("n1", "n2"):
            self._start([_found("slurmd") or "slurmd", "-D", "-N", name, "-f", str(self.conf)])
        self.wait_for(lambda: self.ask("sinfo", "--noheader", "--format=%D %t").split() == ["2", "idle"], 60)

    def _start(self, command: list[str]) -> None:
        with open(self.folder / f"{Path(command[0]).name}.out", "ab") as out:
            self._daemons.append(subprocess.Popen(command, env=self.environ, stdout=out, stderr=subprocess.STDOUT))

    def ask(self, *command: str, cwd: Path | None = None) -> str:
        """What a command of SLURM says."""
        done = subprocess.run(command, env=self.environ, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Its state, as `scontrol show job` has it."""
        words = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, what: Callable[[], object], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            for daemon in self._daemons:
                assert daemon.poll() is None, f"{daemon.args} ended:\n{self.logs()}"
            assert time.monotonic() < deadline, f"not within {timeout_s} s:\n{self.logs()}"
            time.sleep(0.2)

    def ended(self, number: str, timeout_s: float) -> dict[str, str]:
        """The job once it has ended."""
        running = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED")
        self.wait_for(lambda: self.job(number)["JobState"] not in running, timeout_s)
        return self.job(number)

    def logs(self) -> str:
        return "".join(
            f"== {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in sorted(self.folder.glob("*.log"))
        )

    def family(self) -> list[psutil.Process]:
        """All that jobs have started and that has not ended."""
        return [
            process
            for daemon in self._daemons
            for process in psutil.Process(daemon.pid).children(recursive=True)
            if process.name() != "slurmscriptd"  # slurmctld's own
        ]

    def end(self) -> None:
        for daemon in reversed(self._daemons):
            family = psutil.Process(daemon.pid).children(recursive=True) if daemon.poll() is None else []
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(20)
            for process in family:
                if process.is_running():
                    process.kill()
