"""A response as the pieces of its tokens, and the reward of each as a colour behind it, for a terminal."""

from collections.abc import Sequence

import numpy as np
from rich.text import Text

from trainer.panel import one_line


def pieces(text: str, offsets: Sequence[Sequence[int]]) -> list[tuple[str, bool]]:
    """Of each of the T tokens: the characters that it is the first to have, and whether it has some of another's.

    Joined they are `text`, each character once, less what belongs to no token. A token without characters of its own,
    such as the stop token, is ("", False), a later one of those that share a character ("", True).

    Args:
        offsets: [T, 2] code points of `text`, as core/trajectory.py has them.
    """
    out, at = [], 0
    for start, end in offsets:
        shares = start < min(at, end)
        out.append((text[max(at, start) : end], shares))
        at = max(at, end)
    return out


def heat_map(text: str, offsets: np.ndarray, rewards: np.ndarray, largest: float) -> Text:
    """`text` with each token on green for a reward, on red for a fine; `largest` is the full colour.

    A token without characters of its own, such as the stop token, shows as its number where it has one; tokens that
    share a character have one colour, that of their sum. What lies behind the end of `text` is not shown.
    """
    shown: list[tuple[str, float]] = []
    spans = offsets.tolist()
    for (piece, shares), (start, end), reward in zip(pieces(text, spans), spans, rewards.tolist(), strict=True):
        if piece:
            shown.append((one_line(piece), reward))
        elif shares and shown:
            shown[-1] = (shown[-1][0], shown[-1][1] + reward)
        elif reward and start == end:
            shown.append((f"[{reward:+.3g}]", reward))
    return Text.assemble(*((piece, _style(reward, largest)) for piece, reward in shown))


def _style(reward: float, largest: float) -> str:
    share = min(1.0, abs(reward) / largest) if largest else 0.0
    if share == 0:
        return ""
    full = round(60 + 150 * share)
    ground = f"rgb(0,{full},0)" if reward > 0 else f"rgb({full},0,0)"
    return f"{'black' if share > 0.5 else 'white'} on {ground}"
