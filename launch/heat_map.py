"""The reward of each token as a colour behind it, for a terminal."""

import numpy as np
from rich.text import Text

from trainer.panel import one_line


def heat_map(text: str, offsets: np.ndarray, rewards: np.ndarray, largest: float) -> Text:
    """`text` with each token on green for a reward, on red for a fine; `largest` is the full colour.

    A token without characters of its own, such as the stop token, shows as its number where it has one; tokens that
    share a character have one colour, that of their sum.
    """
    pieces: list[tuple[str, float]] = []
    at = 0
    for (start, end), reward in zip(offsets.tolist(), rewards.tolist(), strict=True):
        if at < end and at < len(text):
            pieces.append((one_line(text[max(at, start) : end]), reward))
            at = end
        elif start < end and pieces:  # more of a character that is shown already
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + reward)
        elif reward:
            pieces.append((f"[{reward:+.3g}]", reward))
    return Text.assemble(*((piece, _style(reward, largest)) for piece, reward in pieces))


def _style(reward: float, largest: float) -> str:
    share = min(1.0, abs(reward) / largest) if largest else 0.0
    if share == 0:
        return ""
    full = round(60 + 150 * share)
    ground = f"rgb(0,{full},0)" if reward > 0 else f"rgb({full},0,0)"
    return f"{'black' if share > 0.5 else 'white'} on {ground}"
