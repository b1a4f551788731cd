"""Recorded decode steps: fixed memory, rows that nobody uses, and the numbers of steps that are not recorded.

A CPU has no graphs, so that a step is called again here where a GPU replays it; tests/gpu has the rest.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import tiny_models
from rollout.engines import graphs, transformers_engine
from rollout.engines.decoder import rotations_are_fixed
from rollout.engines.graphs import Graphs, Result
from rollout.engines.transformers_engine import TransformersEngine


class Again:
    """As a graph: reads the memory that it was recorded with, writes into that of its result."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, step: Callable[[], Result]) -> tuple[Result, Callable[[], Any]]:
        self.recorded += 1
        result = step()

        def again() -> None:
            for kept, new in zip(result, step(), strict=True):
                assert (kept is None) == (new is None)
                if kept is not None:
                    kept.copy_(new)

        return result, again


def engine(name: str = "llama-tied", **more: object) -> TransformersEngine:
    options = {"temperature": 1.0, "max_new_tokens": 40} | more
    return TransformersEngine(tiny_models.make_model(name), (0, 7), **options)


def recording(name: str = "llama-tied", **more: object) -> tuple[TransformersEngine, Again]:
    served, again = engine(name, **more), Again()
    assert served._graphs is None  # on a CPU
    served._graphs = Graphs(served._decoder, lambda: again)
    return served, again


def same(served: TransformersEngine, plain: TransformersEngine, n: int, seed: int = 0) -> None:
    asked = tiny_models.make_requests(n, seed=seed)
    for a, b in zip(served.generate(asked), plain.generate(asked), strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2-tied", "qwen3-untied"])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_responses_are_the_same(name, slots, monkeypatch):
    """More requests than slots: rows fall and rise again, and no number of them but 8 is a recorded one."""
    monkeypatch.setattr(graphs, "WIDTH", 16)
    served, again = recording(name, slots=slots)
    same(served, engine(name, slots=slots), 21)
    sizes = [1, 2, 4, 8][: slots.bit_length()] if slots != 3 else [1, 2, 3]
    assert {rows for rows, _ in served._graphs._steps} <= set(sizes)
    assert {length % 16 for _, length in served._graphs._steps} <= {0, served._room.room % 16}
    assert again.recorded == len(served._graphs._steps) <= len(sizes) * 5  # 64 tokens and what is over


def test_steps_are_recorded_once_and_anew_in_other_memory():
    served, again = recording(slots=4)
    same(served, engine(slots=4), 8)
    first = again.recorded
    same(served, engine(slots=4), 8)
    assert again.recorded == first
    longer = [served._make_room(4, served._room.room + 1), served._room][1]
    same(served, engine(slots=4), 8)
    assert served._graphs._slots is longer and again.recorded > first


def test_new_weights_in_the_old_memory_are_used():
    served, other = recording()[0], tiny_models.make_model("llama-tied", seed=1)
    same(served, engine(), 6)
    with torch.no_grad():
        for name, tensor in other.named_parameters():
            served.live_tensors()[name].copy_(tensor)
    served.use_weights()
    same(served, TransformersEngine(other, (0, 7), temperature=1.0, max_new_tokens=40), 6)


def test_values_come_with_the_logits_of_a_recorded_step():
    served, plain, again = engine(slots=4, values=True), engine(slots=4, values=True), Again()
    served._graphs = Graphs(served._decoder, lambda: again)
    for x in (served, plain):
        with torch.no_grad():
            x.live_tensors()["value_head.weight"].copy_(torch.linspace(-1, 1, 32)[None])
    asked = tiny_models.make_requests(9)
    for a, b in zip(served.generate(asked), plain.generate(asked), strict=True):
        assert np.abs(b.values).max() > 0.1
        np.testing.assert_allclose(a.values, b.values, atol=1e-5)
        assert a.bootstrap == (None if b.bootstrap is None else pytest.approx(b.bootstrap, abs=1e-5))
    assert again.recorded == len(served._graphs._steps) > 1


class Broken(Again):
    def __call__(self, step: Callable[[], Result]) -> tuple[Result, Callable[[], Any]]:
        raise RuntimeError("operation not permitted when stream is capturing")


class Wrong(Again):
    def __call__(self, step: Callable[[], Result]) -> tuple[Result, Callable[[], Any]]:
        result = step()
        return result, lambda: result[0].mul_(1.01)  # of the memory of another recording, say


@pytest.mark.parametrize(("record", "why"), [(Broken, "no CUDA graph of 2 rows (operation"), (Wrong, "other numbers")])
def test_what_cannot_be_recorded_is_launched_and_told(record, why, tmp_path, monkeypatch, capsys):
    folder, plain = str(tiny_models.save_model(tmp_path / "m")), engine()
    monkeypatch.setattr(transformers_engine, "OnCuda", record)
    monkeypatch.setattr(transformers_engine, "GRAPHS_ON", ("cpu",))
    options = {"dtype": "float32", "device": "cpu", "temperature": 1.0, "max_new_tokens": 40}
    served = TransformersEngine.load(folder, (0, 7), **options)
    assert served.in_slots and served._decoder is not None and not served.own_forward
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("decode steps")]
    assert len(told) == 1 and why in told[0]
    same(served, plain, 8)
    monkeypatch.setattr(transformers_engine, "OnCuda", Again)
    served = TransformersEngine.load(folder, (0, 7), **options)
    assert served._graphs is not None and served._graphs.given_up is None
    assert "decode steps" not in capsys.readouterr().out


def test_one_recording_that_fails_later_ends_nothing(monkeypatch, capsys):
    """Of more rows than the model was tried with, say: there is no memory left for them."""
    served, again = recording(slots=8)
    plain = Again.__call__
    monkeypatch.setattr(
        Again, "__call__", lambda self, step: Broken()(step) if self.recorded == 2 else plain(self, step)
    )
    same(served, engine(slots=8), 21)
    assert again.recorded == 2 and "not permitted" in served._graphs.given_up and not served._graphs._steps
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_old_room_is_gone_before_the_new_one_is_made():
    served = recording(slots=4)[0]
    same(served, engine(slots=4), 8)
    old = weakref.ref(served._room)
    served._make_room(4, served._room.room + 1)
    gc.collect()
    assert old() is None


def test_rotations_that_ask_how_far_the_furthest_token_is_are_not_recorded():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    kinds = {
        kind: AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=99, rope_parameters=rope))
        for kind, rope in (("plain", None), ("dynamic", dynamic))
    }
    assert rotations_are_fixed(kinds["plain"]) and not rotations_are_fixed(kinds["dynamic"])
