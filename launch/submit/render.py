"""Templates of launch/templates: whatever a value holds, it stays a value where it is put."""

import shlex
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent.parent / "templates"
ODD_BREAKS = set("\x85\u2028\u2029")  # ends of lines to some readers of YAML


def template(name: str, **values: Any) -> str:
    """The text of a template. In it every value passes through a filter: `sh` makes a word of bash, `yaml` a scalar of
    YAML, `yaml_block` one that stays readable, `k8s` one in which Kubernetes expands nothing, `comment` the end of a
    line that is one; `within` indents what a macro gave."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # of HTML, which this is not
    )
    made.filters |= {
        "sh": shlex.quote,
        "yaml": scalar,
        "yaml_block": block,
        "k8s": lambda text: scalar(text.replace("$", "$$")),
        "comment": lambda line: " ".join(line.split()),
        "within": within,
    }
    return made.get_template(name).render(**values)


def scalar(text: str, style: str = '"') -> str:
    """`text` in one of YAML's styles. Not by json: YAML reads the two halves of a surrogate pair as two characters."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def represent_str(self, text: str) -> yaml.Node:
            return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, Dumper.represent_str)
    return yaml.dump(text, Dumper=Dumper, allow_unicode=True, width=2**31).removesuffix("\n")


def block(text: str) -> str:
    """`text` as a block of lines, where it can be one; else in quotes."""
    return scalar(text, "|" if text.strip() and not ODD_BREAKS & set(text) else '"')


def within(text: str, columns: int, first: bool = True) -> str:
    """Indent the lines, but for the `first`. Only at \\n: what else Python takes for the end of a line is in values."""
    lines = text.rstrip("\n").split("\n")
    padded = [" " * columns + line if line else line for line in lines]
    return "\n".join(padded if first else [lines[0], *padded[1:]])
