"""Rewards of text by rules, each against answers worked out by hand; JSON and Python against the real parsers."""

import ast
import json
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_server.library.cost import lateness, token_cost
from reward_server.library.text import (
    first_invalid,
    format_rules,
    json_validity,
    length,
    lexicon,
    python_syntax,
    repetition,
)
from reward_server.placing import Span


class TestRepetition:
    def test_the_word_that_completes_a_repeated_ngram_is_fined(self):
        text = "a cat and a cat and a cat"
        # bigrams: a-cat, cat-and, and-a, then again a-cat, cat-and, and-a, a-cat
        (spans,) = repetition([text], n=2, fine=0.5)
        assert [(text[s.start : s.end], s.start, s.score) for s in spans] == [
            ("cat", 12, -0.5),
            ("and", 16, -0.5),
            ("a", 20, -0.5),
            ("cat", 22, -0.5),
        ]

    def test_letters_case_does_not_hide_it_and_new_words_are_free(self):
        assert repetition(["The the", "one two three", "", "x"], n=1) == [[Span(4, 7, -1.0)], [], [], []]

    def test_messages_are_texts(self):
        assert repetition([[{"role": "assistant", "content": "so so"}]], n=1) == [[Span(3, 5, -1.0)]]

    def test_n_of_nothing_is_refused(self):
        with pytest.raises(ValueError, match="n = 0"):
            repetition(["a"], n=0)


def test_length_fines_each_token_beyond_and_the_last_for_each_missing():
    ids = [[1], [1, 2, 3], [1, 2, 3, 4, 5]]
    assert length(ids, least=2, most=3, fine=0.5) == [[-0.5], [0, 0, 0], [0, 0, 0, -0.5, -0.5]]
    assert length(ids) == [[0], [0] * 3, [0] * 5]
    with pytest.raises(ValueError, match="most = 1"):
        length(ids, least=2, most=1)


def test_format_rules():
    texts = ["Answer: 4", "TODO later, TODO", "", "Answer: TODO"]
    got = format_rules(texts, must=["^Answer:"], must_not=["TODO", "x*"], fine=2.0)
    assert got == [
        [],
        [Span(0, 4, -2.0), Span(12, 16, -2.0), Span(15, 16, -2.0)],
        -2.0,
        [Span(8, 12, -2.0)],
    ]


def test_lexicon_takes_the_longest_phrase_and_whole_words():
    scores = {"not good": -1.0, "good": 0.5, "Gut": 0.25}
    assert lexicon(["Not good, good, goodness, gut!"], scores=scores) == [
        [Span(0, 8, -1.0), Span(10, 14, 0.5), Span(26, 29, 0.25)]
    ]
    assert lexicon(["GOOD Gut"], scores=scores, ignore_case=False) == [[Span(5, 8, 0.25)]]


# ---------------------------------------------------------------------------------------------------------------- JSON

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def is_json(text: str) -> bool:
    def refuse(constant):
        raise ValueError(constant)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


class TestJSON:
    @settings(max_examples=200, deadline=None)
    @given(value=values, indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
    def test_every_prefix_of_json_can_become_json(self, value, indent, ascii_only):
        text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
        assert first_invalid(text) == (None, True)
        for end in range(len(text)):
            assert first_invalid(text[:end])[0] is None

    @settings(max_examples=1500, deadline=None)
    @given(text=st.text('{}[]:,"\\/ \n0123-+.eEtruefalsnx\u0001u\u00e9', max_size=14))
    def test_it_agrees_with_the_parser(self, text):
        wrong, whole = first_invalid(text)
        assert whole == is_json(text)
        if wrong is not None:
            assert not is_json(text) and first_invalid(text[:wrong])[0] is None

    @settings(max_examples=400, deadline=None)
    @given(value=values, at=st.floats(0, 1), insert=st.text('{}[]:,"\\0e-.x ', min_size=1, max_size=2))
    def test_it_agrees_with_the_parser_on_json_with_an_error(self, value, at, insert):
        text = json.dumps(value)
        place = int(at * len(text))
        text = text[:place] + insert + text[place:]
        wrong, whole = first_invalid(text)
        assert whole == is_json(text) and (wrong is None or not is_json(text))

    @pytest.mark.parametrize(
        ("text", "wrong"),
        [
            ('{"a": 1,}', 8),
            ("[1 2]", 3),
            ("[01]", 2),
            ("[1.]", 3),
            ("[-]", 2),
            ("nul!", 3),
            ("NaN", 0),
            ('{"a" 1}', 5),
            ("{'a': 1}", 1),
            (r'["\x"]', 3),
            (r'["\u12g4"]', 6),
            ('"a\tb"', 2),
            ("{} x", 3),
            ("]", 0),
            ('{"\u00e9": "\U0001f600"} }', 11),
        ],
    )
    def test_the_first_character_that_cannot_be(self, text, wrong):
        assert first_invalid(text) == (wrong, False)

    def test_rewards(self):
        texts = ['{"a": 1}', '{"a": 1,}', '{"a": ', '{"a": ', "", "12", "[1.", "x"]
        reasons = ["stop", "stop", "stop", "length", "stop", "stop", "length", "length"]
        assert json_validity(texts, reasons, fine=3.0) == [
            [],
            [Span(8, 9, -3.0)],
            [Span(5, 6, -3.0)],
            [],
            -3.0,
            [],
            [],
            [Span(0, 1, -3.0)],
        ]


# -------------------------------------------------------------------------------------------------------------- Python


def fined(text: str, reason: str = "stop", **options) -> list[str]:
    (spans,) = python_syntax([text], [reason], **options)
    assert all(span.score == -1.0 for span in spans)
    return [text[span.start : span.end] for span in spans]


class TestPython:
    @pytest.mark.parametrize(
        ("code", "blamed"),
        [
            ("x = 1\n", []),
            ("def f(a)\n    return a\n", [")"]),  # the end of the line, of which the last sign can be seen
            ("x = = 2\n", ["="]),
            ("y = (1 +\n", ["("]),
            ("if x:\npass\n", ["pass"]),
            ("\u4f60\u597d = = 1\n", ["="]),
            ("s = '\u00e9\U0001f600'; t = = 1\n", ["="]),
            ("a = 1\r\nb = = 2\r\n", ["="]),
            ("a = 1\rb = = 2\r", ["="]),
            ("x = 'abc\n", ["'"]),
        ],
    )
    def test_the_fault_is_on_the_offending_characters(self, code, blamed):
        assert fined(code, fenced=False) == blamed
        assert fined(f"Text \u00e9.\n```python\n{code}```\n") == blamed

    def test_only_blocks_of_python_are_read(self):
        text = "Not python: x = = 1\n```python\nx = = 1\n```\n```json\n{\n```\n```py\ny = 1\n```\n"
        (spans,) = python_syntax([text], ["stop"])
        assert [s.start for s in spans] == [text.index("x = = 1", 20) + 4] and fined(text) == ["="]

    @pytest.mark.parametrize(
        "code",
        ["def f(a):\n    retu", "x = [1,\n  2", "for i in range(3):\n", 's = """abc\nde', "if x", "", "x = = 1"],
    )
    def test_what_was_cut_is_not_judged_by_its_end(self, code):
        assert fined("```python\n" + code, "length") == []

    def test_what_was_cut_is_judged_by_what_stands(self):
        assert fined("```python\nx = = 1\ny = 2\nz", "length") == ["="]
        assert fined("```python\nx = = 1\n```\nand the", "length") == ["="]

    @pytest.mark.parametrize("code", ["(" * 5000, "x = 1\0\n", "[" * 90 + "]" * 90 + "x", "x" + ".a" * 3000 + " ="])
    def test_nothing_that_is_written_breaks_it(self, code):
        (spans,) = python_syntax([code], ["stop"], fenced=False)
        assert len(spans) == 1 and 0 <= spans[0].start < spans[0].end <= len(code)

    def test_warnings_are_not_its_business(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert fined("x = '\\d'\n", fenced=False) == []

    @settings(max_examples=300, deadline=None)
    @given(text=st.text("abx=()[]:'\"#\n\t \\\u00e9\U0001f6001+", max_size=25))
    def test_it_agrees_with_the_parser(self, text):
        (spans,) = python_syntax([text], ["stop"], fenced=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ast.parse(text)
                fine = True
            except (SyntaxError, ValueError):
                fine = not text.strip()
        assert (spans == []) == fine
        assert all(0 <= span.start < span.end <= len(text) for span in spans)


def test_a_completion_is_scored_by_itself():
    texts = ['{"a": 1', "x = = 1", "so so so so so so so so", "TODO"]
    reasons = ["stop"] * 4
    for score in (
        lambda t: repetition(t, n=2),
        lambda t: format_rules(t, must=["a"], must_not=["O"]),
        lambda t: lexicon(t, scores={"so": 1}),
        lambda t: json_validity(t, reasons[: len(t)]),
        lambda t: python_syntax(t, reasons[: len(t)], fenced=False),
    ):
        assert score(texts) == [score([text])[0] for text in texts] == score(texts[::-1])[::-1]


# --------------------------------------------------------------------------------- responses of several turns

MASK = [True, True, False, False, False, True, True]  # the policy, an environment, the policy
IDS = [list(range(7))]


def test_what_an_environment_wrote_is_not_counted():
    assert length(IDS, [MASK], least=6, fine=1.0) == [[0.0] * 6 + [-2.0]]  # four of seven are the policy's
    assert length(IDS, [MASK], most=3, fine=1.0) == [[0.0] * 6 + [-1.0]]
    assert length(IDS, most=3, fine=1.0) == [[0.0] * 3 + [-1.0] * 4]
    assert token_cost(IDS, [MASK], cost=1.0, free=2) == [[0, 0, 0, 0, 0, -1.0, -1.0]]
    offsets = [[(t, t + 1) for t in range(7)]]
    assert lateness(["abcdefg"], offsets, [MASK], deadline=2, cost=1.0) == [[0, 0, 0, 0, 0, -1.0, -2.0]]
    assert lateness(["abcdefg"], offsets, [MASK], done="b", deadline=1, cost=1.0) == [[0, 0, 0, 0, 0, 0, -1.0]]


def test_what_is_missing_is_fined_on_the_policys_last_character():
    """Its last turn may show no text: `<eos>` alone, behind what an environment wrote."""
    text, offsets = "[1 tool", [[(0, 1), (1, 2), (2, 7), (7, 7)]]
    masks = [[True, True, False, True]]
    assert format_rules([text], offsets, masks, must=["]"]) == [[Span(1, 2, -1.0)]]
    assert json_validity(["[1 "], ["stop"], [[(0, 1), (1, 2), (2, 3), (3, 3)]], masks) == [[Span(1, 2, -1.0)]]
    assert format_rules([text], must=["]"]) == [[Span(6, 7, -1.0)]]
