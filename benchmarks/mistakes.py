"""Seconds until a mistake is named, for each row of the table in tests/e2e/test_mistakes.py, as the command.

    python benchmarks/mistakes.py [--rows N]

Limit: 3 s, with --dry-run and without. One process at a time; nothing else should run.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / place) for place in ("tests/e2e", "tests", "")]

import test_mistakes  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()  # of the small models that are written

LIMIT_S = 3


def seconds(name: str, *more: str) -> float:
    """One mistake in a folder of its own. Asserts the exit code, so that no other fault is timed."""
    with tempfile.TemporaryDirectory() as place:
        task = Path(place)
        test_mistakes.make_task(task)
        argv, _ = test_mistakes.prepared(task, name)
        (task / "home").mkdir()
        started = time.perf_counter()
        done = test_mistakes.command(task, *argv, *more)
        spent = time.perf_counter() - started
    assert done.returncode == 2, f"{name}: {done.returncode} {done.stderr}"
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="only the first rows of the table")
    names = list(test_mistakes.MISTAKES)[: parser.parse_args().rows]
    for title, more in (("with --dry-run", ["--dry-run"]), ("without", [])):
        spent = {name: seconds(name, *more) for name in names}
        worst = max(spent, key=spent.get)
        over = [f"{name} {spent[name]:.2f}" for name in names if spent[name] > LIMIT_S]
        print(
            f"{title}: {len(names)} mistakes, median {statistics.median(spent.values()):.2f} s, worst"
            f" {spent[worst]:.2f} s ({worst}); over {LIMIT_S} s: {', '.join(over) or 'none'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
