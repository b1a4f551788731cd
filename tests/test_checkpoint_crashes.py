"""A process or a machine that dies at any moment of a save leaves the checkpoint before or the new one, whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def crashes(folder: Path, how: str, before: str) -> list[dict]:
    command = [sys.executable, str(ROOT / "tests" / "checkpoint_crashes.py"), str(folder), how, before]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "power"])
def test_a_crash_at_every_call_of_a_save_leaves_the_old_or_the_new_checkpoint_whole(tmp_path, how):
    """Two checkpoints are there and two are kept: the crash may come before, in and after the renames and deletions."""
    points = crashes(tmp_path / "c", how, "next")
    assert len(points) >= 24 and [p["at"] for p in points] == list(range(1, len(points) + 1))
    loaded = [p["loaded"] for p in points]
    assert loaded == sorted(loaded) and set(loaded) == {2, 3}  # the old one up to the rename, from there the new one
    assert loaded.count(3) >= 5  # the flush of the parent and the deletion of the oldest come after it
    assert not any(
        p["damaged"] for p in points
    )  # nothing half written or half deleted ever had the name of a checkpoint
    for p in points:  # the next save clears what was left
        assert p["after"] == [f"step-{p['loaded']}", f"step-{p['loaded'] + 1}"], p


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "power"])
def test_a_crash_in_the_first_save_leaves_nothing_or_the_checkpoint(tmp_path, how):
    points = crashes(tmp_path / "c", how, "first")
    loaded = [p["loaded"] for p in points]
    assert len(points) >= 12 and loaded == sorted(loaded, key=lambda step: step or 0) and set(loaded) == {None, 1}
    assert all(p["after"] == (["step-1", "step-2"] if p["loaded"] else ["step-1"]) for p in points)
