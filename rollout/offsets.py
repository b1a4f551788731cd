"""Where each token of a response stands in its text, computed from the ids alone.

Text is never tokenised again: another cut into tokens may give the same text. Decoding one token at a time does not
work either, since a character may be split over tokens and half a character decodes to U+FFFD. So each id becomes the
bytes it adds to the text, by the rules of the tokenizer's own decoder, and characters are found in the joined bytes.
Whatever comes out is compared with `decode`: a tokenizer that cannot be followed is an error, never a wrong offset.

Legend: T response tokens.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from json import loads
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class OffsetMapper:
    """Maps the ids of one response to its text and to the place of each token in it.

    Byte-level BPE (GPT-2, Llama-3, Qwen), byte fallback (Llama-2, Gemma), Metaspace (T5) and WordPiece are followed on
    bytes, at one or two microseconds per token. Any other tokenizer is asked to decode every prefix, which takes T
    decodes and is accepted only where each prefix shows what its last token added.

    Example, "né!" by a tokenizer that knows "n", "!" and the single bytes, then <eos>:

        ids      [n, <0xC3>, <0xA9>, !, <eos>]
        text     "né!"
        offsets  [(0,1), (1,2), (1,2), (2,3), (3,3)]
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._rules = None
        self._chunks: dict[int, bytes | None] = {}  # id -> its bytes before the rules of context, None: never shown
        self._hidden: set[str] = set()
        if self._backend is not None:
            decoder = self._backend.decoder
            self._rules = _rules(None if decoder is None else loads(decoder.__getstate__()))
            added = self._backend.get_added_tokens_decoder().values()
            self._hidden = {token.content for token in added if token.special}

    def __call__(self, ids: Sequence[int] | np.ndarray) -> tuple[str, np.ndarray]:
        """The text of `ids` ([T] integers) and the place of each token in it ([T, 2] int64, start and end).

        The text is `decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)`. The clean-up that
        some old checkpoints switch on deletes spaces from the finished text, where it is not known whose they were.
        Places count code points of that text. Each token of a split character has the whole range of that character.
        Special tokens, ids without a token and tokens whose text the decoder strips are empty (start = end) where they
        stand; inside a split character that is its start, so starts never decrease. The ranges cover the whole text.
        Raises ValueError where this tokenizer's text cannot be traced to its tokens.
        """
        ids = np.asarray(ids, dtype=np.int64).tolist()
        text = self._decode(ids)
        if self._rules is not None:
            assembled, offsets = _place(self._contributions(ids))
            if assembled == text:
                return text, offsets
        return text, self._offsets_from_prefixes(ids, text)

    def text(self, ids: list[int]) -> str:
        """The text of `ids` alone."""
        return self._decode(ids)

    def bytes_of(self, token_id: int) -> bytes | None:
        """What a token adds to any text, b"" if it is never shown; None where that depends on the tokens around it."""
        if self._rules is None or self._rules[1]:
            return None
        return self._contributions([token_id])[0]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _contributions(self, ids: list[int]) -> list[bytes]:
        """The bytes that each token adds to the text; b"" for those that add none."""
        known = self._chunks
        for token_id in ids:
            if token_id not in known:
                known[token_id] = self._chunk(token_id)
        chunks = [known[token_id] for token_id in ids]
        in_context = self._rules[1]
        if not in_context:
            return [chunk or b"" for chunk in chunks]
        # The decoder never sees hidden tokens: "first token" means the first one that is shown.
        shown = [chunk for chunk in chunks if chunk is not None]
        for rule in in_context:
            shown = rule(shown)
        added = iter(shown)
        return [b"" if chunk is None else next(added) for chunk in chunks]

    def _chunk(self, token_id: int) -> bytes | None:
        token = self._backend.id_to_token(token_id)  # None in the padded tail of an embedding matrix
        if token is None or token in self._hidden:
            return None
        chunk = token.encode()
        for rule in self._rules[0]:
            chunk = rule(chunk)
        return chunk

    def _offsets_from_prefixes(self, ids: list[int], text: str) -> np.ndarray:
        """Offsets [T, 2] of any tokenizer: a token's range is what its prefix of `ids` adds to that before it.

        A prefix that ends within a character shows U+FFFD in its place: such tokens wait for the one that ends it, and
        an U+FFFD which stays ends a range only at the end of the text, since the next token may have a share in it.
        """
        hidden = {special for special in self._tokenizer.all_special_ids if self._decode([special]) == ""}
        last = max((t for t, token_id in enumerate(ids) if token_id not in hidden), default=-1)
        offsets = np.zeros((len(ids), 2), dtype=np.int64)
        done = 0
        waiting: list[int] = []
        for t, token_id in enumerate(ids):
            offsets[t] = done
            if token_id in hidden:
                continue
            waiting.append(t)
            prefix = self._decode(ids[: t + 1])
            settled = t == last or not prefix.endswith(REPLACEMENT)
            if settled and text.startswith(prefix) and len(prefix) > done:
                if len(waiting) > 1 and len(prefix) - done != 1:
                    raise self._untraceable(ids[t], t)
                offsets[waiting] = (done, len(prefix))
                done = len(prefix)
                waiting = []
            elif prefix[:done] != text[:done] or set(prefix[done:]) != {REPLACEMENT}:
                raise self._untraceable(ids[t], t)
        if waiting or done != len(text):
            raise self._untraceable(ids[-1], len(ids) - 1)
        return offsets

    def _untraceable(self, token_id: int, t: int) -> ValueError:
        return ValueError(
            f"{type(self._tokenizer).__name__} decodes id {token_id} (position {t} of the response) to text that "
            "cannot be traced to single tokens, so spans of characters have no tokens to go to; use a tokenizer with a "
            "`tokenizer.json` whose decoder is ByteLevel, Metaspace, WordPiece or Replace + ByteFallback + Fuse"
        )


def _place(chunks: list[bytes]) -> tuple[str, np.ndarray]:
    """The text of the joined chunks, and the code points [T, 2] int64 that each of the T chunks has a byte of."""
    text, character = _characters(b"".join(chunks))
    sizes = np.fromiter(map(len, chunks), dtype=np.int64, count=len(chunks))
    stops = np.cumsum(sizes)
    first = character[stops - sizes]
    last = character[stops - 1]  # nonsense for empty chunks, which do not use it
    return text, np.stack([first, np.where(sizes > 0, last + 1, first)], axis=1)


def _characters(data: bytes) -> tuple[str, np.ndarray]:
    """Text of `data`, invalid UTF-8 as U+FFFD, and [bytes + 1] int64: each byte's code point, then their number."""
    try:
        text = data.decode()
        starts = (np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80
    except UnicodeDecodeError:
        text, starts = _repaired(data)
    return text, np.append(np.cumsum(starts, dtype=np.int64) - 1, len(text))


def _repaired(data: bytes) -> tuple[str, np.ndarray]:
    """Text of invalid UTF-8 and [bytes] bool: here a code point starts, or one U+FFFD for a cut or wrong sequence."""
    starts = (np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80
    parts = []
    at = 0
    while at < len(data):
        try:
            parts.append(data[at:].decode())
            break
        except UnicodeDecodeError as error:
            parts += [data[at : at + error.start].decode(), REPLACEMENT]
            starts[at + error.start : at + error.end] = False
            starts[at + error.start] = True
            at += error.end
    return "".join(parts), starts


# The rules below follow the decoders of the `tokenizers` library (Rust), one function for each, on UTF-8 bytes.

_TokenRule = Callable[[bytes], bytes]  # what a token becomes wherever it stands
_ContextRule = Callable[[list[bytes]], list[bytes]]  # what the shown tokens become together; as many as before


def _rules(decoder: dict[str, Any] | None) -> tuple[list[_TokenRule], list[_ContextRule]] | None:
    """Rules for the decoder of a `tokenizer.json`; None where it has a step that is not known here."""
    by_token: list[_TokenRule] = []
    in_context: list[_ContextRule] = []
    if decoder is None:
        return by_token, [_with_spaces]
    unit = "token"  # what the next step sees as one string: a token, a run of byte tokens, or the whole text
    for step in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        match step:
            case {"type": "Fuse"}:
                unit = "text"
            case {"type": "Strip", "content": content, "start": start, "stop": 0} if unit == "text":
                in_context.append(partial(_strip, content=content.encode(), many=start))
            case _ if unit != "token":
                return None
            case {"type": "ByteLevel"} if not in_context:
                by_token.append(_byte_level)
                unit = "text"
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if not in_context:
                by_token.append(partial(_replace, old=old.encode(), new=new.encode()))
            case {"type": "ByteFallback"}:
                in_context.append(_byte_fallback)
                unit = "run"
            case {"type": "Metaspace", "replacement": mark, "prepend_scheme": prepend}:
                in_context.append(partial(_metaspace, mark=mark.encode(), drop_first=prepend != "never"))
            case {"type": "WordPiece", "prefix": prefix, "cleanup": cleanup}:
                in_context.append(partial(_word_piece, prefix=prefix.encode(), cleanup=cleanup))
            case _:
                return None
    return by_token, in_context


def _printable_bytes() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 means itself, all else is numbered from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _printable_bytes()


def _byte_level(chunk: bytes) -> bytes:
    # An added token with one character outside the alphabet is literal text; one within it is read as bytes, like "é".
    try:
        return bytes(_BYTE_OF[character] for character in chunk.decode())
    except KeyError:
        return chunk


def _replace(chunk: bytes, old: bytes, new: bytes) -> bytes:
    return chunk.replace(old, new)


_BYTE_TOKEN = re.compile(rb"<0x([0-9a-fA-F]{2})>")


def _byte_fallback(chunks: list[bytes]) -> list[bytes]:
    """Runs of tokens like <0xE2> become bytes; in a run that is no valid UTF-8 every token is a U+FFFD of its own."""
    result = list(chunks)
    at = 0
    while at < len(chunks):
        stop = at
        while stop < len(chunks) and (found := _BYTE_TOKEN.fullmatch(chunks[stop])):
            result[stop] = bytes([int(found[1], 16)])
            stop += 1
        try:
            b"".join(result[at:stop]).decode()
        except UnicodeDecodeError:
            result[at:stop] = [REPLACEMENT.encode()] * (stop - at)
        at = stop + 1
    return result


def _strip(chunks: list[bytes], content: bytes, many: int) -> list[bytes]:
    """At most `many` times `content` off the left end of the text, across tokens."""
    result = list(chunks)
    for i, chunk in enumerate(result):
        while many and chunk.startswith(content):
            chunk = chunk.removeprefix(content)
            many -= 1
        result[i] = chunk
        if chunk:
            break
    return result


def _metaspace(chunks: list[bytes], mark: bytes, drop_first: bool) -> list[bytes]:
    """The mark is a space, and nothing at all in the first token if the tokenizer put one before the text."""
    return [chunk.replace(mark, b"" if drop_first and i == 0 else b" ") for i, chunk in enumerate(chunks)]


_TIGHT = (
    (b" .", b"."),
    (b" ?", b"?"),
    (b" !", b"!"),
    (b" ,", b","),
    (b" ' ", b"'"),
    (b" n't", b"n't"),
    (b" 'm", b"'m"),
    (b" do not", b" don't"),
    (b" 's", b"'s"),
    (b" 've", b"'ve"),
    (b" 're", b"'re"),
)


def _word_piece(chunks: list[bytes], prefix: bytes, cleanup: bool) -> list[bytes]:
    """Every token but the first brings its own space, unless it continues a word or is punctuation."""
    result = []
    for i, chunk in enumerate(chunks):
        if i > 0:
            chunk = chunk.removeprefix(prefix) if chunk.startswith(prefix) else b" " + chunk
        for loose, tight in _TIGHT if cleanup else ():
            chunk = chunk.replace(loose, tight)
        result.append(chunk)
    return result


def _with_spaces(chunks: list[bytes]) -> list[bytes]:
    """No decoder at all: tokens with a space between."""
    return [chunk if i == 0 else b" " + chunk for i, chunk in enumerate(chunks)]
