"""Efficiency: what tokens cost, and what comes too late. Each token's fine is its own, so that none looks ahead."""

import re

from reward_server.texts import Messages, numbered, text_of


def token_cost(
    completion_ids: list[list[int]],
    action_masks: list[list[bool]] | None = None,
    *,
    cost: float = 0.001,
    free: int = 0,
) -> list[list[float]]:
    """-`cost` on each token of the policy after its first `free`."""
    return [[-cost if n > free else 0.0 for n in numbers] for numbers in numbered(completion_ids, action_masks)]


def lateness(
    completions: list[str | Messages],
    offsets: list,
    action_masks: list[list[bool]] | None = None,
    *,
    done: str | None = None,
    deadline: int = 0,
    cost: float = 0.001,
) -> list[list[float]]:
    """A fine that grows by `cost` with each token of the policy after `deadline` of them.

    With the pattern `done` the clock starts where it first matched: what follows an answer that was given. Before that
    nothing is late. The token that ends the match is not late.
    """
    answers = []
    for text, places, numbers in zip(map(text_of, completions), offsets, numbered(offsets, action_masks), strict=True):
        begin = 0
        if done is not None:
            found = re.search(done, text)
            # The first token that begins at or after the end of the match.
            begin = next((t for t, (a, _) in enumerate(places) if found and a >= found.end()), len(places))
        before = max(numbers[:begin], default=0)
        answers.append([-cost * max(0, n - before - deadline) if t >= begin else 0.0 for t, n in enumerate(numbers)])
    return answers
