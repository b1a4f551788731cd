"""Rewards for saying what the source says, and fines for saying it late; by hand, and one small random model."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import tiny_models
from reward_server.components import Component, ScoreRequest, score_components
from reward_server.library.cost import lateness, token_cost
from reward_server.library.grounding import Similarity, contradiction, facts, overlap, sentences
from reward_server.placing import Span
from reward_server.texts import words


def test_facts_are_paid_where_they_are_first_stated():
    text = "Ada was born in 1815, in London; Ada wrote."
    wanted = ["Ada", ["eighteen fifteen", "1815"], "Paris", "Lon"]
    (got,) = facts([text], [wanted], reward=2.0, fine=0.5)
    assert got == [Span(0, 3, 2.0), Span(16, 20, 2.0), Span(len(text) - 1, len(text), -1.0)]  # no Paris; Lon is no word
    assert facts(["", "x", "y"], [["a", "b"], None, []]) == [-2.0, None, []]


class TestOverlap:
    SOURCE = "the cat sat on the mat"

    def test_rouge_2_by_hand(self):
        text = "The cat sat, the cat sat down"
        # ours: the-cat cat-sat sat-the the-cat cat-sat sat-down (6); theirs: the-cat cat-sat sat-on on-the the-mat (5)
        for measure, score in (("recall", 2 / 5), ("precision", 2 / 6), ("f1", 2 * 0.4 * (1 / 3) / (0.4 + 1 / 3))):
            (got,) = overlap([text], [self.SOURCE], n=2, measure=measure)
            assert [(text[s.start : s.end], s.start) for s in got] == [("cat", 4), ("sat", 8)]
            assert math.fsum(s.score for s in got) == pytest.approx(score, abs=1e-15)

    def test_rouge_1_counts_a_word_as_often_as_the_source_has_it(self):
        (got,) = overlap(["the the the"], [self.SOURCE], n=1, measure="recall")
        assert [s.start for s in got] == [0, 4] and math.fsum(s.score for s in got) == pytest.approx(2 / 6)

    def test_nothing_in_common_and_no_source(self):
        assert overlap(["dog", "x", ""], [self.SOURCE, None, self.SOURCE], n=1) == [[], None, []]

    def test_what_it_cannot_be(self):
        with pytest.raises(ValueError, match="measure = 'rouge'"):
            overlap(["a"], ["a"], measure="rouge")


def test_contradictions():
    pairs = [["increased", "decreased"], ["is", "is not"]]
    source = "Profit increased. It is fine."
    text = "Profit decreased, and it is not fine; it is."
    (got,) = contradiction([text], [source], pairs=pairs, fine=2.0)
    assert [(text[s.start : s.end], s.score) for s in got] == [("decreased", -2.0), ("is not", -2.0)]
    # A source that says both contradicts nothing; one that says the long form does not say the short one.
    assert contradiction(["it decreased"], ["increased, decreased"], pairs=pairs) == [[]]
    (other,) = contradiction(["it is so"], ["it is not so"], pairs=pairs)
    assert other == [Span(3, 5, -1.0)]
    assert contradiction(["x"], [None], pairs=pairs) == [None]


def test_sentences_cover_what_is_written():
    text = " One. Two?! Three\nfour... five"
    assert [text[a:b].strip() for a, b in sentences(text)] == ["One.", "Two?!", "Three", "four...", "five"]


def test_costs_by_hand():
    ids = [[1, 2, 3], [1]]
    assert token_cost(ids, cost=0.5, free=1) == [[0, -0.5, -0.5], [0]]
    assert lateness(["a b c d", ""], [[(0, 1), (1, 3), (3, 5), (5, 7)], [(0, 0)]], deadline=2, cost=1.0) == [
        [0, 0, -1, -2],
        [0],
    ]


def test_what_follows_an_answer_that_was_given_is_late():
    text = "so: 42. And then"
    _, offsets = words(text)
    pieces = [text[a:b] for a, b in offsets]
    (got,) = lateness([text], [offsets], done=r"\d+\.", cost=1.0)
    first = pieces.index(" And")
    assert got == [-float(max(0, t - first + 1)) for t in range(len(pieces))] and got[first] == -1.0
    assert lateness(["never"], [words("never")[1]], done="42") == [[0.0, 0.0]]


def test_lateness_does_not_look_ahead():
    early, late = words("42 a b")[1], words("42 a b c d e")[1]
    short, long = lateness(["42 a b", "42 a b c d e"], [early, late], done="42", cost=1.0)
    assert long[:3] == short[:3] == [0, -1, -2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("embed") / "model"
    tiny_models.save_model(folder, "gpt2")
    return str(folder)


class TestSimilarity:
    @staticmethod
    def request(texts, sources=None) -> ScoreRequest:
        pieces = [words(text) for text in texts]
        return ScoreRequest(
            prompts=["the cat"] * len(texts),
            completions=texts,
            prompt_ids=[[1]] * len(texts),
            completion_ids=[ids for ids, _ in pieces],
            offsets=[offsets for _, offsets in pieces],
            finish_reasons=["stop"] * len(texts),
            uids=[f"u{i}" for i in range(len(texts))],
            columns={"source": sources} if sources else {},
        )

    def test_a_sentence_that_is_its_context_has_1_and_others_what_a_plain_forward_says(self, model):
        texts = ["the cat. a dog sat on the mat", "the cat"]
        component = Component("s", Similarity, {"model": model})
        component.setup("cpu")
        both = component.begin(self.request(texts, ["the cat.", None]))
        assert texts[0][both[0][0].start : both[0][0].end] == "the cat."
        assert both[0][0].score == pytest.approx(1.0, abs=1e-6) and both[1] is None

        def embed(text):
            ids = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt")
            ids.pop("token_type_ids", None)
            hidden = AutoModel.from_pretrained(model)(**ids).last_hidden_state[0].double().mean(0)
            return hidden / hidden.norm()

        with torch.no_grad():
            want = float(embed("a dog sat on the mat") @ embed("the cat."))
        assert both[0][1].score == pytest.approx(want, abs=1e-6) and abs(want) < 0.9999

    def test_without_a_source_the_prompt_is_the_context_and_company_changes_nothing(self, model):
        texts = ["the cat", "a dog. the mat!", "dog " * 30]
        component = Component("s", Similarity, {"model": model, "batch_size": 2})
        component.setup("cpu")
        together = score_components([component], self.request(texts))["s"]
        for i, text in enumerate(texts):
            ((alone, _),) = score_components([component], self.request([text]))["s"]
            np.testing.assert_allclose(alone, together[i][0], atol=1e-6)
        assert together[0][0].sum() == pytest.approx(1.0, abs=1e-6)
