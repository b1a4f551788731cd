"""The disk of the runs, its locks and its clock, and shared memory."""

import ctypes
import fcntl
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from launch.doctor.finding import Finding, Situation, fail, ok, warn
from launch.room import SHARED

MIB, GIB = 2**20, 2**30
WRITTEN = 32 * MIB
LEAST_FREE, GOOD_FREE = 0.2 * GIB, 2 * GIB
SLOW_MIB_S, SLOW_FSYNC_S = 30.0, 0.2
SKEW_S = 2.0  # of a file's time: `tokenppo health` compares it with now
TIME_ERROR = 5  # adjtimex: the clock is not synchronised


def run_place(situation: Situation) -> Path:
    """The folder of all runs, or the nearest above it that exists."""
    folder = Path(situation.cfg.run.dir).absolute()
    return next(p for p in [folder, *folder.parents] if p.exists())


@dataclass(frozen=True, kw_only=True)
class Disk:
    place: Path
    free: float  # bytes
    mib_s: float  # of WRITTEN, fsync included
    fsync_s: float  # of a small file
    error: str | None = None  # why nothing could be written


def judge_disk(disk: Disk) -> list[Finding]:
    said = f"{disk.place}: {disk.free / GIB:.1f} GiB free"
    if disk.error is not None:
        return [fail(f"{disk.place} cannot be written to ({disk.error})", "another --run.dir, or rights to this one")]
    speed = f"{said}, writes {disk.mib_s:,.0f} MiB/s, fsync {disk.fsync_s * 1e3:.1f} ms"
    if disk.free < LEAST_FREE:
        return [fail(speed, "make room, or another --run.dir: checkpoints go there")]
    found = []
    if disk.free < GOOD_FREE:
        found.append(warn(speed, "make room: `--dry-run` says how much the checkpoints of a run take"))
    if disk.mib_s < SLOW_MIB_S or disk.fsync_s > SLOW_FSYNC_S:
        found.append(warn(f"{speed}: slow", "a local disk as --run.dir, or a larger run.save_every"))
    return found or [ok(speed)]


def look_at_disk(situation: Situation) -> list[Finding]:
    return judge_disk(measure_disk(run_place(situation)))


def measure_disk(place: Path) -> Disk:
    free = float(shutil.disk_usage(place).free)
    size = int(min(WRITTEN, free / 4))
    block = os.urandom(MIB)  # what some disks do to zeros says nothing
    try:
        with tempfile.TemporaryDirectory(prefix=".tokenppo-", dir=place) as folder:
            begun = time.perf_counter()
            with open(Path(folder) / "large", "wb") as file:
                for _ in range(max(1, size // MIB)):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            large_s, small = time.perf_counter() - begun, []
            for i in range(5):
                begun = time.perf_counter()
                with open(Path(folder) / f"small-{i}", "wb") as file:
                    file.write(block[:4096])
                    file.flush()
                    os.fsync(file.fileno())
                small.append(time.perf_counter() - begun)
    except OSError as error:
        return Disk(place=place, free=free, mib_s=0.0, fsync_s=0.0, error=error.strerror or str(error))
    return Disk(place=place, free=free, mib_s=max(1, size // MIB) / large_s, fsync_s=statistics.median(small))


@dataclass(frozen=True, kw_only=True)
class Locks:
    """Whether the file system refuses what it must refuse."""

    place: Path
    flock: bool  # a second lock on a locked file
    exclusive: bool  # O_EXCL on a file that is there
    replaces: bool  # a rename over a file leaves the new one, whole
    error: str | None = None


def judge_locks(locks: Locks) -> list[Finding]:
    if locks.error is not None:
        return [
            fail(f"{locks.place}: {locks.error}", "a --run.dir on a file system with locks (nolock mounts have none)")
        ]
    broken = [
        (locks.flock, "two processes may lock one file (flock)", "two runs of one name would write into each other"),
        (locks.exclusive, "O_EXCL makes a file that is there", "two processes would take one place"),
        (locks.replaces, "a rename over a file does not leave the new one", "a checkpoint would be torn"),
    ]
    found = [
        fail(f"{locks.place}: {what}: {why}", "a local disk as --run.dir, or mount it with locks (NFS: without nolock)")
        for works, what, why in broken
        if not works
    ]
    return found or [ok(f"{locks.place}: flock, O_EXCL and rename do what they should")]


def look_at_locks(situation: Situation) -> list[Finding]:
    return judge_locks(try_locks(run_place(situation)))


def try_locks(place: Path) -> Locks:
    try:
        with tempfile.TemporaryDirectory(prefix=".tokenppo-", dir=place) as folder:
            path = Path(folder) / "lock"
            with open(path, "w") as one, open(path) as other:
                fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
                flock = _is_refused(lambda: fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB), BlockingIOError)
            exclusive = _is_refused(lambda: os.close(os.open(path, os.O_CREAT | os.O_EXCL)), FileExistsError)
            new = Path(folder) / "new"
            new.write_text("new")
            path.write_text("old")
            os.replace(new, path)
            replaces = path.read_text() == "new" and not new.exists()
    except OSError as error:
        return Locks(place=place, flock=False, exclusive=False, replaces=False, error=error.strerror or str(error))
    return Locks(place=place, flock=flock, exclusive=exclusive, replaces=replaces)


def _is_refused(act, refusal: type[OSError]) -> bool:  # noqa: ANN001
    try:
        act()
    except refusal:
        return True
    return False


@dataclass(frozen=True, kw_only=True)
class Clock:
    now: float  # seconds since 1970, of this machine
    file: float | None  # of a file that was just written where runs go; None where none can be written
    sources: float  # when our own files were made
    synchronised: bool | None  # by a time service; None: cannot be asked


def judge_clock(clock: Clock, several_machines: bool) -> list[Finding]:
    day = datetime.fromtimestamp(clock.now, UTC).strftime("%Y-%m-%d %H:%M UTC")
    if clock.now < clock.sources - 86400:
        return [
            fail(f"{day}, which is before this program was made", "set the clock: certificates and tokens are refused")
        ]
    found = []
    if clock.file is not None and abs(clock.file - clock.now) > SKEW_S:
        skew = f"{day}; a file written now is dated {clock.file - clock.now:+.0f} s by the file system of the runs"
        found.append(warn(skew, "a time service (chrony, ntpd) on both machines: `tokenppo health` goes by such dates"))
    if several_machines and clock.synchronised is False:
        found.append(warn(f"{day}, not synchronised", "a time service (chrony, ntpd): several machines write one run"))
    how = {True: "synchronised", False: "no time service (not needed on one machine)", None: "as set"}
    return found or [ok(f"{day}, {how[clock.synchronised]}")]


def look_at_clock(situation: Situation) -> list[Finding]:
    try:
        with tempfile.NamedTemporaryFile(prefix=".tokenppo-", dir=run_place(situation)) as file:
            file.write(b"now")
            file.flush()
            dated: float | None = os.stat(file.name).st_mtime
            now = time.time()
    except OSError:  # what that means is said by the check of the disk
        dated, now = None, time.time()
    clock = Clock(now=now, file=dated, sources=Path(__file__).stat().st_mtime, synchronised=_is_synchronised())
    return judge_clock(clock, several_machines=situation.cfg.resources.ray_address is not None)


def _is_synchronised() -> bool | None:
    if sys.platform != "linux":
        return None
    buffer = ctypes.create_string_buffer(1024)  # struct timex, all 0: asks and sets nothing
    state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    return None if state < 0 else state != TIME_ERROR


def judge_shared(free: float | None, wanted: float, starts_ray: bool) -> list[Finding]:
    """`free`: bytes of /dev/shm, None where there is none. `wanted`: of resources.object_store_mb."""
    if free is None or not starts_ray:
        return [ok("not used by this run" if free is not None else "none on this system: Ray takes the disk")]
    said = f"{SHARED}: {free / MIB:,.0f} MiB free, resources.object_store_mb {wanted / MIB:,.0f}"
    if free < wanted:
        remedy = "lower resources.object_store_mb, or give the container more (docker run --shm-size)"
        return [fail(said, remedy)]
    if free < 1.25 * wanted:
        return [warn(f"{said}: hardly more", "give the container more (docker run --shm-size): DeepSpeed uses it too")]
    return [ok(said)]


def look_at_shared(situation: Situation) -> list[Finding]:
    resources = situation.cfg.resources
    free = float(shutil.disk_usage(SHARED).free) if SHARED.is_dir() else None
    return judge_shared(free, resources.object_store_mb * MIB, resources.ray_address is None)
