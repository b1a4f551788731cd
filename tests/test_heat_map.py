"""The heat map as HTML and as Markdown: nothing of a text is markup, every token has its colour."""

import re
from html.parser import HTMLParser

import numpy as np

from launch.heat_map import MOST_PIECES, html, markdown, shared_pieces
from tests.exhibits import EVIL, shown


class Page(HTMLParser):
    """Tags, and of each row of the table its head and its spans: (text, style, title)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.rows: list[tuple[str, list[tuple[str, str, str]]]] = []
        self._span: tuple[str, str] | None = None
        self._head = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        given = dict(attrs)
        if tag == "tr":
            self.rows.append(("", []))
        self._head = tag == "th" or (self._head and tag == "br")
        if tag == "span":
            self._span = (given.get("style") or "", given.get("title") or "")

    def handle_endtag(self, tag):
        if tag == "span":
            self._span = None

    def handle_data(self, data):
        if self._span is not None:
            self.rows[-1][1].append((data, *self._span))
        elif self._head and self.rows:
            self.rows[-1] = (self.rows[-1][0] + data, self.rows[-1][1])


def test_pieces_are_the_text_and_share_what_tokens_share():
    s = shown()
    cut = shared_pieces(s.text, s.offsets.tolist())
    assert "".join(piece for piece, _ in cut) == EVIL and [tokens for _, tokens in cut] == [[0, 1], [2], [3]]


def test_each_token_has_its_colour_and_its_numbers_and_no_text_is_markup():
    page = Page(html(shown()))
    assert page.tags == {"meta", "style", "p", "table", "tr", "th", "br", "td", "span"}
    heads = [re.sub(r"[+-].*", "", head) for head, _ in page.rows]
    assert heads == ["reward", "quality", "advantage"]
    reward = page.rows[0][1]
    assert "".join(text for text, _, _ in reward[:2]) == EVIL and reward[2][0] == "\u25a1"
    # Tokens 0 and 1 share a character: 1 - 0.25. The environment's has no colour, the stop token the same as the first.
    assert [style for _, style, _ in reward] == ["background:rgba(0,150,60,1.00)", "", "background:rgba(0,150,60,1.00)"]
    assert reward[0][2].splitlines() == [
        "token 0: reward +1, quality +1, advantage +0.5",
        "token 1: reward -0.25, quality -0.25, advantage -0.5",
    ]
    # No sum of advantages: the last token of a piece counts.
    assert [style for _, style, _ in page.rows[2][1]] == [
        "background:rgba(210,40,40,1.00)",
        "",
        "background:rgba(0,150,60,0.50)",
    ]


def test_a_name_or_a_title_cannot_break_out():
    s = shown()
    evil = {"<i>'\">": s.token_rewards}
    page = html(type(s)(**{**vars(s), "weighted": evil, "finish_reason": "<u>"}))
    assert (
        "<i>" not in page
        and "<u>" not in page
        and Page(page).tags <= {*("meta", "style", "p", "table", "tr", "th", "br", "td", "span")}
    )


def test_a_long_response_is_cut_and_that_is_said():
    n = MOST_PIECES + 10
    s = shown()
    long = {"text": "a" * n, "offsets": np.array([[i, i + 1] for i in range(n)]), "written": np.ones(n, dtype=bool)}
    numbers = {"token_rewards": np.ones(n), "weighted": {}, "numbers": {}}
    page = html(type(s)(**{**vars(s), **long, **numbers}))
    assert "10 more pieces are not shown" in page and page.count("<span") == MOST_PIECES


def test_markdown_has_the_texts_as_they_are_and_the_sums():
    text = markdown(shown())
    lines = text.splitlines()
    assert lines[0] == "prompt 7 #1, 4 tokens, stop, reward +1.5".replace("4 tokens", "3 tokens")
    assert "    say <b>it</b>" in lines and f"    {EVIL}" in lines and "| quality | +1.5 |" in lines
    assert sum("+0.75" in line for line in lines) == 2
