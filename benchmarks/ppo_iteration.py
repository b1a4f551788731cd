"""What one PPO iteration costs: seconds by phase, samples per second, memory of all processes together.

    python benchmarks/ppo_iteration.py                                    # the cards task, about a minute
    python benchmarks/ppo_iteration.py --config my.yaml --steps 30
    python benchmarks/ppo_iteration.py --out runs/iteration               # keep the run folder

The run is a real one, by the command. Seconds are the `time/<phase>` of its metrics.jsonl: medians over the steps, the
first two left out. An evaluation is no part of an iteration and is left out too.

Memory is the proportional set size (PSS: shared pages count once, divided among those who share them) of the command
and all its descendants, read twice a second by a thread of this script. Reading walks the page tables of every
process: about CPU_SHARE of one core goes to it, and that slows the run that is measured; `--no-memory` does without.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from train_command import CARDS, Finished, circumstances, table, train

WARM_UP_STEPS = 2
WORK = ("rollout", "annotate", "update")  # what PPO cannot do without; all else is overhead
PHASES = ("rollout", "reward", "annotate", "update", "sync", "log", "other")
OVERHEAD_LIMIT = 0.15
SAMPLE_EVERY_S = 0.5


class PeakMemory:
    """The largest PSS, in bytes, of a process and its descendants, sampled by a thread until `stop`."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.peak_by_name: dict[str, int] = {}
        self.samples = 0
        self.cpu_s = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, pid: int) -> None:
        self._thread = threading.Thread(target=self._sample, args=(pid,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Waits for the thread, which looks at the event after each sample."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _sample(self, pid: int) -> None:
        while not self._ended.wait(SAMPLE_EVERY_S):
            by_name: dict[str, int] = {}
            try:
                root = psutil.Process(pid)
                family = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in family:
                try:
                    name, size = process.name(), process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended just now
                    continue
                by_name[name] = by_name.get(name, 0) + size
            total = sum(by_name.values())
            if total > self.peak_bytes:
                self.peak_bytes, self.peak_by_name = total, by_name
            self.samples += 1
            self.cpu_s = time.thread_time()
