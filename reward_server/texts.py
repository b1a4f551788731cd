"""Prompts and completions are texts or lists of messages; here they are texts, and words without a tokenizer."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

Messages = list[dict[str, Any]]


def text_of(given: str | Messages) -> str:
    """A prompt or completion as one text; of messages their contents, a line each."""
    return given if isinstance(given, str) else "\n".join(str(message["content"]) for message in given)


def numbered(responses: Sequence[Sequence[Any]], action_masks: Sequence[Sequence[bool]] | None) -> list[list[int]]:
    """For each token of each response its number among those that the policy wrote, from 1; 0 for all others.

    `responses`: one entry for each token, whatever it is. `action_masks`: None where the policy wrote all.
    """
    if action_masks is None:
        return [list(range(1, len(tokens) + 1)) for tokens in responses]
    answers = []
    for mask in action_masks:
        numbers = np.cumsum(np.asarray(mask, dtype=bool))
        answers.append(np.where(mask, numbers, 0).tolist())
    return answers


def words(text: str) -> tuple[list[int], np.ndarray]:
    """A stand-in for a tokenizer: words with the space before them and single other signs, then a stop token."""
    found = [m.span() for m in re.finditer(r"\s*\w+|\s*[^\w\s]|\s+$", text)]
    offsets = np.array([*found, (len(text), len(text))], dtype=np.int64)
    # The same piece has the same id, as of a tokenizer.
    ids = [int.from_bytes(text[a:b].encode()[-4:], "little") % 50_000 + 1 for a, b in found]
    return [*ids, 0], offsets
