"""Strings that end a response, looked for in its text while it is written.

Tokens and strings do not begin and end together: a string may lie across tokens, in the middle of one, and its
characters may be split over several. So text is compared, by the rules of offsets.py, which follow the bytes.
"""

from typing import TYPE_CHECKING

import numpy as np

from rollout.offsets import OffsetMapper

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Says after each token whether it completes one of some strings in the text of the response.

    With byte-level BPE it looks at the last few tokens, as many as the longest string could need. In UTF-8 a whole
    character is found in the bytes just where it is in the text, so half characters around it do no harm. Of other
    tokenizers, where what a token adds depends on its neighbours, it decodes the response anew.
    """

    def __init__(self, strings: list[str], tokenizer: "PreTrainedTokenizerBase") -> None:
        self._mapper = OffsetMapper(tokenizer)
        self._strings, self._needles = list(strings), [s.encode() for s in strings]
        self._longest = max(map(len, self._needles))

    def completed_by_last(self, ids: np.ndarray, turn: int = 0) -> bool:
        """Whether the last of `ids` ([T] int64: all of a response so far) completes a string.

        A string that ended before it does not count, nor does one that begins before token `turn`: what an
        earlier turn ended with, or an environment wrote, ends nothing again.
        """
        own = ids[turn:]
        last = self._mapper.bytes_of(int(own[-1]))
        if last is None:
            before, text = (self._mapper.text(x.tolist()) for x in (own[:-1], own))
            return any(s in text and s not in before for s in self._strings)
        tail = last
        for token_id in own[-2::-1].tolist() if last else ():
            if len(tail) >= self._longest - 1 + len(last):
                break
            tail = self._mapper.bytes_of(token_id) + tail
        # It ends in the last token: not before, in the bytes that came with a whole token in front.
        return any(tail.find(x, max(0, len(tail) - len(last) - len(x) + 1)) >= 0 for x in self._needles if last)
