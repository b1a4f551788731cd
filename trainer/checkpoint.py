"""Weights on disk, in folders that `from_pretrained` loads: the causal LM, its tokenizer, and the value head beside."""

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from trainer.model import PolicyWithValueHead

VALUE_HEAD_FILE = "value_head.safetensors"


def save_pretrained(policy: PolicyWithValueHead, tokenizer: Any, folder: Path) -> None:
    """Write the folder anew, whole or not at all: it is made beside its place and renamed into it."""
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    policy.lm.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    save_file({name: x.contiguous() for name, x in policy.value_head.state_dict().items()}, fresh / VALUE_HEAD_FILE)
    for file in fresh.iterdir():  # safetensors leaves 0600, which a colleague's job could not read
        file.chmod(0o644)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)
