"""Checkpoints and exported weights with the real writers of torch and safetensors: damage, disks that take no more."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import tiny_models
from core.faults import StorageFault, UserError
from policy_reading import policy_of
from trainer import checkpoint
from trainer.engine_weights import whole_policy
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
        policy = policy_of(tiny_models.make_model("gpt2"))
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
    assert checkpoint.latest(small / "checkpoints") is None


def test_exported_weights_that_do_not_fit_are_a_storage_fault(small):
    (small / "ballast").write_bytes(b"x" * 250_000)
    with pytest.raises(StorageFault, match="could not be written"):
        policy = policy_of(tiny_models.make_model("gpt2"))
        checkpoint.save_pretrained(policy, whole_policy(policy), tiny_models.make_tokenizer(), small / "best", step=1)
    assert not (small / "best").exists()


def test_another_error_while_saving_keeps_its_name(tmp_path, learner):
    learner.save_state = lambda folder: (_ for _ in ()).throw(RuntimeError("peer failed to write to its socket"))
    with pytest.raises(RuntimeError, match="socket"):
        checkpoint.save(tmp_path, learner, {}, keep=1)


def test_a_table_of_a_rank_is_part_of_the_checkpoint(tmp_path, learner):
    name, table = "under_way/rank-0.parquet", pa.table({"a": [1, 2]})
    checkpoint.save(tmp_path, learner, {}, keep=1, tables={name: table})
    place = checkpoint.latest(tmp_path).folder
    assert pa.parquet.read_table(place / name) == table
    (place / name).write_bytes((place / name).read_bytes()[:-1] + b"x")
    assert checkpoint.damage_of(place) == f"{name} holds other bytes than were written"
    (place / name).unlink()
    assert checkpoint.damage_of(place) == f"{name} is missing"


def test_a_checkpoint_of_another_version_is_refused_in_one_line(tmp_path, learner, monkeypatch):
    checkpoint.save(tmp_path, learner, {}, keep=1)
    assert checkpoint.latest(tmp_path).step == 1
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    with pytest.raises(UserError, match=r"another version .*format 4, .*--run\.name"):
        checkpoint.latest(tmp_path)


def test_the_manifests_of_earlier_versions_are_known_as_such_and_not_called_damage(tmp_path):
    """Up to format 2 a manifest was name -> size and BLAKE2b."""
    place = tmp_path / "step-4"
    place.mkdir()
    (place / "state.json").write_text('{"format": 2, "step": 4}')
    (place / "manifest.json").write_text('{"state.json": [24, "9b1f4f6a0a0d3f7b5a9e0c4d2f6a8b1c"]}')
    with pytest.raises(UserError, match=r"step-4 was written by another version .*format 2 or before"):
        checkpoint.latest(tmp_path)


DAMAGES = 1000
KINDS = (
    "flip",
    "cut",
    "swap",
    "missing",
    "more bytes",
    "no manifest",
    "empty manifest",
    "other manifest",
    "edit",
    "extra",
)


def damage(place: Path, other: Path, kind: str, rng: random.Random) -> dict[Path, bytes | None]:
    """Do it; returns what the files were before."""
    files = sorted(p for p in place.rglob("*") if p.is_file())
    one, manifest = rng.choice(files), place / "manifest.json"
    before = {one: one.read_bytes()}
    data = bytearray(before[one])
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        one.write_bytes(data)
    elif kind == "cut":
        one.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "swap":
        two = rng.choice([p for p in files if p.read_bytes() != before[one]])
        before[two] = two.read_bytes()
        one.write_bytes(before[two]), two.write_bytes(before[one])
    elif kind == "missing":
        one.unlink()
    elif kind == "more bytes":
        one.write_bytes(data + rng.randbytes(rng.randint(1, 9)))
    elif kind == "edit":  # by hand, with an editor: still JSON
        state = place / "state.json"
        before = {state: state.read_bytes()}
        content = json.loads(before[state])
        content["prompts"]["position"] += rng.randint(1, 9)
        state.write_text(json.dumps(content, indent=2) + "\n")
    elif kind == "extra":
        before = {place / "learner" / f"custom_checkpoint_{rng.randrange(9)}.pkl": None}
        next(iter(before)).write_bytes(b"x")
    else:
        before = {manifest: manifest.read_bytes()}
        if kind == "no manifest":
            manifest.unlink()
        else:
            manifest.write_bytes(b"" if kind == "empty manifest" else (other / "manifest.json").read_bytes())
    return before


def test_a_thousand_random_damages_are_all_found(tmp_path, learner):
    for step in (1, 2):
        learner.step = step
        checkpoint.save(tmp_path, learner, {"prompts": {"position": 8 * step}}, keep=2)
    other, place = tmp_path / "step-1", tmp_path / "step-2"
    rng, missed = random.Random(20261127), []
    for number in range(DAMAGES):
        kind = KINDS[number % len(KINDS)]
        before = damage(place, other, kind, rng)
        if checkpoint.damage_of(place) is None:
            missed.append((number, kind, [str(p) for p in before]))
        for file, data in before.items():
            file.unlink(missing_ok=True) if data is None else file.write_bytes(data)
    assert not missed
    assert checkpoint.damage_of(place) is None  # so it was the damage that was found


def test_the_latest_whole_checkpoint_is_used_and_a_damaged_one_set_aside_for_good(tmp_path, learner):
    for step in (1, 2, 3):
        learner.step = step
        checkpoint.save(tmp_path, learner, {}, keep=3)
    (tmp_path / "step-3" / "state.json").write_text("{}")
    found = checkpoint.latest(tmp_path)
    assert found.step == 2 and [place.name for place, _ in found.damaged] == ["step-3"]
    assert checkpoint.set_aside(tmp_path / "step-3").name == "step-3.damaged"
    shutil.copytree(tmp_path / "step-3.damaged", tmp_path / "step-3")
    assert checkpoint.set_aside(tmp_path / "step-3").name == "step-3.damaged.2"
    assert checkpoint.latest(tmp_path).damaged == ()
    learner.step = 3
    checkpoint.save(tmp_path, learner, {}, keep=2)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step-2", "step-3", "step-3.damaged", "step-3.damaged.2"]


def test_where_all_are_damaged_or_set_aside_nothing_begins_anew_in_silence(tmp_path, learner):
    checkpoint.save(tmp_path, learner, {}, keep=2)
    (tmp_path / "step-1" / "manifest.json").unlink()
    for _ in range(2):  # asked twice: nothing was renamed by asking
        with pytest.raises(StorageFault, match=r"all 1 checkpoints are damaged \(step-1: manifest.json cannot be read"):
            checkpoint.latest(tmp_path)
    checkpoint.set_aside(tmp_path / "step-1")
    with pytest.raises(StorageFault, match="all 1 checkpoints are damaged; start under another --run.name"):
        checkpoint.latest(tmp_path)
    assert checkpoint.latest(tmp_path / "nothing") is None


def test_without_room_for_the_next_checkpoint_none_is_begun(tmp_path, learner, monkeypatch):
    checkpoint.save(tmp_path, learner, {}, keep=2)
    size = sum(p.stat().st_size for p in (tmp_path / "step-1").rglob("*") if p.is_file())
    learner.step = 2
    learner.save_state = lambda folder: pytest.fail("nothing must be written")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(0, 0, int(1.19 * size)))
    with pytest.raises(StorageFault, match=r"the next checkpoint wants .* MiB are free; make room .* from step 1"):
        checkpoint.save(tmp_path, learner, {}, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_weights_whose_replacement_was_cut_in_two_are_put_back(tmp_path, monkeypatch):
    policy = policy_of(tiny_models.make_model("gpt2"))
    checkpoint.save_pretrained(policy, whole_policy(policy), tiny_models.make_tokenizer(), tmp_path / "best", step=1)
    before = {p.name: p.read_bytes() for p in (tmp_path / "best").iterdir()}
    replace, calls = checkpoint.os.replace, []

    def dies_before_the_second(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", dies_before_the_second)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_pretrained(
                policy, whole_policy(policy), tiny_models.make_tokenizer(), tmp_path / "best", step=2
            )
    assert not (tmp_path / "best").exists()
    checkpoint.put_back(tmp_path / "best")
    assert {p.name: p.read_bytes() for p in (tmp_path / "best").iterdir()} == before
    checkpoint.save_pretrained(policy, whole_policy(policy), tiny_models.make_tokenizer(), tmp_path / "best", step=2)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_a_folder_of_weights_has_a_manifest_and_the_generation_config_of_its_base(tmp_path):
    policy = policy_of(tiny_models.make_model("gpt2"))
    checkpoint.save_pretrained(policy, whole_policy(policy), tiny_models.make_tokenizer(), tmp_path / "final", step=7)
    assert json.loads((tmp_path / "final" / "generation_config.json").read_text())["eos_token_id"] == [0, 7]
    assert checkpoint.damage_of(tmp_path / "final") is None
    file = tmp_path / "final" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert "model.safetensors holds other bytes" in checkpoint.damage_of(tmp_path / "final")


def test_a_folder_of_weights_holds_what_transformers_saves_and_nothing_that_a_model_computes(tmp_path, recwarn):
    policy = policy_of(tiny_models.make_model("llama-tied"))
    assert any("inv_freq" in name for name in whole_policy(policy).lm)  # a sync sends it
    checkpoint.save_pretrained(policy, whole_policy(policy), tiny_models.make_tokenizer(), tmp_path / "final", step=1)
    policy.lm.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / which / "model.safetensors") for which in ("final", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
