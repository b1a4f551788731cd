"""What a gallery hands to trackers, of a step that never was."""

import numpy as np

from trainer.gallery import Exhibit, Shown, histograms_of

EVIL = "<script>alert('é')</script> & co"


def shown(text: str = EVIL, total: float = 1.5) -> Shown:
    """Four tokens: two of them share the é, the third is an environment's, the last has no characters."""
    at = text.index("é") if "é" in text else 1
    offsets = np.array([[0, at + 1], [at, at + 1], [at + 1, len(text)], [len(text), len(text)]])
    rewards = np.array([1.0, -0.25, 0.0, total - 0.75])
    return Shown(
        ordinal=7,
        k=1,
        prompt="say <b>it</b>",
        text=text,
        offsets=offsets,
        written=np.array([True, True, False, True]),
        finish_reason="stop",
        weighted={"quality": rewards},
        token_rewards=rewards,
        numbers={"advantage": np.array([0.5, -0.5, 0.0, 0.25])},
    )


def exhibit(step: int) -> Exhibit:
    values = {"histogram/ratio": np.array([1.0, 1.0, 3.0, 5.0]), "histogram/advantages": np.array([2.0])}
    samples = [shown(), shown(f"step {step}", total=2.5)]
    return Exhibit(step=step, histograms=histograms_of(values, lambda mine: [mine], bins=4), samples=samples)
