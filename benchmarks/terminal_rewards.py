"""The rewards of the cards task without their places: what each earns over a response, all of it on the last token.

    tokenppo train --config configs/cards.yaml --rewards.consistency.fn benchmarks/terminal_rewards.py:consistency \
        --rewards.quality.fn benchmarks/terminal_rewards.py:quality

The sum over a response is that of the dense components, so the same text is the best one.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reward_server.components import load_component
from reward_server.placing import Span

DENSE = Path(__file__).parent.parent / "examples" / "cards" / "rewards.py"


def on_the_last_token(answer: Any) -> float | None:
    """The sum of one component's answer for one response: a float is put on the last token by whoever receives it."""
    if answer is None:
        return None
    if not isinstance(answer, list):
        return float(answer)
    return math.fsum(entry.score if isinstance(entry, Span) else entry for entry in answer)


def _terminal(name: str) -> Callable[..., list[float | None]]:
    dense = load_component(f"{DENSE}:{name}")

    def component(**batch: Any) -> list[float | None]:
        return [on_the_last_token(answer) for answer in dense(**batch)]

    return component


consistency = _terminal("consistency")
quality = _terminal("quality")
coverage = _terminal("coverage")
