"""Checkpoints and exported weights on disks that take no more, with the real writers of torch and safetensors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import tiny_models
from core.faults import StorageFault, UserError
from trainer import checkpoint
from trainer.model import PolicyWithValueHead
from trainer.ranks import Ranks


@pytest.fixture
def small(tmp_path) -> Path:
    """A file system of 300 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class Learner:
    """One model under Accelerate, as trainer/learner.py saves it."""

    ranks, step = Ranks(), 1

    def __init__(self) -> None:
        self._accelerator = Accelerator(cpu=True)
        policy = PolicyWithValueHead(tiny_models.make_model("gpt2"))
        self._accelerator.prepare(policy, torch.optim.AdamW(policy.parameters()))

    def save_state(self, folder: Path) -> None:
        self._accelerator.save_state(str(folder))


@pytest.fixture
def learner():
    yield Learner()
    AcceleratorState._reset_state(reset_partial_state=True)


# Bytes taken beforehand: nothing fits, the weights fit but not AdamW, and all but a few bytes are taken.
@pytest.mark.parametrize("taken", [250_000, 120_000, 300_000])
def test_a_disk_that_fills_up_is_a_storage_fault_and_leaves_no_checkpoint(small, learner, taken):
    (small / "ballast").write_bytes(b"x" * taken)
    with pytest.raises(StorageFault, match="could not be written .*make room"):
        checkpoint.save(small / "checkpoints", learner, {}, keep=1)
    assert checkpoint.latest(small / "checkpoints", print) is None


def test_exported_weights_that_do_not_fit_are_a_storage_fault(small):
    (small / "ballast").write_bytes(b"x" * 250_000)
    with pytest.raises(StorageFault, match="could not be written"):
        policy = PolicyWithValueHead(tiny_models.make_model("gpt2"))
        checkpoint.save_pretrained(policy, tiny_models.make_tokenizer(), small / "best")
    assert not (small / "best").exists()


def test_another_error_while_saving_keeps_its_name(tmp_path, learner):
    learner.save_state = lambda folder: (_ for _ in ()).throw(RuntimeError("peer failed to write to its socket"))
    with pytest.raises(RuntimeError, match="socket"):
        checkpoint.save(tmp_path, learner, {}, keep=1)


def test_a_checkpoint_of_another_version_is_refused_in_one_line(tmp_path, learner, monkeypatch):
    checkpoint.save(tmp_path, learner, {}, keep=1)
    assert checkpoint.latest(tmp_path, print).step == 1
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    with pytest.raises(UserError, match=r"another version .*--run\.name"):
        checkpoint.latest(tmp_path, print)
