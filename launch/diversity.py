"""How much of what a policy says is said again: distinct-n and self-BLEU. A policy that reward has collapsed repeats
itself, and no mean reward shows it."""

from collections.abc import Sequence
from itertools import islice

MOST = 100  # responses whose self-BLEU is taken: the work grows with the square, a second and a half for these


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """The n-grams of one response, in order."""
    return list(zip(*(ids[i:] for i in range(n)), strict=False))


def distinct(responses: list[Sequence[int]], n: int, most: int | None = None) -> float | None:
    """Distinct n-grams by all n-grams of token ids (Li et al. 2016, arXiv 1510.03055), in [0, 1]; None without any.

    It falls with the amount of text: two policies are compared over as many n-grams, the first `most` of each.
    """
    said = list(islice((gram for ids in responses for gram in ngrams(ids, n)), most))
    return len(set(said)) / len(said) if said else None


def self_bleu(texts: list[str]) -> float | None:
    """Mean BLEU of each text against all others (Texygen, Zhu et al. 2018, arXiv 1802.01886), 0 to 100: 100 if all say
    the same. None for fewer than two. Of more than MOST texts so many, evenly spaced."""
    if len(texts) < 2:
        return None
    from sacrebleu.metrics import BLEU  # a fifth of a second, for this alone

    step = max(1.0, len(texts) / MOST)
    texts = [texts[int(i * step)] for i in range(min(len(texts), MOST))]
    # The effective order: an answer of fewer than four words has no 4-grams, and counted 0 however often it is said.
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)]
    return sum(scores) / len(scores)
