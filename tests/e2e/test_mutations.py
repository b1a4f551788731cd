"""The tests notice the bugs they are there for: tests/mutations.py puts each back and has them run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mutations

ROOT = Path(__file__).parents[2]


def test_every_mutation_still_fits_the_code():
    every = mutations.MUTATIONS + mutations.OF_THE_LEARNER
    assert not mutations.stale(every)
    assert len({m.name for m in every}) == len(every) and all(m.old != m.new for m in every)


@pytest.mark.slow
@pytest.mark.long(seconds=400)
@pytest.mark.timeout(1800)
def test_every_mutation_is_caught():
    done = subprocess.run(
        [sys.executable, "tests/mutations.py"], cwd=ROOT, capture_output=True, text=True, timeout=1700, check=False
    )
    last = done.stdout.strip().splitlines()[-1]
    found = re.fullmatch(r"(\d+) of (\d+) caught", last)
    assert found and found[1] == found[2] and int(found[1]) >= 98, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.returncode == 0
