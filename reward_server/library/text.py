"""Quality of a text by rules: each fine is on the characters that earn it.

Nothing is paid for what is merely correct: a bonus that every token gets is a payment for length.
"""

import ast
import codeop
import re
import warnings
from collections.abc import Iterator, Sequence

from reward_server.placing import Span
from reward_server.texts import Messages, numbered, text_of

Texts = list[str | Messages]


def repetition(completions: Texts, *, n: int = 4, fine: float = 1.0) -> list[list[Span]]:
    """-`fine` on the last word of every n-gram of words that the text had before (Welleck et al. 2019, seq-rep-n)."""
    if n < 1:
        raise ValueError(f"n = {n}: wants at least 1")
    answers = []
    for text in map(text_of, completions):
        words, seen, spans = list(re.finditer(r"\w+", text)), set(), []
        for i in range(n - 1, len(words)):
            gram = tuple(word[0].lower() for word in words[i - n + 1 : i + 1])
            if gram in seen:
                spans.append(Span(words[i].start(), words[i].end(), -fine))
            seen.add(gram)
        answers.append(spans)
    return answers


def length(
    completion_ids: list[list[int]],
    action_masks: list[list[bool]] | None = None,
    *,
    least: int = 0,
    most: int | None = None,
    fine: float = 0.01,
) -> list[list[float]]:
    """-`fine` on each token beyond `most`; on the last token -`fine` for each that is missing to `least`. What an
    environment wrote is not counted."""
    if most is not None and most < least:
        raise ValueError(f"most = {most}: is less than least = {least}")
    answers = []
    for numbers in numbered(completion_ids, action_masks):
        rewards = [-fine if most is not None and number > most else 0.0 for number in numbers]
        rewards[-1] -= fine * max(0, least - max(numbers))
        answers.append(rewards)
    return answers


def format_rules(
    completions: Texts,
    offsets: list | None = None,
    action_masks: list[list[bool]] | None = None,
    *,
    must: Sequence[str] = (),
    must_not: Sequence[str] = (),
    fine: float = 1.0,
) -> list[list[Span] | float]:
    """-`fine` on each match of a pattern in `must_not`, on the last character for each in `must` without a match: of
    what the policy wrote, where an environment wrote too."""
    wanted, forbidden = [re.compile(p) for p in must], [re.compile(p) for p in must_not]
    answers: list[list[Span] | float] = []
    for text, end in zip(map(text_of, completions), _own_ends(completions, offsets, action_masks), strict=True):
        missing = sum(pattern.search(text) is None for pattern in wanted)
        spans = [
            Span(m.start(), m.end(), -fine)
            for pattern in forbidden
            for m in pattern.finditer(text)
            if m.end() > m.start()
        ]
        if not text:
            answers.append(-fine * missing)
            continue
        answers.append([*spans, *([Span(end - 1, end, -fine * missing)] if missing else [])])
    return answers


def _own_ends(completions: Texts, offsets: list | None, action_masks: list[list[bool]] | None) -> list[int]:
    """Where in each text the last character is that the policy wrote; its end where it is not known whose it is."""
    ends = [len(text_of(text)) for text in completions]
    if offsets is None or action_masks is None:
        return ends
    for i, (places, mask) in enumerate(zip(offsets, action_masks, strict=True)):
        shown = [int(b) for (a, b), own in zip(places, mask, strict=True) if own and b > a]
        ends[i] = shown[-1] if shown else ends[i]
    return ends


def lexicon(completions: Texts, *, scores: dict[str, float], ignore_case: bool = True) -> list[list[Span]]:
    """On each word or phrase in `scores` its score; of two that begin together the longer one counts."""
    if not scores:
        raise ValueError("scores = {}: wants at least one word")
    flags = re.IGNORECASE if ignore_case else 0
    folded = {word.lower() if ignore_case else word: float(score) for word, score in scores.items()}
    words = "|".join(re.escape(word) for word in sorted(scores, key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)", flags)
    return [
        [Span(m.start(), m.end(), folded[m[0].lower() if ignore_case else m[0]]) for m in pattern.finditer(text)]
        for text in map(text_of, completions)
    ]


# ---------------------------------------------------------------------------------------------------------------- JSON


def json_validity(
    completions: Texts,
    finish_reasons: list[str],
    offsets: list | None = None,
    action_masks: list[list[bool]] | None = None,
    *,
    fine: float = 1.0,
) -> list[list[Span] | float]:
    """-`fine` on the first character with which the text can no longer become JSON (RFC 8259), or on the policy's last
    one where it ended by itself and is none yet. A response that was cut is only judged by what is there."""
    answers: list[list[Span] | float] = []
    ends = _own_ends(completions, offsets, action_masks)
    for text, reason, end in zip(map(text_of, completions), finish_reasons, ends, strict=True):
        wrong, whole = first_invalid(text)
        if wrong is not None:
            answers.append([Span(wrong, wrong + 1, -fine)])
        elif whole or reason == "length":
            answers.append([])
        else:
            answers.append([Span(end - 1, end, -fine)] if text else -fine)
    return answers


_SPACE, _DIGITS, _HEX = " \t\n\r", "0123456789", "0123456789abcdefABCDEF"
_NUMBER = {  # state -> kind of character -> state
    "-": {"0": "zero", "1": "int"},
    "zero": {".": "point", "e": "e"},
    "int": {"0": "int", "1": "int", ".": "point", "e": "e"},
    "point": {"0": "frac", "1": "frac"},
    "frac": {"0": "frac", "1": "frac", "e": "e"},
    "e": {"0": "exp", "1": "exp", "+": "sign"},
    "sign": {"0": "exp", "1": "exp"},
    "exp": {"0": "exp", "1": "exp"},
}
_WHOLE_NUMBERS = ("zero", "int", "frac", "exp")


def first_invalid(text: str) -> tuple[int | None, bool]:
    """(index of the first character that no JSON text has there after what is before it, or None; whether all is one).

    A pushdown automaton: `stack` holds the open brackets, `state` what may come next.
    """
    stack: list[str] = []
    state, number, literal, hexes = "value", "", "", 0
    for i, c in enumerate(text):
        if state == "number":
            kind = "0" if c == "0" else "1" if c in _DIGITS else "e" if c in "eE" else "+" if c in "+-" else c
            if kind in _NUMBER[number]:
                number = _NUMBER[number][kind]
                continue
            if number not in _WHOLE_NUMBERS:
                return i, False
            state = "after"
        if state in ("string", "key string"):
            if c == '"':
                state = "colon" if state == "key string" else "after"
            elif c == "\\":
                state = f"escape in {state}"
            elif c < " ":
                return i, False
        elif state.startswith("escape in "):
            if c == "u":
                state, hexes = state.replace("escape", "hex"), 4
            elif c in '"\\/bfnrt':
                state = state.removeprefix("escape in ")
            else:
                return i, False
        elif state.startswith("hex in "):
            if c not in _HEX:
                return i, False
            hexes -= 1
            state = state.removeprefix("hex in ") if not hexes else state
        elif state == "literal":
            if c != literal[0]:
                return i, False
            literal = literal[1:]
            state = "after" if not literal else state
        elif c in _SPACE:
            continue
        elif state in ("value", "value or ]"):
            if c == "]" and state == "value or ]":
                stack.pop()
                state = "after"
            elif c in "[{":
                stack.append(c)
                state = "value or ]" if c == "[" else "key or }"
            elif c == '"':
                state = "string"
            elif c == "-" or c in _DIGITS:
                state, number = "number", "-" if c == "-" else "zero" if c == "0" else "int"
            elif c in "tfn":
                state, literal = "literal", {"t": "rue", "f": "alse", "n": "ull"}[c]
            else:
                return i, False
        elif state in ("key", "key or }"):
            if c == '"':
                state = "key string"
            elif c == "}" and state == "key or }":
                stack.pop()
                state = "after"
            else:
                return i, False
        elif state == "colon":
            if c != ":":
                return i, False
            state = "value"
        elif stack and c == ",":
            state = "value" if stack[-1] == "[" else "key"
        elif stack and c == {"[": "]", "{": "}"}[stack[-1]]:
            stack.pop()
        else:
            return i, False
    done = state == "after" or (state == "number" and number in _WHOLE_NUMBERS)
    return None, done and not stack


# -------------------------------------------------------------------------------------------------------------- Python


def python_syntax(
    completions: Texts, finish_reasons: list[str], *, fenced: bool = True, fine: float = 1.0
) -> list[list[Span]]:
    """-`fine` on what Python's parser takes offence at, in each ```python block (or in the whole text).

    Nothing is run. In a response that was cut the open block is judged without its last line, and only for what cannot
    be mended by going on.
    """
    return [
        [
            Span(*where, -fine)
            for start, code, is_open in _blocks(text, fenced)
            if (where := _syntax_error(code, start, cut=is_open and reason == "length")) is not None
        ]
        for text, reason in zip(map(text_of, completions), finish_reasons, strict=True)
    ]


def _blocks(text: str, fenced: bool) -> Iterator[tuple[int, str, bool]]:
    """(start, code, whether it goes to the end of the text) of each block of Python."""
    if not fenced:
        yield 0, text, True
        return
    for m in re.finditer(r"^```(?:python|py)[ \t]*\r?\n(.*?)(^```|\Z)", text, re.DOTALL | re.MULTILINE):
        yield m.start(1), m[1], not m[2]


def _syntax_error(code: str, start: int, *, cut: bool) -> tuple[int, int] | None:
    """Where the first error is, in characters of the text that has `code` at `start`; None where there is none."""
    if cut:
        code = code[: code.rfind("\n") + 1]
    if not code.strip():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes: that is style
        try:
            if cut:
                codeop.compile_command(code, symbol="exec")  # None where more lines could make it whole
            else:
                ast.parse(code)
            return None
        except SyntaxError as error:
            at, end = _characters(code, error)
        except (ValueError, OverflowError):  # a null character
            at = max(0, code.find("\0"))
            end = at + 1
        except (RecursionError, MemoryError):  # nested beyond what the parser can hold
            at, end = 0, len(code)
    return start + at, start + end


def _characters(code: str, error: SyntaxError) -> tuple[int, int]:
    """The characters of `code` that a SyntaxError is about, at least one."""
    lines = [m.start() for m in re.finditer(r"(?:^|(?<=\n)|(?<=\r)(?!\n))", code)] or [0]

    def index(line: int | None, column: int | None) -> int:
        if line is None or line > len(lines):
            return len(code)
        return min(len(code), lines[max(0, line - 1)] + max(0, (column or 1) - 1))

    at = min(index(error.lineno, error.offset), len(code) - 1)
    while at > 0 and code[at] in "\r\n":  # at the end of a line: what is before it can be seen
        at -= 1
    end = index(error.end_lineno, error.end_offset) if error.end_offset and error.end_offset > 0 else at + 1
    return at, max(at + 1, min(end, len(code)))
