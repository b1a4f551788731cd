"""Of all tests: no deadline for an example of hypothesis, which measures the machine; failures are told at once.

A whole run takes an hour: who has to end it early has the names of what failed, and why. What is marked `long` is begun
only where it can end before LONG_UNTIL, if that is set (launch/test.sh does).
"""

import os
import time

import pytest
from hypothesis import settings

settings.register_profile("tokenppo", deadline=None)
settings.load_profile("tokenppo")


class Failures:
    """Writes one line for each failure as its report arrives, in the process that the terminal belongs to."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = str(crash.message if crash else report.longrepr).strip().replace("\n", " ")
            self._terminal.ensure_newline()
            told = f"FAILED {report.nodeid} {report.when} after {report.duration:.0f} s"
            self._terminal.write_line(f"{told}: {why[:400]}")


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("long") and "e2e" not in item.path.parts:
        raise pytest.UsageError(f"{item.nodeid} is marked long: launch/test.sh looks for those in tests/e2e alone")


@pytest.hookimpl(tryfirst=True)  # before fixtures are made
def pytest_runtest_setup(item: pytest.Item) -> None:
    mark, until = item.get_closest_marker("long"), os.environ.get("LONG_UNTIL")
    if mark and until and time.time() + mark.kwargs["seconds"] > float(until):
        pytest.skip(f"no time is left for the {mark.kwargs['seconds']} s of {item.nodeid}; alone: -m long")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Failures(terminal), "failures")
