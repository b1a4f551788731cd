"""The two commands of the README in a Debian that has python3 and nothing else: no compiler, no git, no cache."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cards_run import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.long(seconds=400), pytest.mark.timeout(1500)]

DEBOOTSTRAP_S = 400
SUITE = "bookworm"
PACKAGES = "python3,ca-certificates"  # the second is how this machine reaches packages
# How this machine reaches packages: settings of pip's, and nothing else of its environment.
PASSED_ON = ("PIP_", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
PIP_FILES = ("/etc/pip.conf", "/etc/xdg/pip", "/etc/ssl/certs/ca-certificates.crt", "/etc/resolv.conf", "/etc/hosts")


def mirror() -> str | None:
    """Where this machine's apt finds Debian's packages."""
    if shutil.which("apt-get") is None:
        return None
    command = ["apt-get", "indextargets", "--format", "$(SITE)"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return next((site for site in said.stdout.split() if re.fullmatch(r"https?://\S+/debian/?", site)), None)


def local_packages() -> list[str]:
    """Folders of this machine from which pip takes packages."""
    said = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60)
    named = re.findall(r"file://(/[^\s']+)|(?<=find-links=')(/[^\s']+)", said.stdout)
    return sorted({path for pair in named for path in pair if path and Path(path).is_dir()})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("a root of the test's own wants root")
    if shutil.which("debootstrap") is None and shutil.which("apt-get"):
        subprocess.run(["apt-get", "install", "--yes", "debootstrap"], capture_output=True, timeout=180)
    site = mirror()
    if shutil.which("debootstrap") is None or site is None:
        pytest.skip("there is no debootstrap, or apt names no mirror of Debian")
    folder = tmp_path_factory.mktemp("root") / "debian"
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(folder), site]
    made = subprocess.run(command, capture_output=True, text=True, timeout=DEBOOTSTRAP_S)
    if made.returncode:
        pytest.skip(f"debootstrap made no root here: {made.stdout[-300:]}")
    ignored = shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__")
    shutil.copytree(ROOT, folder / "tokenppo", ignore=ignored, symlinks=True)
    for name in PIP_FILES:
        source, target = Path(name), folder / name[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        elif source.is_file():
            shutil.copy(source, target)
    yield folder
    shutil.rmtree(folder)


def within(root: Path, line: str, timeout_s: float) -> subprocess.CompletedProcess:
    """A line of bash in the checkout in `root`, in namespaces of its own: mounts and processes end with it."""
    # Onto itself first, so that it has a line in the table of mounts, as every root has.
    mounts = [f"mount --bind {root} {root}", f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
    mounts += [f"mkdir -p {root}{path} && mount --bind -o ro {path} {root}{path}" for path in local_packages()]
    passed = [f"{k}={v}" for k, v in os.environ.items() if k.startswith(PASSED_ON)]
    inner = shlex.join(
        ["env", "-i", "HOME=/root", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]
        + passed
        + ["bash", "-c", f"cd /tokenppo && {line}"]
    )
    script = " && ".join([*mounts, f"exec chroot {root} {inner}"])
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def test_both_commands_install_what_they_need_and_work(root):
    """The demo is cut to two steps here; whole, and with all fast tests, it was done by hand (docs/decisions.md)."""
    demo = within(root, "bash launch/demo.sh --run.steps 2 --data.eval_prompts 8", 1000)
    assert demo.returncode == 0, demo.stdout[-3000:] + demo.stderr[-3000:]
    assert "step 2/2" in demo.stdout and "results: " in demo.stdout, demo.stdout
    tests = within(root, "bash launch/test.sh tests/test_ppo.py tests/test_gae.py", 400)
    assert tests.returncode == 0, tests.stdout[-3000:] + tests.stderr[-3000:]
    assert re.search(r"\d+ passed", tests.stdout) and "failed" not in tests.stdout
