"""The interpreter of the rollout workers, where it is not the learner's: asked before anything is started.

vLLM pins torch and transformers to other releases than the learner's, so it lives in an environment of its own. A
worker imports `core` and `rollout` alone, and of others what WANTED names (launch/vllm_venv.sh installs just that).
"""

import importlib.util
import json
import os
import platform
import subprocess
import sysconfig
from importlib.metadata import version
from pathlib import Path
from typing import Any

from core.faults import UserError
from core.schema import Config

WANTED = ("numpy", "ray", "safetensors", "torch", "transformers", "xxhash")
# Of vllm 0.32 on a CPU (CPUAttentionBackend.get_supported_head_sizes); with others the first token is an error there.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
MAKES = "bash launch/vllm_venv.sh makes an environment with vLLM and says what to give as rollout.python"
LOOK_S = 60.0
LOOK = """
import json, platform, sys
from importlib import metadata, util
found = {name: util.find_spec(name) is not None for name in sys.argv[1:]}
print(json.dumps({"found": found, "ray": metadata.version("ray") if found["ray"] else "", \
"python": platform.python_version()}))
"""


def environment(python: str) -> dict[str, Any]:
    """Ray's runtime environment of an actor that runs on another interpreter."""
    return {"py_executable": python, "env_vars": {"PYTHONPATH": _search_path()}}


def _search_path() -> str:
    house = Path(__file__).resolve().parent.parent
    if house == Path(sysconfig.get_path("purelib")).resolve():
        return ""  # an installed tokenppo: its folder has the learner's torch and transformers too
    return str(house)


def refuse(cfg: Config, model: dict[str, Any] | None) -> None:
    """Raise UserError, one line, where the rollout workers could not start here. `model`: its config.json if known."""
    rollout = cfg.rollout
    if cfg.resources.ray_address is None:  # else they start on other machines, which know better
        _refuse_interpreter(rollout.python, rollout.engine)
    if rollout.engine == "vllm" and model is not None and _is_cpu(cfg):
        width = model.get("hidden_size") or model.get("n_embd")
        size = model.get("head_dim") or _quotient(width, model.get("num_attention_heads") or model.get("n_head"))
        if size is not None and size not in CPU_HEAD_SIZES:
            sizes = ", ".join(map(str, CPU_HEAD_SIZES))
            raise UserError(
                f"rollout.engine = vllm: its attention on a CPU has heads of {sizes}, and those of {cfg.model.path} are"
                f" {size} wide; take rollout.engine transformers"
            )


def _refuse_interpreter(python: str | None, engine: str) -> None:
    if python is None:
        if engine == "vllm" and importlib.util.find_spec("vllm") is None:
            raise UserError(f"rollout.engine = vllm: it is not installed beside the learner; {MAKES}")
        return
    key = f"rollout.python = {python}"
    if not Path(python).is_file() or not os.access(python, os.X_OK):
        raise UserError(f"{key}: there is no such interpreter; {MAKES}")
    wanted = [*WANTED, *(["vllm"] if engine == "vllm" else []), "rollout"]
    try:
        done = subprocess.run(
            [python, "-c", LOOK, *wanted],
            env=os.environ | {"PYTHONPATH": _search_path()},
            cwd=Path(python).parent,  # what lies in the folder that the user stands in does not count
            capture_output=True,
            text=True,
            timeout=LOOK_S,
        )
        said = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{key}: does not answer as a Python does ({type(error).__name__}); give another") from None
    missing = [name for name, is_there in said["found"].items() if not is_there]
    if "rollout" in missing:
        missing[missing.index("rollout")] = "tokenppo (pip install --no-deps)"
    if missing:
        raise UserError(f"{key}: has no {', no '.join(missing)}; {MAKES}")
    for what, theirs, ours in (
        ("Ray", said["ray"], version("ray")),
        ("Python", said["python"], platform.python_version()),
    ):
        if theirs != ours:  # Ray takes no worker of another
            raise UserError(f"{key}: has {what} {theirs} and the learner {ours}; they must be the same")


def _is_cpu(cfg: Config) -> bool:
    return cfg.resources.device == "cpu" or (cfg.resources.device == "auto" and version("torch").endswith("+cpu"))


def _quotient(width: Any, heads: Any) -> int | None:
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None
