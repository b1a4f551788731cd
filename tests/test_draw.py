"""Tokens drawn by compiled code: those of sampling in float64, of the same kept ids, whatever stands beside a row, and
never one that is impossible. Where it is missing sampling.py draws."""

import dataclasses
import shutil
from ctypes import CDLL

import numpy as np
import pytest
import torch
from scipy import stats

import tiny_models
from rollout.engines import compiler, draw
from rollout.engines.compiler import NotCompiled
from rollout.engines.draw import CompiledDraw
from rollout.engines.engine import Generation
from rollout.engines.sampling import Filters, sample, sets_of
from rollout.engines.transformers_engine import TransformersEngine

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
INF = torch.inf
LAST = 1 - 2**-53  # the largest number that a generator gives
FILTERS = [
    Filters(top_k=7),
    Filters(top_k=100_000),
    Filters(top_p=0.5),
    Filters(top_p=1e-9),
    Filters(top_p=0.999999),
    Filters(min_p=0.1),
    Filters(min_p=0.999),
    Filters(top_k=20, top_p=0.8),
    Filters(top_k=30, top_p=0.9, min_p=0.05),
]
ALL = Filters(top_k=30, top_p=0.9, min_p=0.02)


def named(filters: Filters | None) -> str:
    return "none" if filters is None else ",".join(f"{k}={v}" for k, v in dataclasses.asdict(filters).items())


@pytest.fixture(scope="module")
def drawn() -> CompiledDraw:
    return CompiledDraw()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def logits_of(rows: int, ids: int, scale: float = 4.0) -> torch.Tensor:
    return scale * torch.randn(rows, ids, generator=torch.Generator().manual_seed(ids))


def randoms(rows: int) -> torch.Tensor:
    return torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("ids", [1, 2, 15, 16, 17, 255, 256, 257, 320, 5000, 152_000])
def test_tokens_and_log_probs_are_those_of_float64(ids, temperature, drawn):
    """Also where torch's own float32 is 3e-5 off: it adds up 152,000 numbers in one row."""
    logits, random = logits_of(50, ids), randoms(50)
    token, logprob, kept = drawn(logits, random, temperature)
    want, _, _ = sample(logits, random, temperature)
    assert kept is None
    assert token.tolist() == want.tolist() and token.dtype == torch.long and logprob.dtype == torch.float32
    exact = torch.log_softmax(logits.double() / temperature, dim=-1).gather(1, token[:, None])[:, 0]
    np.testing.assert_allclose(logprob, exact, atol=2e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("filters", FILTERS, ids=named)
@pytest.mark.parametrize("kind", ["random", "peaked", "ties", "all equal", "forbidden", "many"])
def test_kept_ids_and_what_is_drawn_of_them_are_those_of_float64(kind, filters, temperature, drawn):
    logits = logits_of(20, 9000, scale=2.5) if kind == "many" else logits_of(300, 50, scale=1.0)
    if kind == "peaked":
        logits = 6 * logits
    elif kind == "ties":  # five different logits: every edge lies between equals
        logits = (logits.clamp(-1.2, 1.2) * 2).round() / 2
    elif kind == "all equal":
        logits = torch.zeros_like(logits)
    elif kind == "forbidden":
        logits[:, 3:40] = -INF
    random = randoms(len(logits))
    token, logprob, kept = drawn(logits, random, temperature, filters)
    want, at, keep = sample(logits, random, temperature, filters)
    same = [list(a) == list(b) for a, b in zip(kept, sets_of(keep), strict=True)]
    if kind != "all equal":  # there a sum may meet top_p on the last bit in every row
        assert sum(same) >= len(same) - 1  # an edge within the last digits of float32
    assert all(a.dtype == np.int32 and abs(len(a) - int(b.sum())) <= 1 for a, b in zip(kept, keep, strict=True))
    assert all(int(id_) in set(ids.tolist()) for id_, ids in zip(token, kept, strict=True))
    assert token[same].tolist() == want[same].tolist()
    np.testing.assert_allclose(logprob[same], at[same], atol=2e-6)


@pytest.mark.parametrize("filters", [None, ALL], ids=named)
def test_samples_follow_the_distribution(filters, drawn):
    n, logits = 100_000, logits_of(1, 331, scale=1.5)
    token, logprob, kept = drawn(logits.expand(n, -1), randoms(n), 0.9, filters)
    heated = logits[0].double() / 0.9
    if filters is not None:
        keep = filters.keep(heated[None])[0]
        assert 5 < keep.sum() < 30 and all(ids.tolist() == keep.nonzero()[:, 0].tolist() for ids in kept[::1000])
        heated = heated.masked_fill(~keep, -INF)
    logp = torch.log_softmax(heated, dim=-1)
    np.testing.assert_allclose(logprob, logp[token], atol=1e-6)
    expected, counts = logp.exp().numpy() * n, np.bincount(token, minlength=331)
    often = expected >= 5
    assert often.sum() > (5 if filters else 200) and not counts[expected == 0].any()
    together = [np.append(x[often], x[~often].sum() + 1e-9) for x in (counts, expected)]
    assert stats.chisquare(*together).pvalue > 1e-3


@pytest.mark.parametrize("filters", [None, ALL], ids=named)
def test_bits_of_a_row_depend_on_no_other_row_and_on_no_number_of_threads(filters, drawn, threads):
    logits, random = logits_of(37, 4099), randoms(37)
    threads(1)
    token, logprob, kept = drawn(logits, random, 0.9, filters)

    def is_the_same(rows: int) -> bool:
        a, b, c = drawn(logits[:rows], random[:rows], 0.9, filters)
        sets = filters is None or all(np.array_equal(x, y) for x, y in zip(c, kept[:rows], strict=True))
        return torch.equal(a, token[:rows]) and torch.equal(b, logprob[:rows]) and sets

    assert all(map(is_the_same, (1, 2, 12, 36)))
    for n in (2, 3):
        threads(n)
        assert all(is_the_same(37) for _ in range(20))


@pytest.mark.parametrize("ids", [20, 256, 300, 1000])
def test_what_is_impossible_is_never_drawn(ids, drawn):
    """At both ends of what is drawn from, and at the edges of blocks, where sums of float and of double meet."""
    logits = logits_of(400, ids)
    logits[:, :3] = logits[:, -4:] = -INF
    logits[:, ids // 2] = -INF
    possible = logits > -INF
    edges = torch.softmax(logits.double(), dim=-1).cumsum(-1)[:, min(255, ids - 5)]
    for random in (torch.zeros(400), torch.full((400,), LAST, dtype=torch.float64), edges, edges - 1e-8, edges + 1e-8):
        for filters in (None, Filters(top_k=ids), Filters(top_p=0.999), Filters(min_p=1e-30)):
            token, logprob, kept = drawn(logits, random.double().clamp(0, LAST), 1.0, filters)
            assert bool(possible.gather(1, token[:, None]).all()) and bool((logprob > -INF).all())
            assert kept is None or all(
                bool(p[torch.from_numpy(k).long()].all()) for p, k in zip(possible, kept, strict=True)
            )
    first, _, _ = drawn(logits, torch.zeros(400, dtype=torch.float64), 1.0)
    last, _, _ = drawn(logits, torch.full((400,), LAST, dtype=torch.float64), 1.0)
    behind = (torch.softmax(logits.double(), dim=-1) * (torch.arange(ids) > last[:, None])).sum(-1)
    assert bool((first == 3).all()) and bool((behind < 1e-6).all())


def test_the_only_id_is_drawn_with_certainty(drawn):
    logits = torch.full((5, 700), -INF)
    places = torch.tensor([0, 255, 256, 512, 699])
    logits[torch.arange(5), places] = torch.tensor([-1e30, 1e30, -5.0, 0.0, 88.0])
    for random in (0.0, 0.5, LAST):
        for filters in (None, ALL):
            token, logprob, kept = drawn(logits, torch.full((5,), random, dtype=torch.float64), 0.5, filters)
            assert torch.equal(token, places) and logprob.tolist() == [0] * 5
            assert kept is None or [k.tolist() for k in kept] == [[int(place)] for place in places]


@pytest.mark.parametrize("filters", [None, *FILTERS], ids=named)
@pytest.mark.parametrize("bad", [torch.nan, INF, -INF])
def test_what_is_no_number_is_seen_and_stays_with_its_row(bad, filters, drawn):
    logits, random = logits_of(3, 300), randoms(3)
    token, logprob, _ = drawn(logits, random, 1.0, filters)
    if bad == -INF:
        logits[1] = bad  # all of them: nothing is possible
    else:
        logits[1, 7] = bad
    found, seen, kept = drawn(logits, random, 1.0, filters)
    assert torch.equal(found[[0, 2]], token[[0, 2]]) and torch.equal(seen[[0, 2]], logprob[[0, 2]])
    assert bool(seen[1].isnan()) and 0 <= int(found[1]) < 300 and (kept is None or len(kept[1]) == 0)


def test_any_dtype_and_any_layout_of_logits(drawn):
    logits, random = logits_of(30, 333).bfloat16(), randoms(30)
    token, logprob, _ = drawn(logits, random, 1.0)
    for same in (logits.float(), logits.float().T.contiguous().T, logits.double()):
        again = drawn(same, random, 1.0)
        assert torch.equal(again[0], token) and torch.equal(again[1], logprob)
    none, _, kept = drawn(logits[:0], random[:0], 1.0, ALL)
    assert len(none) == 0 and kept == []


def test_a_temperature_that_float32_has_not_is_left_to_float64():
    for temperature in (1e-39, 1e39):
        served = TransformersEngine(tiny_models.make_model("gpt2"), (0,), temperature=temperature, max_new_tokens=4)
        assert served._compiled_draw is None and served.not_compiled is None


@pytest.mark.parametrize("wrong", ["the next id", "log-probs of another temperature", "no id", "an id more is kept"])
def test_code_that_draws_something_else_is_not_used(wrong, monkeypatch):
    right = CompiledDraw.__call__

    def broken(self, logits, random, temperature, filters):  # noqa: ANN001, ANN202
        heat = temperature if wrong != "log-probs of another temperature" else 1
        token, logprob, kept = right(self, logits, random, heat, filters)
        moved = {"the next id": (token + 1).clamp(max=logits.shape[1] - 1), "no id": token - 10_000}
        if kept is not None and wrong == "an id more is kept":
            kept = [np.union1d(ids, [0, 1, 2]).astype(np.int32) for ids in kept]
        return moved.get(wrong, token), logprob, kept

    monkeypatch.setattr(CompiledDraw, "__call__", broken)
    with pytest.raises(NotCompiled, match="compiled_draw.cpp, compiled, draws other tokens"):
        CompiledDraw()
    served = TransformersEngine(tiny_models.make_model("gpt2"), (0,), temperature=1.0, max_new_tokens=4)
    assert served._compiled_draw is None and "draws other tokens" in served.not_compiled


@pytest.mark.parametrize("filters", [None, ALL], ids=named)
@pytest.mark.parametrize("kind", ["gpt2", "gpt2, side by side", "llama-tied", "llama-tied, bfloat16"])
def test_an_engine_draws_so_and_writes_the_same_without(kind, filters, monkeypatch):
    name, dtype = kind.split(",")[0], torch.bfloat16 if "bfloat16" in kind else torch.float32
    called, plain = [], CompiledDraw.__call__
    monkeypatch.setattr(CompiledDraw, "__call__", lambda *args: (called.append(1), plain(*args))[1])

    def written(**more: object) -> list[Generation]:
        model = tiny_models.make_model(name).to(dtype)
        settings = {"temperature": 0.8, "max_new_tokens": 24, "filters": filters}
        served = TransformersEngine(model, (0,), **settings, **more)
        assert served.not_compiled is None
        served.in_slots = served.in_slots and "side by side" not in kind
        called.clear()
        return served.generate(tiny_models.make_requests(9))

    got = written()
    assert called
    want = written(compiled=False)
    assert not called
    for a, b in zip(got, want, strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        if filters is not None:
            assert a.kept.starts.tolist() == b.kept.starts.tolist() and a.kept.ids.tolist() == b.kept.ids.tolist()


def test_a_header_that_changed_is_compiled_anew(tmp_path):
    (tmp_path / "small.cpp").write_text("int f() { return 1; }", encoding="utf-8")
    before = compiler._digest(tmp_path / "small.cpp")
    (tmp_path / "vectors.h").write_text("// new", encoding="utf-8")
    assert compiler._digest(tmp_path / "small.cpp") != before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["x86-64", "x86-64-v3"])
def test_older_processors_draw_the_same(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "COMPILE", tuple(f"-march={kind}" if "march" in x else x for x in compiler.COMPILE))
    loaded, load = [], compiler.load
    monkeypatch.setattr(draw.compiler, "load", lambda source: loaded.append(load(source)) or loaded[0])
    older = CompiledDraw()
    assert isinstance(loaded[0], CDLL) and list(tmp_path.rglob("compiled_draw-*.so"))
    for ids in (3, 320, 5000):
        logits, random = logits_of(50, ids), randoms(50)
        for filters in (None, ALL):
            token, logprob, kept = older(logits, random, 1.0, filters)
            want, at, keep = sample(logits, random, 1.0, filters)
            assert token.tolist() == want.tolist()
            assert kept is None or [k.tolist() for k in kept] == [k.tolist() for k in sets_of(keep)]
            np.testing.assert_allclose(logprob, at, atol=2e-6)
