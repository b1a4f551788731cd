"""Rewards of the calculator task: a point for a right answer, half a one for a right call.

What the calculator wrote is in the completion too. A span on it would be an error: it is not the policy's.
"""

import re

from tokenppo import Span

CALL = re.compile(r" calc (\d+) \+ (\d+)")
ANSWER = re.compile(r" answer (\d+)$")


def call(completions: list[str], a: list[int], b: list[int], **_) -> list[list[Span]]:
    """+0.5 on the numbers of the first call if they are those of the question, else -0.5 on them. No call, no score."""
    answers = []
    for text, want in zip(completions, zip(a, b, strict=True), strict=True):
        found = CALL.search(text)
        right = found is not None and (int(found[1]), int(found[2])) == want
        answers.append([Span(found.start(1), found.end(2), 0.5 if right else -0.5)] if found else [])
    return answers


def answer(completions: list[str], a: list[int], b: list[int], **_) -> list[list[Span] | float]:
    """+1 on the answer if it is right, -1 on it if it is wrong, -1 on the last token if there is none."""
    answers: list[list[Span] | float] = []
    for text, x, y in zip(completions, a, b, strict=True):
        found = ANSWER.search(text)
        right = found is not None and int(found[1]) == x + y
        answers.append([Span(found.start(1), found.end(1), 1.0 if right else -1.0)] if found else -1.0)
    return answers


def accuracy(completions: list[str], a: list[int], b: list[int], **_) -> list[float]:
    """Whether the answer is right: a metric, by weight 0."""
    found = [ANSWER.search(text) for text in completions]
    return [float(m is not None and int(m[1]) == x + y) for m, x, y in zip(found, a, b, strict=True)]
