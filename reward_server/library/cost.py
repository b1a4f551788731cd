"""Efficiency: what tokens cost, and what comes too late. Each token's fine is its own, so that none looks ahead."""

import re

from reward_server.texts import Messages, text_of


def token_cost(completion_ids: list[list[int]], *, cost: float = 0.001, free: int = 0) -> list[list[float]]:
    """-`cost` on each token after the first `free`."""
    return [[-cost if t >= free else 0.0 for t in range(len(ids))] for ids in completion_ids]


def lateness(
    completions: list[str | Messages],
    offsets: list,
    *,
    done: str | None = None,
    deadline: int = 0,
    cost: float = 0.001,
) -> list[list[float]]:
    """A fine that grows by `cost` with each token after `deadline` tokens.

    With the pattern `done` the clock starts where it first matched: what follows an answer that was given. Before that
    nothing is late. The token that ends the match is not late.
    """
    answers = []
    for text, places in zip(map(text_of, completions), offsets, strict=True):
        begin = 0
        if done is not None:
            found = re.search(done, text)
            # The first token that begins at or after the end of the match.
            begin = next((t for t, (a, _) in enumerate(places) if found and a >= found.end()), len(places))
        answers.append([-cost * max(0, t - begin - deadline + 1) for t in range(len(places))])
    return answers
