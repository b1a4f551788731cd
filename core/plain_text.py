"""Text of models, prompts and servers as a terminal may show it."""


def one_line(text: str) -> str:
    """One line without effect on a terminal: controls, escapes, newlines and direction marks become visible."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
