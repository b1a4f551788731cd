"""Prompts and completions are texts or lists of messages; here they are texts."""

from typing import Any

Messages = list[dict[str, Any]]


def text_of(given: str | Messages) -> str:
    """A prompt or completion as one text; of messages their contents, a line each."""
    return given if isinstance(given, str) else "\n".join(str(message["content"]) for message in given)
