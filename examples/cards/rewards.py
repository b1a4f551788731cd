"""Rewards of the cards task: does the text state each fact of its card, once, rightly, in clean sentences?

Components like any user's: a function takes the batch by keyword (keep what you need, swallow the rest with `**_`) and
answers one entry per completion, here a list of `Span`s (characters of the completion and a score) or one float, which
goes to the last token. In a config:

    rewards:
      consistency: {fn: examples/cards/rewards.py:consistency, weight: 1.0}
      slot_error:  {fn: examples/cards/rewards.py:slot_error, weight: 0.0}    # weight 0: a metric, not a reward

A clean text earns one point for each fact and nothing else can earn a point, so it is the optimum. Legal words earn
nothing by themselves: a bonus per word is paid length, and the policy learns to ramble.
"""

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tokenppo import Span

LANGUAGE = json.loads(Path(__file__).with_name("language.json").read_text(encoding="utf-8"))
ATTRIBUTES: dict[str, dict[str, list[str]]] = LANGUAGE["attributes"]  # name -> how one "says" it, its "values"
FAULT_SCORES = {"illegal": -0.3, "stutter": -0.3, "unfinished": -0.3, "restated": -0.3, "filler": -0.5, "rude": -0.5}
MISSING_SCORE = -1.0
CUT_SCORE = -3.0


class Statement(NamedTuple):
    """`attribute` is `value`, said by the word at characters [start, end) of the completion."""

    attribute: str
    value: str
    start: int
    end: int


class Fault(NamedTuple):
    """A word at characters [start, end) that does not belong; `kind` is a key of FAULT_SCORES."""

    kind: str
    start: int
    end: int


# The sentences a word can open: first word -> [(attribute, words of the sentence, "{}" where the value goes)].
OPENINGS: dict[str, list[tuple[str, list[str]]]] = {}
for _attribute, _entry in ATTRIBUTES.items():
    for _sentence in _entry["says"]:
        OPENINGS.setdefault(_sentence.split()[0], []).append((_attribute, _sentence.split()))


@lru_cache(maxsize=4096)  # every component reads the same completions
def parse(text: str) -> tuple[tuple[Statement, ...], tuple[Fault, ...]]:
    """Read `text` word by word as sentences of the language: what it states, and which words do not belong.

    A word that does not continue its sentence is a fault, and one fault must not spoil what follows: if it can open
    a sentence it does so, a full stop ends the sentence, and any other word is skipped.
    """
    statements: list[Statement] = []
    faults: list[Fault] = []
    sentences: list[tuple[str, list[str]]] = []  # those the words since the last full stop agree with; none: at a start
    position = 0  # of the next word in them
    previous = ""
    for match in re.finditer(r"\S+", text):
        word, (start, end) = match.group(), match.span()
        if not sentences:
            matching, position = OPENINGS.get(word, []), 0
        else:
            matching = [s for s in sentences if _continues(word, s, position)]
        if matching:
            if matching[0][1][position] == "{}":
                statements.append(Statement(matching[0][0], word, start, end))
            position += 1
            sentences = [] if word == "." else matching
        else:
            kind = _fault(word, previous)
            faults.append(Fault(kind, start, end))
            if word == ".":
                sentences = []
            elif word in OPENINGS and kind != "stutter":
                sentences, position = OPENINGS[word], 1
        previous = word
    if sentences:
        faults.append(Fault("unfinished", start, end))
    return tuple(statements), tuple(faults)


def _fault(word: str, previous: str) -> str:
    if word in LANGUAGE["fillers"]:
        return "filler"
    if word in LANGUAGE["rude"]:
        return "rude"
    return "stutter" if word == previous else "illegal"


def _continues(word: str, sentence: tuple[str, list[str]], position: int) -> bool:
    attribute, words = sentence
    return word == words[position] or (words[position] == "{}" and word in ATTRIBUTES[attribute]["values"])


def consistency(completions: list[str], facts: list[list[str]], **_: object) -> list[list[Span]]:
    """+1 on the value that states a fact rightly the first time, -1 on each value that is not on the card.

    A repeated right statement earns nothing, nor does the right value after a wrong one: the text contradicts itself.
    """
    answers = []
    for text, card in zip(completions, facts, strict=True):
        true = dict(fact.split() for fact in card)
        spans, stated = [], set()
        for said in parse(text)[0]:
            if said.value != true.get(said.attribute):
                spans.append(Span(said.start, said.end, -1.0))
            elif said.attribute not in stated:
                spans.append(Span(said.start, said.end, 1.0))
            stated.add(said.attribute)
        answers.append(spans)
    return answers


def quality(completions: list[str], **_: object) -> list[list[Span]]:
    """Minus for each word that does not belong, and for the value of a fact that was stated before, right or wrong."""
    answers = []
    for text in completions:
        statements, faults = parse(text)
        spans, stated = [Span(f.start, f.end, FAULT_SCORES[f.kind]) for f in faults], set()
        for said in statements:
            if said.attribute in stated:
                spans.append(Span(said.start, said.end, FAULT_SCORES["restated"]))
            stated.add(said.attribute)
        answers.append(spans)
    return answers


def coverage(completions: list[str], facts: list[list[str]], finish_reasons: list[str], **_: object) -> list[float]:
    """-1 for each fact that no sentence speaks of, on the last token, and a further -3 if the answer was cut.

    The limit on the length belongs to the task: without its fine the policy learns never to stop.
    """
    answers = []
    for text, card, reason in zip(completions, facts, finish_reasons, strict=True):
        missing = {fact.split()[0] for fact in card} - {said.attribute for said in parse(text)[0]}
        answers.append(len(missing) * MISSING_SCORE + (CUT_SCORE if reason == "length" else 0.0))
    return answers


def slot_error(completions: list[str], facts: list[list[str]], **_: object) -> list[float]:
    """Share of the card's facts, in [0, 1], never stated or stated, even once, with a value that is not the card's."""
    answers = []
    for text, card in zip(completions, facts, strict=True):
        said: dict[str, set[str]] = {}
        for statement in parse(text)[0]:
            said.setdefault(statement.attribute, set()).add(statement.value)
        true = dict(fact.split() for fact in card)
        answers.append(sum(said.get(attribute) != {value} for attribute, value in true.items()) / len(true))
    return answers
