"""Stop strings: a response ends with the token that completes one, whatever tokens and bytes it comes in."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from test_offsets import GEMMA, LLAMA_2, ids_of, sentence_piece
from tokenizers import decoders

import tiny_models
from core.config import load
from core.faults import UserError
from rollout.engines.engine import Begun
from rollout.engines.sampling import Filters
from rollout.engines.transformers_engine import TransformersEngine
from rollout.stop_strings import StopStrings

TOKENIZER = tiny_models.make_tokenizer()


def first_complete(tokenizer, strings: list[str], ids: list[int]) -> int | None:
    """Number of tokens after which the text holds a string, by decoding every prefix."""
    for t in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:t], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if any(s in text for s in strings):
            return t
    return None


def told(tokenizer, strings: list[str], ids: list[int]) -> int | None:
    stops = StopStrings(strings, tokenizer)
    return next((t for t in range(1, len(ids) + 1) if stops.completed_by_last(np.array(ids[:t]))), None)


@pytest.mark.parametrize(
    ("text", "strings", "ends"),
    [
        ("one\n\ntwo", ["\n\n"], "one\n\n"),
        ("the cat sat", ["at"], "the cat"),  # in the middle of a token, or at its end
        ("a stop b", ["b", "stop"], "a stop"),  # the first in the text, not in the list
        ("caf\u00e9 !", ["\u00e9"], "caf\u00e9"),  # two bytes, each a token
        ("x \U0001f600\U0001f44d y", ["\U0001f600\U0001f44d"], "x \U0001f600\U0001f44d"),
        ("aab", ["ab"], "aab"),
        ("no such", ["###"], None),
    ],
)
def test_where_a_text_ends_by_hand(text, strings, ends):
    ids = TOKENIZER.encode(text)
    got = told(TOKENIZER, strings, ids)
    if ends is None:
        assert got is None
    else:
        assert TOKENIZER.decode(ids[:got]).startswith(ends) and not any(
            s in TOKENIZER.decode(ids[: got - 1]) for s in strings
        )


@pytest.mark.parametrize("kind", ["byte level", "llama", "gemma", "metaspace", "wordpiece"])
def test_random_ids_end_where_their_text_first_holds_a_string(kind):
    """Half characters, hidden tokens and runs of spaces occur; the strings are pieces of such texts."""
    rng, found = np.random.default_rng(2), 0
    if kind == "byte level":
        tokenizer = TOKENIZER
        some = [0, *TOKENIZER.encode("a \u00e9\u20ac\U0001f600 the cat sat on the park")]
    else:
        decoder = {"llama": LLAMA_2, "gemma": GEMMA}.get(kind)
        tokenizer = sentence_piece(
            decoder or {"metaspace": decoders.Metaspace("\u2581", "always")}.get(kind) or decoders.WordPiece("##", True)
        )
        words = "</s>", "\u2581", "\u2581a", "b", "\u00e9", "\u2581\u2581", "<tool>", "<0xC3>", "<0xA9>", "<0x20>"
        some = ids_of(tokenizer, *words)
    for _ in range(400):
        ids = rng.choice(some, size=14).tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        pieces = [text[i : i + int(rng.integers(1, 5))] for i in rng.integers(0, max(1, len(text)), size=2)]
        strings = [p for p in pieces if p and "\ufffd" not in p]
        if strings:
            assert told(tokenizer, strings, ids) == first_complete(tokenizer, strings, ids), (ids, strings)
            found += 1
    assert found > 200


def test_byte_level_bpe_looks_at_the_last_few_tokens_only(monkeypatch):
    """Its cost does not grow with the response."""
    stops, asked = StopStrings(["abc"], TOKENIZER), []
    bytes_of = stops._mapper.bytes_of
    monkeypatch.setattr(stops._mapper, "bytes_of", lambda i: asked.append(i) or bytes_of(i))
    monkeypatch.setattr(stops._mapper, "text", lambda ids: pytest.fail("decoded a whole response"))
    assert not stops.completed_by_last(np.array(TOKENIZER.encode("the dog ran " * 100)))
    assert len(asked) <= 3


def engine(strings: list[str], **more: object) -> TransformersEngine:
    stops = StopStrings(strings, TOKENIZER) if strings else None
    settings = {"temperature": 1.0, "max_new_tokens": 30} | more
    return TransformersEngine(tiny_models.make_model("llama-tied"), (0,), stop_strings=stops, **settings)


@pytest.mark.parametrize("filters", [None, Filters(top_p=0.9)])
def test_responses_are_those_without_strings_cut_where_one_is_complete(filters):
    """The same ids up to there, the stop token in the response, finish_reason stop; for any number of slots."""
    asked = [dataclasses.replace(r, k=k) for r in tiny_models.make_requests(8) for k in range(4)]
    whole = engine([], filters=filters).generate(asked)
    # What some of them say, across tokens, and a character of several bytes.
    texts = [TOKENIZER.decode(g.response_ids, skip_special_tokens=True) for g in whole]
    strings = [next(t[i : i + 2] for i in range(2, 90) if "\ufffd" not in t[i : i + 2]) for t in texts[:8]]
    strings += [next(c for t in texts for c in t if ord(c) > 127 and c != "\ufffd")]
    ends = [first_complete(TOKENIZER, strings, g.response_ids.tolist()) for g in whole]
    assert 8 <= len([end for end in ends if end]) < len(asked)
    own_cache = engine(strings, filters=filters)
    own_cache.in_slots = False
    for served in (*(engine(strings, filters=filters, slots=n) for n in (64, 1, 5)), own_cache):
        for a, b, end in zip(whole, served.generate(asked), ends, strict=True):
            assert b.response_ids.tolist() == a.response_ids.tolist()[:end]
            assert b.finish_reason == ("stop" if end else a.finish_reason)
            np.testing.assert_allclose(b.logprobs, a.logprobs[:end], atol=1e-5)
            assert b.kept is None or len(b.kept) == len(b.response_ids)


def test_the_last_token_that_there_is_room_for_may_complete_one():
    (request,) = tiny_models.make_requests(1)
    (whole,) = engine([], max_new_tokens=6).generate([request])
    string = TOKENIZER.decode(whole.response_ids[5:])
    assert string and first_complete(TOKENIZER, [string], whole.response_ids.tolist()) == 6
    (got,) = engine([string], max_new_tokens=6).generate([request])
    assert len(got.response_ids) == 6 and (whole.finish_reason, got.finish_reason) == ("length", "stop")


def test_a_worker_loads_the_tokenizer_only_where_there_are_strings(tmp_path):
    folder = str(tiny_models.save_model(tmp_path / "m"))
    options = {"dtype": "float32", "device": "cpu", "temperature": 1.0, "max_new_tokens": 30}
    asked = tiny_models.make_requests(8)
    plain = TransformersEngine.load(folder, (0,), **options, load_tokenizer=lambda: pytest.fail("loaded"))
    strings = ("a", "e")
    stopping = TransformersEngine.load(folder, (0,), **options, stop_strings=strings, load_tokenizer=lambda: TOKENIZER)
    for a, b in zip(plain.generate(asked), stopping.generate(asked), strict=True):
        end = first_complete(TOKENIZER, list(strings), a.response_ids.tolist())
        assert b.response_ids.tolist() == a.response_ids.tolist()[:end]


@pytest.mark.parametrize("strings", [[""], ["x", "\ufffd"]])
def test_strings_that_cannot_be_met_are_refused(strings):
    with pytest.raises(UserError, match="rollout.stop_strings = .*each is at least a character"):
        load(None, {**tiny_models.LEARNER_SETTINGS, "rollout.stop_strings": strings}, folder=Path("/nowhere"))


@pytest.mark.parametrize("kind", ["byte level", "metaspace"])
def test_what_ended_an_earlier_turn_or_came_from_an_environment_ends_nothing_again(kind):
    """The last token must complete it, with tokens of its own turn."""
    if kind == "byte level":
        tokenizer, stop, answer, more = (
            TOKENIZER,
            TOKENIZER.encode("</c>"),
            TOKENIZER.encode(" 19"),
            TOKENIZER.encode("a"),
        )
        string = "</c>"
    else:
        tokenizer = sentence_piece(decoders.Metaspace("\u2581", "always"))
        (stop, answer, more), string = (ids_of(tokenizer, w) for w in ("<tool>", "b", "\u2581a")), "<tool>"
        string = tokenizer.decode(stop)
    stops = StopStrings([string], tokenizer)
    turn = np.array([*stop, *answer])
    assert stops.completed_by_last(np.array(stop))
    for n in range(1, 4):
        later = np.concatenate([turn, np.array(more * n)])
        assert not stops.completed_by_last(later, turn=len(turn)) and not stops.completed_by_last(later)
    again = np.concatenate([turn, np.array([*more, *stop])])
    assert stops.completed_by_last(again, turn=len(turn))
    # An observation that ends as the string does completes nothing for the token behind it.
    assert not stops.completed_by_last(np.array([*answer, *stop, *more]), turn=len(answer) + len(stop))
    half = np.array(stop)
    if len(half) > 1:
        assert not stops.completed_by_last(half, turn=len(half) - 1)  # begun by the environment


@pytest.mark.parametrize("most", [1, 2, 3, 5])
@pytest.mark.parametrize("in_slots", [True, False])
def test_a_string_that_lies_in_two_rounds_ends_a_response_as_one_that_does_not(in_slots, most):
    """Three tokens and more, so that a round ends within most of them."""
    model = tiny_models.make_model("llama-tied")
    plain = TransformersEngine(model, (), temperature=1.0, max_new_tokens=20)
    asked = tiny_models.make_requests(12)
    texts = [TOKENIZER.decode(g.response_ids.tolist()) for g in plain.generate(asked)]
    strings = sorted({text[i : i + 4] for text in texts for i in range(4, 40, 5)})
    strings = [s for s in strings if len(s) == 4 and "\N{REPLACEMENT CHARACTER}" not in s]
    stops = StopStrings(strings, TOKENIZER)
    engine = TransformersEngine(model, (), temperature=1.0, max_new_tokens=20, stop_strings=stops)
    engine.in_slots = in_slots
    want = engine.generate(asked)
    assert sum(g.finish_reason == "stop" for g in want) > 3
    got: list = [None] * len(asked)
    while left := [i for i, g in enumerate(got) if g is None or g.finish_reason is None]:
        begun = [
            None if got[i] is None else Begun(response_ids=got[i].response_ids, logprobs=got[i].logprobs) for i in left
        ]
        for i, g in zip(left, engine.generate([asked[i] for i in left], begun, most), strict=True):
            got[i] = g
    for a, b in zip(want, got, strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist() and a.finish_reason == b.finish_reason
