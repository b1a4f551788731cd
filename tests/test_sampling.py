"""Filters and draws: what is kept is what transformers keeps, what is drawn follows the softmax over it, and the
log-prob that is told is that of this distribution."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import tiny_models
from rollout.engines.sampling import Filters, sample
from rollout.engines.transformers_engine import TransformersEngine

V = 50
NUCLEUS = Filters(top_p=0.9)
FILTERS = [
    Filters(top_k=7),
    Filters(top_k=1000),
    Filters(top_p=0.5),
    NUCLEUS,
    Filters(top_p=1e-9),
    Filters(top_p=0.999999),
    Filters(min_p=0.1),
    Filters(min_p=0.999),
    Filters(top_k=20, top_p=0.8),
    Filters(top_k=20, min_p=0.05),
    Filters(top_p=0.95, min_p=0.02),
    Filters(top_k=30, top_p=0.9, min_p=0.05),
]


def named(filters: Filters) -> str:
    return ",".join(f"{f.name}={getattr(filters, f.name)}" for f in dataclasses.fields(filters))


def of_transformers(logits: torch.Tensor, temperature: float, filters: Filters) -> torch.Tensor:
    """[B, V] bool by transformers' own processors, in the order in which `generate` has them."""
    chain = [TemperatureLogitsWarper(temperature)]
    chain += [TopKLogitsWarper(filters.top_k)] if filters.top_k else []
    chain += [TopPLogitsWarper(filters.top_p)] if filters.top_p < 1 else []
    chain += [MinPLogitsWarper(filters.min_p)] if filters.min_p else []
    scores = logits.double()
    for warper in chain:
        scores = warper(None, scores)
    return scores > -torch.inf


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("filters", FILTERS, ids=named)
@pytest.mark.parametrize("kind", ["random", "peaked", "ties", "all equal", "forbidden"])
def test_the_ids_that_are_kept_are_those_of_transformers(kind, filters, temperature):
    rng = torch.Generator().manual_seed(3)
    logits = torch.randn(400, V, generator=rng, dtype=torch.float64)
    if kind == "peaked":
        logits = logits * 6
    elif kind == "ties":  # five different logits: every edge lies between equals
        logits = (logits.clamp(-1.2, 1.2) * 2).round() / 2
    elif kind == "all equal":
        logits = torch.zeros_like(logits)
    elif kind == "forbidden":
        logits[:, 3:40] = -torch.inf
    want, got = of_transformers(logits, temperature, filters), filters.keep(logits / temperature)
    assert (got & (logits == logits.amax(-1, keepdim=True))).any(-1).all()
    if kind not in ("ties", "all equal"):
        assert torch.equal(got, want)
        return
    # Which of equal ones stay is left to chance there: as many of each logit stay. Not so where a sum meets top_p on
    # the last bit, which is nobody's known answer: 0.5 of 50 equal ids is such a sum.
    apart = (want.sum(-1) - got.sum(-1)).abs()
    assert apart.max() <= (1 if filters.top_p < 1 else 0)
    kept = [logits.masked_fill(~keep, -torch.inf).sort(dim=-1).values[apart == 0] for keep in (got, want)]
    assert torch.equal(*kept) and (kind == "all equal" or len(kept[0]) > 390)


@pytest.mark.parametrize("vocabulary", [V, 600])
@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.61, 0.9])
def test_of_equal_logits_the_higher_ids_stay(top_p, vocabulary):
    """By hand, four ids of 1/4 each: the fewest that reach 0.6 are three. And one by one in descending order; of 600
    not all are sorted, unless more of them are equal than are looked at."""
    kept = Filters(top_p=0.6).keep(torch.zeros(1, 4, dtype=torch.float64))
    assert kept.tolist() == [[False, True, True, True]]
    logits = torch.randint(0, 4, (50, vocabulary), generator=torch.Generator().manual_seed(1)).double()
    logits[25:] *= torch.rand(25, vocabulary, generator=torch.Generator().manual_seed(2)) + 4
    for row, kept in zip(logits, Filters(top_p=top_p).keep(logits), strict=True):
        p, stay, reached = row.softmax(-1).tolist(), set(), 0.0
        for i in sorted(range(vocabulary), key=lambda i: (p[i], i), reverse=True):
            if reached < top_p:
                stay.add(i)
            reached += p[i]
        assert set(kept.nonzero()[:, 0].tolist()) == stay
    assert Filters(top_k=2).keep(torch.tensor([[1.0, 2.0, 1.0, 0.0]])).tolist() == [[True, True, True, False]]


def test_a_filter_looks_at_what_the_one_before_it_has_left():
    """Probabilities 0.4 0.3 0.2 0.1: the first two hold 0.7 of all, and 1.0 of what top_k 2 leaves."""
    heated = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    assert Filters(top_p=0.55).keep(heated).tolist() == [[True, True, False, False]]
    assert Filters(top_p=0.55, top_k=2).keep(heated).tolist() == [[True, False, False, False]]  # 0.4 / 0.7 = 0.571
    assert Filters(min_p=0.6, top_p=0.95).keep(heated).tolist() == [[True, True, False, False]]


LOGITS = torch.tensor([1.5, 0.3, -0.4, 2.0, 0.3, -1.0, 0.9, -200.0])


@pytest.mark.parametrize(
    ("filters", "temperature"),
    [
        (None, 1.0),
        (None, 0.7),
        (NUCLEUS, 1.0),
        (NUCLEUS, 1.3),
        (Filters(top_k=3), 1.0),
        (Filters(min_p=0.15), 1.0),
        (Filters(top_k=6, top_p=0.85, min_p=0.1), 0.8),
    ],
)
def test_draws_follow_the_softmax_over_what_is_kept(filters, temperature):
    """100,000 draws, chi-square below its 99.9 % point; the seed is fixed, so it holds always or never."""
    n = 100_000
    random = torch.from_numpy(np.random.default_rng(0).random(n))
    token, logprob, keep = sample(LOGITS.expand(n, -1), random, temperature, filters)
    kept = torch.ones(len(LOGITS), dtype=torch.bool)
    if filters is None:
        assert keep is None
    else:
        kept = of_transformers(LOGITS[None], temperature, filters)[0]
        assert (keep == kept).all()
        assert 1 < kept.sum() < len(LOGITS) - 1
    want = torch.zeros(len(LOGITS), dtype=torch.float64)
    want[kept] = torch.softmax(LOGITS[kept].double() / temperature, -1)
    possible = want > 1e-6
    counts = torch.bincount(token, minlength=len(LOGITS))
    assert not counts[~possible].any()
    expected = want[possible] * n
    chi_square = float(((counts[possible] - expected) ** 2 / expected).sum())
    assert chi_square < {2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46}[int(possible.sum()) - 1]
    torch.testing.assert_close(logprob, want.log()[token].float(), atol=1e-6, rtol=0)
    if filters is not None:  # the test can tell: without the renormalisation every expectation is off
        whole = torch.softmax(LOGITS.double() / temperature, -1)[possible] * n
        assert float(((counts[possible] - whole) ** 2 / whole).sum()) > 200


def test_the_ends_of_the_random_numbers_pick_kept_tokens():
    ends = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    logits = torch.tensor([[-3.0, 0.0, 1.0, 0.0, -2.0]] * 2)
    token, logprob, _ = sample(logits, ends, 1.0, Filters(top_k=3))
    assert token.tolist() == [1, 3]
    assert logprob.exp().tolist() == pytest.approx([1 / (2 + np.e)] * 2)


def test_filters_that_keep_all_draw_the_same_ids():
    logits = torch.randn(64, V, generator=torch.Generator().manual_seed(0))
    random = torch.from_numpy(np.random.default_rng(1).random(64))
    plain, all_kept = sample(logits, random, 0.9), sample(logits, random, 0.9, Filters(top_k=V))
    assert torch.equal(plain[0], all_kept[0]) and torch.equal(plain[1], all_kept[1]) and all_kept[2].all()


@pytest.mark.parametrize("filters", [Filters(top_k=40), NUCLEUS, Filters(min_p=0.05)], ids=named)
def test_no_filter_sorts_a_whole_vocabulary(monkeypatch, filters):
    """Sorting 50,000 numbers for every token of every slot takes longer than the model."""
    vocabulary, sorted_widths, sort = 50_000, [], torch.Tensor.sort
    heated = 3 * torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    heated[:, :100] += 12
    monkeypatch.setattr(torch.Tensor, "sort", lambda x, *a, **k: sorted_widths.append(x.shape[-1]) or sort(x, *a, **k))
    kept = filters.keep(heated)
    assert 2 <= int(kept.sum(-1).max()) < 2000
    assert all(width < vocabulary // 4 for width in sorted_widths)


# --------------------------------------------------------------------------------------------------------- the engine


def engine(name: str = "llama-tied", filters: Filters | None = NUCLEUS, temperature: float = 1.0, **more: int):
    stop = tuple(range(30))  # many, so that responses end at different times
    settings = {"temperature": temperature, "max_new_tokens": 20} | more
    return TransformersEngine(tiny_models.make_model(name), stop, filters=filters, **settings)


def several_samples(n_prompts: int, n: int) -> list:
    return [dataclasses.replace(r, k=k) for r in tiny_models.make_requests(n_prompts) for k in range(n)]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("filters", [NUCLEUS, Filters(top_k=5), Filters(top_k=50, top_p=0.95, min_p=0.05)], ids=named)
def test_logprobs_and_kept_ids_are_those_of_a_plain_forward(name, filters):
    """One row alone, float64 after transformers' own forward and processors. An id at the very edge may be in or out:
    sets are compared where every probability is clear of the edge."""
    served, asked, compared, tokens = engine(name, filters, 0.9), several_samples(12, 2), 0, 0
    for request, got in zip(asked, served.generate(asked), strict=True):
        ids = torch.from_numpy(np.concatenate([request.prompt_ids, got.response_ids]))[None]
        with torch.no_grad():
            logits = served.model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1].double()
        assert len(got.kept) == len(got.response_ids) and got.kept.ids.dtype == np.int32
        dense = torch.from_numpy(got.kept.dense(logits.shape[-1]))
        want = (logits / 0.9).masked_fill(~dense, -torch.inf).log_softmax(-1)
        picked = want.gather(-1, torch.from_numpy(got.response_ids)[:, None])[:, 0]
        np.testing.assert_allclose(got.logprobs, picked, atol=1e-5)
        same = (dense == of_transformers(logits, 0.9, filters)).all(-1)
        compared, tokens = compared + int(same.sum()), tokens + len(dense)
        assert all((np.diff(got.kept[t]) > 0).all() for t in range(len(got.kept)))
    assert tokens > 100 and compared >= tokens - 1


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("filters", [NUCLEUS, Filters(top_k=8, min_p=0.02)], ids=named)
def test_ids_and_kept_ids_do_not_depend_on_the_number_of_slots(name, filters):
    asked = several_samples(8, 4)
    wide = engine(name, filters)
    assert wide.in_slots
    want = wide.generate(asked)
    assert len({len(g.response_ids) for g in want}) > 5
    own_cache = engine(name, filters)
    own_cache.in_slots = False
    for other in (*(engine(name, filters, slots=n) for n in (1, 3, 7)), own_cache):
        for a, b in zip(want, other.generate(asked), strict=True):
            assert a.response_ids.tolist() == b.response_ids.tolist() and a.finish_reason == b.finish_reason
            assert a.kept.ids.tolist() == b.kept.ids.tolist() and a.kept.starts.tolist() == b.kept.starts.tolist()
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_without_filters_nothing_is_kept_and_the_ids_are_others():
    asked = tiny_models.make_requests(12)
    plain, filtered = engine(filters=None).generate(asked), engine(filters=Filters(top_k=3)).generate(asked)
    assert all(g.kept is None for g in plain)
    assert [g.response_ids.tolist() for g in plain] != [g.response_ids.tolist() for g in filtered]
