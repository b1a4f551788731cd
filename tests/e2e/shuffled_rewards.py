"""The cards components, their answers dealt out to other responses: as much reward, for nothing that was done.

Loaded by the reward server as any user's file.
"""

import importlib.util
import random
from pathlib import Path

import numpy as np

from reward_server.placing import place

_spec = importlib.util.spec_from_file_location(
    "cards_rewards", Path(__file__).parents[2] / "examples" / "cards" / "rewards.py"
)
cards = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cards)


def _shuffled(component: str, arguments: dict) -> list[list[float]]:
    answers = getattr(cards, component)(**arguments)
    offsets = arguments["offsets"]
    tokens = [place(a, np.asarray(o), component=component, uid="")[0] for a, o in zip(answers, offsets, strict=True)]
    order = list(range(len(tokens)))
    # Seeded by the responses: the same for the three components, another in each step.
    random.Random(str(arguments["completion_ids"])).shuffle(order)
    out = []
    for mine, other in enumerate(order):
        n = len(tokens[mine])
        row = np.zeros(n)
        row[: min(n, len(tokens[other]))] = tokens[other][:n]
        row[-1] += tokens[other][n:].sum()
        out.append(row.tolist())
    return out


def consistency(**arguments):
    return _shuffled("consistency", arguments)


def quality(**arguments):
    return _shuffled("quality", arguments)


def coverage(**arguments):
    return _shuffled("coverage", arguments)
