"""TRL in a virtual environment of its own: the last release with PPO, on the torch and transformers of this one."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

TRL, TORCH = "1.12.0", "2.13.0"
DEFAULT = Path.home() / ".cache" / "tokenppo" / f"trl-{TRL}"


def python_with_trl(folder: Path) -> Path:
    """The interpreter of the environment in `folder`, made there if need be (about 1.5 GB). Raises RuntimeError."""
    wanted = [f"trl=={TRL}", f"torch=={TORCH}", f"transformers=={version('transformers')}"]
    python, ready = folder / "bin" / "python", folder / "ready.txt"
    if ready.exists() and ready.read_text() == "\n".join(wanted):
        return python
    print(f"installing {', '.join(wanted)} into {folder}", flush=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    # torch first and by itself: where the index has a file for the CPU, nothing then asks for the one for GPUs.
    _run([str(python), "-m", "pip", "install", "-q", "--no-compile", wanted[1]])
    _run([str(python), "-m", "pip", "install", "-q", "--no-compile", *wanted])
    ready.write_text("\n".join(wanted))
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-1500:]}")
