"""A report as one HTML file that needs nothing else: no network, no other file, no code but its own.

Words go through the template, which escapes them; numbers and texts of responses go in as JSON that the page's scripts
show as text (`textContent`), never as markup. The page's policy runs the scripts whose digests it names and no others,
and loads nothing: a response that smuggled markup past both would still be dead.
"""

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline
from markupsafe import Markup

from core.faults import StorageFault, UserError
from launch.report import gather
from launch.report.record import Report
from launch.report.words import figure

HERE = Path(__file__).parent
DEFAULT = "report.html"
OWN_SCRIPTS = ("page.js", "heat_map.js", "figures.js")


def write(folders: Sequence[Path], out: Path | None = None, *, over: bool | None = None) -> Path:
    """Write the report of a run, or of several beside each other; returns its path.

    Args:
        out: `report.html` in the folder of the run if None; several runs want it.
        over: see `gather`.
    Raises:
        UserError: a folder is no run, or of another version. StorageFault: the file could not be written.
    """
    if out is None:
        if len(folders) != 1:
            raise UserError("-o: a report of several runs wants the name of its file, e.g. -o compared.html")
        out = folders[0] / DEFAULT
    text = page(gather.gather(folders, over=over))
    fresh = out.with_name(f".{out.name}.new")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, out)
    except OSError as error:
        raise StorageFault(f"{out} could not be written ({error.strerror or error})") from None
    return out


def page(report: Report) -> str:
    """The HTML of a report."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = lambda value, name: figure(name, value)
    own = script("\n".join((HERE / name).read_text(encoding="utf-8") for name in OWN_SCRIPTS))
    plots = script(plotly.offline.get_plotlyjs())
    return environment.get_template("page.html").render(
        report=report,
        data=Markup(embedded(gather.as_json(report))),
        own=Markup(own),
        plots=Markup(plots),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        digests=[digest(own), digest(plots)],
    )


def embedded(data: Any) -> str:
    """JSON that can stand in a <script> element whatever text is in it: nothing in it ends the element or begins a
    comment. Half characters, which a tokenizer may leave, are escaped as all that is not ASCII is."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def script(text: str) -> str:
    """Code as it stands in its element. Raises ValueError where that would end early or be read otherwise."""
    text = text.replace("\r\n", "\n")
    for mark in ("</script", "<!--", "\r", "\0"):
        if mark in text.lower():
            raise ValueError(f"a script of the page has {mark!r} in it, which ends it or changes its digest")
    return text


def digest(text: str) -> str:
    """As a Content-Security-Policy names a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
