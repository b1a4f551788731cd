"""What trackers are given to look at is the batch of all ranks, and the responses that it is said to be."""

import numpy as np
import pytest
import torch

import tiny_models
from core.metrics import HISTOGRAMS
from test_ledger import cfg_of, filled, trajectories
from trainer.gallery import Gallery, histograms_of, spread, values_of
from trainer.ranks import Ranks


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.make_tokenizer()


def recorded(tokenizer, steps: list[int], show=None, **overrides):
    cfg = cfg_of(**{"log.trackers": ["tensorboard"], "log.samples_every": 2, "log.samples": 3} | overrides)
    rows = trajectories(8, tokenizer)
    batch, combined, new = filled(rows)
    seen = []
    gallery = Gallery(cfg, tokenizer, Ranks(), seen.append if show is None else show)
    for step in steps:
        gallery.record(step, batch, rows, combined, new)
    return seen, rows, batch, combined, new


def test_every_second_step_is_shown_with_what_its_tokens_were_worth(tokenizer):
    seen, rows, batch, combined, new = recorded(tokenizer, [1, 2, 3, 4])
    assert [e.step for e in seen] == [2, 4] and seen[0].histograms.keys() == HISTOGRAMS.keys()
    totals = [float(combined.token_rewards[i][: len(t)][t.action_mask].sum()) for i, t in enumerate(rows)]
    samples = seen[0].samples
    assert len(samples) == 3
    assert [s.total for s in samples] == pytest.approx([min(totals), sorted(totals)[4], max(totals)])
    for s in samples:
        i = next(i for i, t in enumerate(rows) if t.order == (s.ordinal, s.k))
        t, mask = rows[i], rows[i].action_mask
        assert s.text == tokenizer.decode(t.response_ids.tolist()) and s.finish_reason == t.finish_reason
        assert s.prompt == tokenizer.decode(t.request.prompt_ids.tolist())
        for name, x in combined.weighted.items():
            np.testing.assert_allclose(s.weighted[name], np.where(mask, x[i, : len(t)], 0.0))
        ratio = (new - batch.old_logprobs).exp()[i, : len(t)]
        np.testing.assert_allclose(s.numbers["ratio - 1"], np.where(mask, ratio - 1, 0.0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(s.numbers["advantage"], np.where(mask, batch.advantages[i, : len(t)], 0.0))
        assert all(np.isfinite(x).all() and len(x) == len(t) for x in (s.token_rewards, *s.numbers.values()))


def test_histograms_count_each_token_of_the_policy_once(tokenizer):
    seen, rows, batch, _, _ = recorded(tokenizer, [2])
    tokens, histograms = int(batch.response_mask.sum()), seen[0].histograms
    counts = {name: int(h.counts.sum()) for name, h in histograms.items()}
    per_response = {"histogram/reward_total", "histogram/response_length"}
    assert counts == {name: len(rows) if name in per_response else tokens for name in HISTOGRAMS}
    assert histograms["histogram/response_length"].total == tokens
    h = histograms["histogram/advantages"]
    assert h.total == pytest.approx(float(batch.advantages[batch.response_mask].double().sum()))
    assert h.edges[0] == pytest.approx(float(batch.advantages[batch.response_mask].min()))


def test_nothing_is_shown_where_nobody_looks(tokenizer):
    for none in ({"log.samples_every": 0}, {"log.trackers": []}):
        assert recorded(tokenizer, [1, 2, 3, 4], **none)[0] == []


def test_the_histogram_of_all_ranks_is_that_of_all_values():
    """Known answer, over three ranks of which one has nothing, and one a value that is no number."""
    parts = [np.array([0.0, 1.0, np.nan]), np.array([]), np.array([2.0, 4.0, 4.0])]
    answers: list[dict] = []

    def of_rank(mine: np.ndarray):
        exchanged: list[list] = []
        # What the other ranks would send, each by the same code on its own values.
        calls = iter(range(2))

        def gather(item):
            exchanged.append(item)
            return sent[next(calls)]

        return histograms_of({"x": mine, "none": np.array([])}, gather, bins=4)

    ends = [{"x": (0.0, 1.0)}, {}, {"x": (2.0, 4.0)}]
    counted = [
        {"x": (np.array([1, 1, 0, 0]), 1.0, 1.0)},
        {"x": (np.array([0, 0, 0, 0]), 0.0, 0.0)},
        {"x": (np.array([0, 0, 1, 2]), 10.0, 36.0)},
    ]
    sent = [ends, counted]
    answers = [of_rank(part) for part in parts]
    for got in answers:
        assert got.keys() == {"x"}  # of what has no value anywhere there is no histogram
        assert got["x"].edges.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert got["x"].counts.tolist() == [1, 1, 1, 2] and (got["x"].total, got["x"].squares) == (11.0, 37.0)


def test_equal_values_have_a_histogram_too():
    h = histograms_of({"x": np.full(3, 1e9)}, lambda mine: [mine], bins=4)["x"]
    assert h.counts.sum() == 3 and h.edges[0] < 1e9 < h.edges[-1] and (np.diff(h.edges) > 0).all()


def test_which_responses_are_shown():
    totals = np.array([3.0, -1.0, 0.0, 7.0, 2.0])
    assert spread(totals, 3) == [1, 4, 3]
    assert spread(totals, 1) == [1] and spread(totals, 9) == [1, 2, 4, 0, 3] and spread(totals[:0], 3) == []


def test_values_leave_out_what_the_policy_did_not_write(tokenizer):
    batch, _, new = filled(trajectories(6, tokenizer))
    found = values_of(batch, torch.where(batch.response_mask, new, torch.nan))
    assert all(np.isfinite(x).all() for x in found.values())
