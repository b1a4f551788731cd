"""A real browser for the tests of the report and for its picture: Debian's Chromium, without a window."""

import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ABSENT = "wants Chromium and the package playwright: bash launch/chromium.sh installs the one, the extra dev the other"


def chromium() -> str | None:
    """Its path; None where there is none, or nothing to drive it with."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return None
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def started() -> Iterator[Any]:
    """The browser. One at a time in a process: playwright's calls that wait have one loop."""
    from playwright.sync_api import sync_playwright

    # Chromium refuses to run as root with its sandbox.
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver, closing(_launch(driver, args)) as chrome:
        yield chrome


def _launch(driver: Any, args: list[str]) -> Any:
    return driver.chromium.launch(executable_path=chromium(), args=args, timeout=120_000)


@contextmanager
def opened(chrome: Any, file: Path, **options: Any) -> Iterator[Any]:
    """The file in a page of its own, from disk, whose `said` is every error of the console, every request but the file
    itself, and every dialog. `options`: of playwright's `new_context`."""
    with closing(chrome.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))) as context:
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.said = []
        page.on("console", lambda m: page.said.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("dialog", lambda dialog: (page.said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda r: page.said.append(r.url) if r.url not in (file.as_uri(), "data:,") else None)
        page.goto(file.as_uri(), wait_until="load", timeout=120_000)
        yield page
