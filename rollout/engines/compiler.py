"""Compiles a C++ source of ours for the processor that it runs on, once, and loads it.

    ~/.cache/tokenppo/compiled/<source>-<digest of source, headers, command, C library and processor>.so

A file is compiled under another name and renamed when it is whole; whoever comes meanwhile waits for its lock, which
the system lifts when its holder dies. Homes are shared by machines, hence the processor in the name. No library of
threads is linked: the symbols of OpenMP are those that torch has loaded, so that there is one set of threads and not
two that wait for each other's cores.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

STEP = Path(__file__).with_name("compiled_step.cpp")
DRAW = Path(__file__).with_name("compiled_draw.cpp")
CPUINFO = Path("/proc/cpuinfo")
COMPILING_S = 120.0  # a few seconds in fact
COMPILE = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-c")
LINK = ("-shared",)


class NotCompiled(Exception):
    """In words of its own, for whoever goes on without."""


def load(source: Path) -> ctypes.CDLL:
    """Raises NotCompiled where that is not possible here."""
    import torch  # noqa: F401  # brings the OpenMP whose symbols are wanted

    try:
        return ctypes.CDLL(str(compiled(source)))
    except OSError as error:
        raise NotCompiled(f"{source.name} is compiled and cannot be loaded ({error})") from error


def compiled(source: Path) -> Path:
    """The library made of `source`; it is made if need be. Raises NotCompiled."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenppo" / "compiled"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _must_be_ours(folder)
        made = folder / f"{source.stem}-{_digest(source)}.so"
        if not made.exists():
            with open(made.with_suffix(".lock"), "w") as lock:
                _wait_for(lock)
                if not made.exists():
                    _compile(source, made)
        _must_be_ours(made)
        return made
    except (OSError, RuntimeError, ValueError) as error:  # no home, or a CXX that is no command
        raise NotCompiled(str(error)) from error


def _must_be_ours(path: Path) -> None:
    """What lies there is run: nobody else may write it."""
    seen = path.stat()
    if seen.st_uid != os.getuid() or seen.st_mode & 0o022:
        raise NotCompiled(f"{path} can be written by others, and what lies there is run: remove it")


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++") or ["g++"]


def _digest(source: Path) -> str:
    command = [*_compiler(), *COMPILE, *LINK]
    system = platform.libc_ver()  # a home may be seen from containers that have another
    included = [header.read_bytes() for header in sorted(source.parent.glob("*.h"))]
    known = source.read_bytes(), *included, "\0".join([*command, *system]).encode(), _processor(CPUINFO).encode()
    return hashlib.sha256(b"\0".join(known)).hexdigest()[:16]


def _processor(cpuinfo: Path) -> str:
    """Its kind and what it can do: of two with the same answer, one runs what was compiled for the other."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    said = dict(tuple(map(str.strip, line.split(":", 1))) for line in reversed(lines) if ":" in line)
    names = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU implementer", "CPU part", "Features")
    return " ".join([platform.machine(), *(said.get(name, "") for name in names)])


def _wait_for(lock: object) -> None:
    until = time.monotonic() + COMPILING_S
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise NotCompiled(f"another process has held {lock.name} for {COMPILING_S:.0f} s") from None
            time.sleep(0.05)


def _compile(source: Path, made: Path) -> None:
    compiler = _compiler()
    if shutil.which(compiler[0]) is None:
        raise NotCompiled(f"there is no {compiler[0]} on PATH")
    with tempfile.TemporaryDirectory(dir=made.parent) as aside:
        here = Path(aside)
        for command in (
            [*compiler, *COMPILE, str(source), "-o", str(here / "part.o")],
            [*compiler, *LINK, str(here / "part.o"), "-o", str(here / made.name)],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILING_S)
            except subprocess.TimeoutExpired as error:
                raise NotCompiled(f"{compiler[0]} has not compiled {source.name} in {COMPILING_S:.0f} s") from error
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["without a word"])[0]
                raise NotCompiled(f"{compiler[0]} does not compile {source.name}: {said}")
        (here / made.name).chmod(0o700)  # a umask of 002, which many have, would let the group write it
        os.replace(here / made.name, made)


if __name__ == "__main__":  # at the installation, so that no run waits for it
    try:
        for part in (STEP, DRAW):
            compiled(part)
    except NotCompiled as error:
        print(f"decode steps on a CPU are not compiled as far as they could be, slower: {error}")
