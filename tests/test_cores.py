"""How many cores a run plans its threads for: those of its container, not of the host around it."""

import os
from pathlib import Path

import pytest

from launch.cluster import cores

HERE = len(os.sched_getaffinity(0))


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, HERE),
        ({"cpu.max": "max 100000\n"}, HERE),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),  # half a core is one thread
        ({"cpu.max": "150000 100000\n"}, min(HERE, 2)),
        ({"cpu.max": "99900000 100000\n"}, HERE),  # more than there are
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, HERE),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_a_quota_counts(tmp_path, files, expected):
    assert cores(written(tmp_path, files)) == expected
