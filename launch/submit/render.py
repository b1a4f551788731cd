"""Templates of launch/templates: whatever a value holds, it stays a value where it is put."""

import json
import shlex
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent.parent / "templates"


def template(name: str, **values: Any) -> str:
    """The text of a template. In it every value passes through a filter: `sh` makes a word of bash, `yaml` a scalar of
    YAML, `comment` the end of a line that is one."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # of HTML, which this is not
    )
    made.filters |= {"sh": shlex.quote, "yaml": json.dumps, "comment": lambda line: " ".join(line.split())}
    return made.get_template(name).render(**values)
