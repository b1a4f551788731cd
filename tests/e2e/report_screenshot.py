"""The picture of a report in the README: its verdict, the first curves, responses with a token pointed at.

python tests/e2e/report_screenshot.py runs/pictured docs/img/report.png
"""

import argparse
import sys
from pathlib import Path

import browser
from launch.report import render

# The page is long: what is below the picture's edge is left out, and of curves and responses the first ones are shown.
SHOWN = """
#components, #gaming, #time, #faults, #settings, footer, #curves details, #curves .chart:nth-child(n+4),
.sample:nth-child(n+6) { display: none }
"""
ALL_DRAWN = """[...document.querySelectorAll('.chart')].filter(c => c.offsetParent)
    .every(c => c.querySelector('.main-svg'))"""


def take(run: Path, out: Path, scheme: str = "light") -> None:
    """Report of `run` as a PNG."""
    report = render.write([run]).absolute()  # a browser takes no other
    with (
        browser.started() as chrome,
        browser.opened(chrome, report, color_scheme=scheme, device_scale_factor=1.5) as page,
    ):
        page.add_style_tag(content=SHOWN)
        height = page.evaluate("document.documentElement.scrollHeight")
        page.set_viewport_size({"width": 1280, "height": height})  # no bar that stays while one scrolls
        page.wait_for_function(ALL_DRAWN)
        page.locator(".legend input").check()
        tokens = page.locator(".tokens .t")
        wrong = page.locator(".tokens .t.minus")
        (wrong if wrong.count() else tokens).first.hover()
        page.screenshot(path=out, full_page=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    args = parser.parse_args()
    if browser.chromium() is None:
        print(f"the picture {browser.ABSENT}", file=sys.stderr)
        return 2
    take(args.run, args.out, args.scheme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
