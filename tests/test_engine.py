"""The embedded engine: its log-probs are those of a plain forward, its samples those of the softmax, its ids a function
of (weights, prompt, seed, ordinal, k) alone."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import tiny_models
from core.faults import UserError
from core.trajectory import KeptTokens, PromptRequest
from rollout.engines import transformers_engine
from rollout.engines.engine import Begun
from rollout.engines.responses import uniforms
from rollout.engines.sampling import Filters, sample
from rollout.engines.transformers_engine import TransformersEngine, stop_ids


def engine(name: str, temperature: float = 1.0, max_new_tokens: int = 24, **more: object) -> TransformersEngine:
    stop = tuple(range(30)) if more.pop("often", False) else (0, 7)
    return TransformersEngine(
        tiny_models.make_model(name), stop, temperature=temperature, max_new_tokens=max_new_tokens, **more
    )


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("name", tiny_models.configs())
def test_logprobs_are_those_of_a_plain_forward_of_each_row_alone(name, temperature):
    """No padding, no cache, one row: log_softmax(logits / T) in float64 of transformers' own forward."""
    served = engine(name, temperature)
    asked = tiny_models.make_requests(16)
    worst, seen = 0.0, 0
    for request, got in zip(asked, served.generate(asked), strict=True):
        ids = torch.from_numpy(np.concatenate([request.prompt_ids, got.response_ids]))[None]
        with torch.no_grad():
            logits = served.model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1].double()
        want = (logits / temperature).log_softmax(-1).gather(-1, torch.from_numpy(got.response_ids)[:, None])[:, 0]
        worst = max(worst, float((want - torch.from_numpy(got.logprobs)).abs().max()))
        seen += len(got.response_ids)
    assert seen > 100
    assert worst < 1e-5


def several_samples(n_prompts: int, n: int) -> list[PromptRequest]:
    asked = tiny_models.make_requests(n_prompts)
    return [dataclasses.replace(request, k=k) for request in asked for k in range(n)]


@pytest.mark.parametrize("name", tiny_models.configs())
def test_ids_do_not_depend_on_the_number_of_slots(name):
    """Slots that are taken again and again, prompts that samples share, and transformers' own cache beside them."""
    asked = several_samples(5, 4)
    wide = engine(name, often=True)
    assert wide.in_slots
    want = wide.generate(asked)
    lengths = {len(g.response_ids) for g in want}
    assert len(lengths) > 5  # they end at different times
    own_cache = engine(name, often=True)
    own_cache.in_slots = False
    for other in (*(engine(name, often=True, slots=n) for n in (1, 3, 7)), own_cache):
        for a, b in zip(want, other.generate(asked), strict=True):
            assert a.response_ids.tolist() == b.response_ids.tolist() and a.finish_reason == b.finish_reason
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize("filters", [None, Filters(top_p=0.8)])
@pytest.mark.parametrize("in_slots", [True, False])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_a_response_that_was_begun_goes_on_as_if_it_had_not_been_left(name, in_slots, filters):
    """Cut anywhere, by itself or beside others that were cut elsewhere: the same ids, and what was there is kept."""
    served, asked = engine(name, often=True, slots=5, filters=filters), tiny_models.make_requests(12)
    served.in_slots = in_slots
    want = served.generate(asked)
    cuts = [None if i % 4 == 0 else (i * 5) % len(g.response_ids) for i, g in enumerate(want)]
    assert len(set(cuts)) > 4
    begun = [
        None
        if cut is None
        else Begun(
            response_ids=g.response_ids[:cut],
            logprobs=g.logprobs[:cut] - 1,
            kept=None if filters is None else KeptTokens.of([g.kept[t] for t in range(cut)]),
        )
        for cut, g in zip(cuts, want, strict=True)
    ]
    for cut, before, after in zip(cuts, want, served.generate(asked, begun), strict=True):
        assert after.response_ids.tolist() == before.response_ids.tolist()
        assert after.finish_reason == before.finish_reason
        if filters is not None:
            assert after.kept.starts.tolist() == before.kept.starts.tolist()
        left = cut or 0
        assert after.logprobs[:left].tolist() == (before.logprobs[:left] - 1).tolist()
        np.testing.assert_allclose(after.logprobs[left:], before.logprobs[left:], atol=1e-5)


@pytest.mark.parametrize("filters", [None, Filters(top_p=0.8)])
@pytest.mark.parametrize("in_slots", [True, False])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("most", [1, 5, 23])
def test_a_response_written_in_rounds_is_the_one_that_is_written_at_once(name, in_slots, filters, most):
    """Under the same weights: the same ids, sets and ends, whatever is left beside it; none gets more than it may."""
    served, asked = engine(name, often=True, slots=5, filters=filters), tiny_models.make_requests(12)
    served.in_slots = in_slots
    want = served.generate(asked)
    assert {g.finish_reason for g in want} == {"stop", "length"}
    begun: list[Begun | None] = [None] * len(asked)
    got, alive, rounds = {}, list(range(len(asked))), 0
    while alive:
        written = served.generate([asked[i] for i in alive], [begun[i] for i in alive], most)
        rounds += 1
        for i, g in zip(alive, written, strict=True):
            left = 0 if begun[i] is None else len(begun[i].response_ids)
            assert left < len(g.response_ids) <= left + most
            assert g.finish_reason is not None or len(g.response_ids) == left + most < 24
            begun[i] = Begun(response_ids=g.response_ids, logprobs=g.logprobs, kept=g.kept)
            got[i] = g
        alive = [i for i in alive if got[i].finish_reason is None]
    assert rounds == -(-24 // most)
    for i, g in enumerate(want):
        assert got[i].response_ids.tolist() == g.response_ids.tolist() and got[i].finish_reason == g.finish_reason
        np.testing.assert_allclose(got[i].logprobs, g.logprobs, atol=1e-5)
        if filters is not None:
            assert got[i].kept.starts.tolist() == g.kept.starts.tolist()


def test_the_room_is_taken_again_for_other_requests():
    """Keys and values of an earlier call lie where later ones are written, longer and shorter."""
    served = engine("llama-tied", often=True, slots=4)
    for n in (12, 3, 12):
        asked = tiny_models.make_requests(n)
        for a, b in zip(served.generate(asked), engine("llama-tied", often=True).generate(asked), strict=True):
            assert a.response_ids.tolist() == b.response_ids.tolist()


@pytest.mark.parametrize(("name", "then"), [("gpt2", [1]), ("llama-tied", [])])  # the decoder writes the rest
def test_a_prompt_is_read_once_for_all_its_samples(name, then):
    served, read = engine(name), []
    served.model.register_forward_pre_hook(lambda m, a, k: read.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    served.generate(several_samples(3, 4))
    assert read[0][0] == 3 and [width for _, width in read[1:2]] == then


def test_outside_of_the_decode_loop_the_model_is_what_it_was():
    """Attention over slots knows no masks: a padded forward between two calls must not meet it."""
    served = engine("llama-tied")
    ids, mask = torch.arange(1, 9)[None], torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        want = tiny_models.make_model("llama-tied")(input_ids=ids, attention_mask=mask).logits[:, 3:]
        served.generate(tiny_models.make_requests(2))
        assert torch.equal(served.model(input_ids=ids, attention_mask=mask).logits[:, 3:], want)


class _DropsWhatItIsGiven(torch.nn.Module):
    """A causal LM whose forward does not hand further arguments on to its layers, as remote code may be."""

    def __init__(self, lm: torch.nn.Module) -> None:
        super().__init__()
        self.lm, self.config, self.dtype = lm, lm.config, lm.dtype
        self.get_input_embeddings, self.set_attn_implementation = lm.get_input_embeddings, lm.set_attn_implementation

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None,
                logits_to_keep=0, step=None):  # fmt: skip  # noqa: ANN001, ANN201
        return self.lm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )


def test_a_fall_back_is_told_when_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    folder = str(tiny_models.save_model(tmp_path / "m"))
    options = {"dtype": "float32", "device": "cpu", "temperature": 1.0, "max_new_tokens": 4}
    TransformersEngine.load(folder, (0,), **options)
    assert "slots" not in capsys.readouterr().out
    monkeypatch.setattr(TransformersEngine, "_reads_slots", lambda self: False)
    TransformersEngine.load(folder, (0,), **options)
    assert "LlamaForCausalLM cannot be read in slots" in capsys.readouterr().out


def test_a_model_that_cannot_be_read_in_slots_writes_the_same():
    odd = TransformersEngine(
        _DropsWhatItIsGiven(tiny_models.make_model("llama-tied")), (0, 7), temperature=1.0, max_new_tokens=24
    )
    assert not odd.in_slots
    asked = several_samples(3, 2)
    for a, b in zip(odd.generate(asked), engine("llama-tied").generate(asked), strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_ids_do_not_depend_on_who_is_in_the_chunk(name):
    served, asked = engine(name), tiny_models.make_requests(12)
    together = served.generate(asked)
    for size in (1, 5):
        apart = [g for i in range(0, 12, size) for g in served.generate(asked[i : i + size])]
        for a, b in zip(together, apart, strict=True):
            assert a.response_ids.tolist() == b.response_ids.tolist()
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert len({tuple(g.response_ids.tolist()) for g in together}) > 6


def test_another_seed_or_sample_number_gives_another_response():
    served = engine("llama-tied")
    first = served.generate(tiny_models.make_requests(6))
    assert [g.response_ids.tolist() for g in first] == [
        g.response_ids.tolist() for g in served.generate(tiny_models.make_requests(6))
    ]
    asked = tiny_models.make_requests(6)
    others = [tiny_models.make_requests(6, seed=2), [dataclasses.replace(request, k=1) for request in asked]]
    for other in others:
        for a, b in zip(first, served.generate(other), strict=True):
            assert a.response_ids.tolist() != b.response_ids.tolist()


def test_uniforms_are_counter_based():
    a, b = tiny_models.make_requests(2)
    assert (uniforms(a, 50)[:20] == uniforms(a, 20)).all()  # number t does not depend on how many are drawn
    assert not np.intersect1d(uniforms(a, 50), uniforms(b, 50)).size


def test_samples_follow_the_softmax_at_the_temperature():
    logits, temperature, n = torch.tensor([0.0, 1.0, -1.0, 2.0, -200.0]), 0.7, 40_000
    random = torch.from_numpy(np.random.default_rng(0).random(n))
    token, logprob, _ = sample(logits.expand(n, -1), random, temperature)
    want = torch.softmax(logits.double() / temperature, -1)
    assert token.max() <= 3  # exp(-200) never comes
    expected = (want[:4] * n).numpy()
    chi_square = ((np.bincount(token, minlength=4) - expected) ** 2 / expected).sum()
    assert chi_square < 16.27  # the 99.9 % point at 3 degrees of freedom
    torch.testing.assert_close(logprob, want.log()[token].float(), atol=1e-6, rtol=0)


def test_the_ends_of_the_random_numbers_pick_possible_tokens():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2)
    token, _, _ = sample(logits, torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64), 1.0)
    assert token.tolist() == [1, 2]


def test_stops_at_any_stop_id_and_says_why():
    served = engine("llama-tied", max_new_tokens=40)
    for got in served.generate(tiny_models.make_requests(16)):
        ids = got.response_ids.tolist()
        ended = ids[-1] in (0, 7)
        assert not {0, 7} & set(ids[:-1])
        assert got.finish_reason == ("stop" if ended else "length")
        assert ended or len(ids) == 40


def test_no_setting_of_the_generation_config_reaches_the_samples(tmp_path):
    """top_p, top_k, penalties, min_new_tokens in the checkpoint: the ids are the same as without them."""
    plain, odd = tiny_models.save_model(tmp_path / "plain"), tiny_models.save_model(tmp_path / "odd")
    settings = json.loads((odd / "generation_config.json").read_text())
    settings |= {"do_sample": True, "top_p": 0.1, "top_k": 2, "repetition_penalty": 3.0, "min_new_tokens": 9}
    (odd / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.2}))
    got = [
        TransformersEngine.load(
            str(path), stop_ids(str(path), 0), dtype="float32", device="cpu", temperature=1.0, max_new_tokens=16
        ).generate(tiny_models.make_requests(8))
        for path in (plain, odd)
    ]
    assert [g.response_ids.tolist() for g in got[0]] == [g.response_ids.tolist() for g in got[1]]


def test_stop_ids_come_from_generation_config_and_tokenizer(tmp_path):
    folder = tiny_models.save_model(tmp_path / "m")
    assert stop_ids(str(folder), 5) == (0, 5, 7)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 9}))
    assert stop_ids(str(folder), 5) == (5, 9)
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert stop_ids(str(folder), 5) == (5,)
    with pytest.raises(UserError, match="eos"):
        stop_ids(str(folder), None)


def test_texts_are_read_in_passes_of_bounded_size(monkeypatch):
    """A pass has one text at least, equal ones count once, and no id depends on how many there are."""
    long, short = np.arange(50), np.arange(20)
    assert transformers_engine._fit([long] * 9, 0, 9) == 9
    monkeypatch.setattr(transformers_engine, "READ_TOKENS", 100)
    texts = [long, long + 1, long + 2, short, long, short]
    assert [transformers_engine._fit(texts, first, 6) for first in range(6)] == [2, 3, 4, 6, 6, 6]
    monkeypatch.setattr(transformers_engine, "READ_LOGITS", 3)  # two texts of two lengths want four
    assert [transformers_engine._fit(texts, first, 6) for first in range(6)] == [2, 3, 3, 4, 5, 6]
    served, asked = engine("llama-tied", often=True), several_samples(5, 4)
    few = served.generate(asked)
    monkeypatch.undo()
    for a, b in zip(few, served.generate(asked), strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
