"""Consistency of a text with what it should be about: the facts of its prompt, a source, its own context."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from reward_server.components import ScoreRequest
from reward_server.placing import Span
from reward_server.texts import Messages, text_of

Texts = list[str | Messages]


def facts(
    completions: Texts, facts: list[Any], *, reward: float = 1.0, fine: float = 1.0
) -> list[list[Span] | float | None]:
    """`reward` where each fact of the row is first stated, -`fine` on the last character for each that is not.

    The column `facts` holds a list for each row; a fact is a text, or a list of texts that all say it. None: does not
    apply. Letters' case does not count, words are whole.
    """
    answers: list[list[Span] | float | None] = []
    for text, wanted in zip(map(text_of, completions), facts, strict=True):
        if wanted is None:
            answers.append(None)
            continue
        spans, missing = [], 0
        for fact in wanted:
            ways = [fact] if isinstance(fact, str) else list(fact)
            found = [m for m in (_word(way).search(text) for way in ways) if m]
            if found:
                first = min(found, key=lambda m: m.start())
                spans.append(Span(first.start(), first.end(), reward))
            else:
                missing += 1
        if missing and text:
            spans.append(Span(len(text) - 1, len(text), -fine * missing))
        answers.append(spans if text else -fine * missing)
    return answers


def overlap(completions: Texts, source: list[str | None], *, n: int = 2, measure: str = "f1") -> list[Any]:
    """ROUGE-n against the column `source` (Lin 2004): `recall`, `precision` or `f1`, shared by the n-grams that match.

    Each match puts its share on the last word of the n-gram; an n-gram counts as often as the source has it. The sum
    over the text is the measure. None where the row has no source.
    """
    if measure not in ("recall", "precision", "f1"):
        raise ValueError(f"measure = {measure!r}: recall, precision or f1")
    if n < 1:
        raise ValueError(f"n = {n}: wants at least 1")
    answers: list[Any] = []
    for text, reference in zip(map(text_of, completions), source, strict=True):
        if reference is None:
            answers.append(None)
            continue
        words = list(re.finditer(r"\w+", text))
        theirs = [word.lower() for word in re.findall(r"\w+", reference)]
        left = Counter(tuple(theirs[i : i + n]) for i in range(len(theirs) - n + 1))
        n_theirs, n_ours, matches = left.total(), max(0, len(words) - n + 1), []
        for i in range(n_ours):
            gram = tuple(word[0].lower() for word in words[i : i + n])
            if left[gram] > 0:
                left[gram] -= 1
                matches.append(words[i + n - 1])
        if not matches:
            answers.append([])
            continue
        recall, precision = len(matches) / n_theirs, len(matches) / n_ours
        score = {"recall": recall, "precision": precision, "f1": 2 * recall * precision / (recall + precision)}[measure]
        answers.append([Span(m.start(), m.end(), score / len(matches)) for m in matches])
    return answers


def contradiction(
    completions: Texts, source: list[str | None], *, pairs: Sequence[Sequence[str]], fine: float = 1.0
) -> list[Any]:
    """-`fine` wherever the text says one of a pair of opposites while the column `source` says only the other.

    `pairs`: [["increased", "decreased"], ["is", "is not"]]; either side may be in the source. None without a source.
    """
    sides = [(a, b) for pair in pairs for a, b in (tuple(pair), tuple(pair)[::-1])]
    answers: list[Any] = []
    for text, reference in zip(map(text_of, completions), source, strict=True):
        if reference is None:
            answers.append(None)
            continue
        spans = []
        for said, opposite in sides:
            if not _stated(said, opposite, reference) or _stated(opposite, said, reference):
                continue
            spans += [Span(m.start(), m.end(), -fine) for m in _says(opposite, said, text)]
        answers.append(spans)
    return answers


def _word(phrase: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)", re.IGNORECASE)


def _says(phrase: str, other: str, text: str) -> list[re.Match[str]]:
    """Matches of `phrase` that are no part of a match of `other`: "is" in "is not" does not say it."""
    inside = [m.span() for m in _word(other).finditer(text)] if phrase.lower() in other.lower() else []
    return [m for m in _word(phrase).finditer(text) if not any(a <= m.start() and m.end() <= b for a, b in inside)]


def _stated(phrase: str, other: str, text: str) -> bool:
    return bool(_says(phrase, other, text))


class Similarity:
    """Cosine similarity of each sentence to its context, on the sentence: its tokens share it.

    The embedding is the mean of the model's last hidden states over the tokens (Reimers & Gurevych 2019). Context is
    the column `source` (option `context_column`), or the prompt where there is no such column.
    """

    def __init__(self, model: str, context_column: str = "source", batch_size: int = 32) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: wants at least 1")
        self._path, self._context_column, self._batch_size = model, context_column, batch_size

    def setup(self, device: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._device = device
        self._tokenizer = AutoTokenizer.from_pretrained(self._path)
        self._model = AutoModel.from_pretrained(self._path).to(device).eval()
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def score(self, batch: ScoreRequest) -> list[list[Span] | None]:
        contexts = batch.columns.get(self._context_column) or [text_of(prompt) for prompt in batch.prompts]
        texts = [text_of(completion) for completion in batch.completions]
        cuts = [sentences(text) for text in texts]
        pieces = [text[a:b] for text, cut in zip(texts, cuts, strict=True) for a, b in cut]
        vectors = iter(self._embed(pieces))
        around = self._embed([context or "" for context in contexts])
        answers: list[list[Span] | None] = []
        for context, cut, centre in zip(contexts, cuts, around, strict=True):
            spans = [Span(a, b, float(next(vectors) @ centre)) for a, b in cut]
            answers.append(spans if context else None)
        return answers

    def _embed(self, texts: list[str]) -> list[Any]:
        """A unit vector for each text, [D] float64; one at a time where nothing else makes its bits independent."""
        import torch

        vectors = []
        for i in range(0, len(texts), self._batch_size):
            encoded = self._tokenizer(
                texts[i : i + self._batch_size], return_tensors="pt", padding=True, truncation=True
            ).to(self._device)
            encoded.pop("token_type_ids", None)
            with torch.inference_mode():
                hidden = self._model(**encoded).last_hidden_state.double()
            mask = encoded["attention_mask"].unsqueeze(-1).double()
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            vectors += list(torch.nn.functional.normalize(mean, dim=-1).cpu())
        return vectors


def sentences(text: str) -> list[tuple[int, int]]:
    """Start and end of each sentence: up to and with its full stop, question or exclamation mark, or a line's end."""
    return [m.span() for m in re.finditer(r"\S[^.!?\n]*[.!?\n]*", text)]
