"""Compiled decode steps: the model's numbers, whatever stands beside a row, and words where there are none.

What they compute in every variant of a model is in test_decoder.py, which asks both ways.
"""

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP

import tiny_models
from rollout.engines import compiled, compiler
from rollout.engines.compiled import CompiledSteps
from rollout.engines.compiler import NotCompiled
from rollout.engines.slots import Slots
from rollout.engines.transformers_engine import TransformersEngine

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
# No width is a multiple of the lanes of a vector, nor of a panel, whatever the processor.
ODD = {
    "vocab_size": 331,
    "hidden_size": 60,
    "intermediate_size": 75,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}
NAN = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)[0]  # with a mark, which some arithmetic moves
LONG = ODD | {"hidden_size": 300, "intermediate_size": 800, "initializer_range": 0.06}  # sums of several parts
EVEN = ODD | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def make(sizes: dict[str, int], kind: type = LlamaConfig, **more: object) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        kind(**({"initializer_range": 0.15} | sizes), **more), dtype=torch.float32
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


class Text:
    """Rows of a random text behind each other, kept in slots by transformers' forward up to `lengths`, one left out."""

    def __init__(self, model: nn.Module, lengths: list[int], room: int = 700) -> None:
        rng = torch.Generator().manual_seed(1)
        self.model, self.lengths = model, torch.tensor(lengths)
        self.ids = torch.randint(model.config.vocab_size, (len(lengths), room), generator=rng)
        self.slots = Slots(len(lengths), room)
        engine = TransformersEngine(model, (0,), temperature=1.0, max_new_tokens=1, compiled=False)
        with torch.inference_mode(), engine._attention_over_slots():
            texts = [row[: n - 1].numpy() for row, n in zip(self.ids, lengths, strict=True)]
            engine._read_prompts(texts, self.slots, 0)

    @property
    def last(self) -> tuple[torch.Tensor, torch.Tensor]:
        place = self.lengths - 1
        return self.ids[torch.arange(len(place)), place], place

    @torch.inference_mode()
    def expected(self) -> torch.Tensor:
        """By the model in float64."""
        wide = AutoModelForCausalLM.from_config(self.model.config, dtype=torch.float64).eval()
        wide.load_state_dict({name: x.double() for name, x in self.model.state_dict().items()})
        return torch.stack(
            [wide(input_ids=r[None, :n]).logits[0, -1] for r, n in zip(self.ids, self.lengths, strict=True)]
        )


def steps_of(model: nn.Module) -> CompiledSteps:
    assert CompiledSteps.fits(model)
    return CompiledSteps(model)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


KINDS = {
    "llama": (LlamaConfig, {}),
    "llama, biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 20}),
}


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [ODD, EVEN, LONG], ids=["odd", "even", "long"])
def test_logits_are_those_of_the_model_at_any_length(sizes, kind):
    """Rows at 2 to 650 tokens: parts of a vector, whole ones, and many; in blocks of several sizes."""
    made, more = KINDS[kind]
    text = Text(make(sizes, made, **more), [650, 2, 15, 16, 17, 33, 100, 3, 5, 8, 31, 32, 9])
    token, place = text.last
    steps, expected = steps_of(text.model), text.expected()
    for rows in (1, 2, 12, 13):
        found, values = steps.step(token[:rows], place[:rows], text.slots)
        assert values is None and found.shape == (rows, sizes["vocab_size"])
        np.testing.assert_allclose(found, expected[:rows], atol=2e-5)


@needs_compiler
def test_bits_of_a_row_depend_on_no_other_row_and_on_no_number_of_threads(threads):
    text = Text(make(EVEN), [40 + 7 * i for i in range(23)])
    token, place = text.last
    threads(1)
    steps = steps_of(text.model)
    want, _ = steps.step(token, place, text.slots)
    for n in (1, 2, 5, 12, 22):
        assert torch.equal(steps.step(token[:n], place[:n], text.slots)[0], want[:n]), n
    for n in (2, 3):
        threads(n)
        assert all(torch.equal(steps.step(token, place, text.slots)[0], want) for _ in range(100)), n


@needs_compiler
def test_what_is_no_number_stays_with_its_row():
    text = Text(make(EVEN), [20, 30, 40])
    steps = steps_of(text.model)
    want, _ = steps.step(*text.last, text.slots)
    keys, _ = text.slots.layer(1)
    with torch.inference_mode():
        keys[1, 0, 5, 3] = NAN  # of what the second row looks back on
        keys[0, :, 20:] = torch.nan  # behind the end of the first: of nobody
    found, _ = steps.step(*text.last, text.slots)
    assert torch.equal(found[[0, 2]], want[[0, 2]]) and not bool(found[1].isfinite().any())


@needs_compiler
@pytest.mark.parametrize("gate", [-torch.inf, NAN])
def test_a_weight_that_is_no_number_is_seen(gate):
    model = make(EVEN)
    model.model.layers[1].mlp.gate_proj.weight.data[3] = gate
    text = Text(model, [20])
    assert not bool(steps_of(model).step(*text.last, text.slots)[0].isfinite().any())


@needs_compiler
def test_a_token_or_a_place_that_is_none_is_refused_before_memory_is_read():
    text = Text(make(EVEN), [20, 30])
    steps, (token, place) = steps_of(text.model), text.last
    for bad in (-1, EVEN["vocab_size"]):
        with pytest.raises(IndexError, match="not in a vocabulary of 331"):
            steps.step(torch.tensor([3, bad]), place, text.slots)
    for bad in (-1, 700):
        with pytest.raises(IndexError, match="beyond the 700 tokens"):
            steps.step(token, torch.tensor([3, bad]), text.slots)


@needs_compiler
def test_weights_are_read_anew_after_drop_and_slots_when_they_are_others():
    first, second = Text(make(EVEN), [20, 30]), Text(make(EVEN), [33, 50, 9], room=200)
    steps = steps_of(first.model)
    steps.step(*first.last, first.slots)
    np.testing.assert_allclose(steps.step(*second.last, second.slots)[0], second.expected(), atol=2e-5)
    with torch.no_grad():
        for parameter in first.model.parameters():
            parameter.data = parameter.data * 1.1  # elsewhere, as a sync puts them
    want = Text(first.model, [20, 30])
    assert float((steps.step(*want.last, want.slots)[0] - want.expected()).abs().max()) > 0.01
    steps.drop()
    np.testing.assert_allclose(steps.step(*want.last, want.slots)[0], want.expected(), atol=2e-5)


def test_what_they_are_for():
    assert CompiledSteps.fits(make(EVEN)) and CompiledSteps.fits(make(EVEN, Qwen3Config))
    assert not CompiledSteps.fits(make(EVEN).to(torch.bfloat16))
    assert not CompiledSteps.fits(make(EVEN, hidden_act="gelu"))
    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    assert not CompiledSteps.fits(make(EVEN, rope_parameters=dynamic))
    assert not CompiledSteps.fits(tiny_models.make_model("gpt2"))
    uneven = [make(EVEN) for _ in range(4)]
    uneven[0].model.norm.variance_epsilon = 1e-3
    uneven[1].model.layers[1].self_attn.scaling *= 2
    uneven[2].model.layers[1].mlp = LlamaMLP(LlamaConfig(**(EVEN | {"intermediate_size": 128})))
    uneven[3].model.embed_tokens = nn.Embedding(300, EVEN["hidden_size"])
    assert not any(map(CompiledSteps.fits, uneven))


@needs_compiler
def test_the_default_dtype_of_the_process_is_nothing_to_them():
    text = Text(make(EVEN), [20, 30])
    want, _ = steps_of(text.model).step(*text.last, text.slots)
    torch.set_default_dtype(torch.float64)
    try:
        found, _ = steps_of(text.model).step(*text.last, text.slots)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, want)


@needs_compiler
def test_slots_that_could_not_be_looked_at_are_looked_at_again(monkeypatch):
    first, second = Text(make(EVEN), [20, 30]), Text(make(EVEN), [33, 50, 9], room=200)
    steps = steps_of(first.model)
    steps.step(*first.last, first.slots)

    def fails(number: int) -> None:
        raise MemoryError

    monkeypatch.setattr(second.slots, "layer", fails)
    with pytest.raises(MemoryError):
        steps.step(*second.last, second.slots)
    monkeypatch.undo()
    np.testing.assert_allclose(steps.step(*second.last, second.slots)[0], second.expected(), atol=2e-5)


def test_without_them_the_same_is_written_and_said(tmp_path, monkeypatch, capsys):
    folder, asked = str(tiny_models.save_model(tmp_path / "m")), tiny_models.make_requests(9)
    options = {"dtype": "float32", "device": "cpu", "temperature": 1.0, "max_new_tokens": 24}
    want = TransformersEngine.load(folder, (0,), **options)

    def none(source: Path) -> None:
        raise NotCompiled("there is no g++ on PATH")

    monkeypatch.setattr(compiled.compiler, "load", none)
    capsys.readouterr()
    served = TransformersEngine.load(folder, (0,), **options)
    assert (
        "decode steps are not compiled as far as they could be, slower: there is no g++ on PATH"
        in capsys.readouterr().out
    )
    for a, b in zip(served.generate(asked), want.generate(asked), strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("where", ["all", "tokens behind two vectors", "rows behind a block", "no memory"])
def test_steps_that_give_other_numbers_are_left_when_the_model_is_loaded(where, monkeypatch):
    plain = CompiledSteps.step

    def broken(
        self: CompiledSteps, token: torch.Tensor, place: torch.Tensor, slots: Slots
    ) -> tuple[torch.Tensor, None]:
        if where == "no memory":
            raise MemoryError
        rows = torch.arange(len(token))
        bad = {"all": rows >= 0, "tokens behind two vectors": place >= 32, "rows behind a block": rows >= 12}[where]
        return plain(self, token, place, slots)[0] * (1 + 0.01 * bad[:, None]), None

    monkeypatch.setattr(CompiledSteps, "step", broken)
    served = TransformersEngine(make(EVEN), (0,), temperature=1.0, max_new_tokens=8)
    assert served.in_slots and served._decoder is not None and served._compiled is None
    assert "other numbers" in served.not_compiled


# ------------------------------------------------------------------------------------------------------- the compiler


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tokenppo" / "compiled"


def a_source(folder: Path, text: str = 'extern "C" int answer() { return 42; }') -> Path:
    (folder / "small.cpp").write_text(text, encoding="utf-8")
    return folder / "small.cpp"


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kind", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_older_processors_have_the_same_numbers(kind, cache, monkeypatch):
    """Four, eight and sixteen lanes."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    if {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512f"}[kind] not in flags:
        pytest.skip(f"this processor is no {kind}")
    monkeypatch.setattr(compiler, "COMPILE", tuple(f"-march={kind}" if "march" in x else x for x in compiler.COMPILE))
    for sizes in (ODD, EVEN):
        text = Text(make(sizes), [2, 15, 16, 17, 33, 650, 100, 3, 5, 4, 8, 9, 7, 30])
        steps = steps_of(text.model)
        assert steps._code.lanes() == {"x86-64": 4, "x86-64-v3": 8, "x86-64-v4": 16}[kind]
        np.testing.assert_allclose(steps.step(*text.last, text.slots)[0], text.expected(), atol=2e-5)


@pytest.mark.slow
@needs_compiler
def test_one_of_many_compiles_and_all_load_it(cache, tmp_path, monkeypatch):
    source, made, plain = a_source(tmp_path), [], compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda *args: (made.append(1), plain(*args)))
    answers = []
    together = [threading.Thread(target=lambda: answers.append(compiler.load(source).answer())) for _ in range(4)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join(60)
    assert answers == [42] * 4 and made == [1]
    assert [path.suffix for path in sorted(cache.iterdir())] == [".lock", ".so"]  # nothing is left beside
    a_source(tmp_path, 'extern "C" int answer() { return 43; }')
    assert compiler.load(source).answer() == 43 and made == [1, 1]


@pytest.mark.slow
@needs_compiler
def test_a_source_that_does_not_compile_is_named_with_what_the_compiler_says(cache, tmp_path):
    with pytest.raises(NotCompiled, match=r"g\+\+ does not compile small.cpp: .*small.cpp:1"):
        compiler.load(a_source(tmp_path, "int f( {"))
    assert not list(cache.glob("*.so"))


def test_no_compiler_is_said(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NotCompiled, match=r"there is no g\+\+ on PATH"):
        compiler.load(a_source(tmp_path))


def test_nothing_is_run_from_a_folder_that_others_can_write(cache, tmp_path):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(NotCompiled, match="can be written by others, and what lies there is run"):
        compiler.load(a_source(tmp_path))


@needs_compiler
@pytest.mark.slow
def test_what_is_compiled_is_its_owners_alone_whatever_the_umask(cache, tmp_path):
    before = os.umask(0o002)
    try:
        assert compiler.load(a_source(tmp_path)).answer() == 42
    finally:
        os.umask(before)


@needs_compiler
@pytest.mark.slow
def test_a_library_that_others_can_write_is_not_run(cache, tmp_path):
    source = a_source(tmp_path)
    compiler.compiled(source).chmod(0o666)
    with pytest.raises(
        NotCompiled, match=r"small-.*so can be written by others, and what lies there is run: remove it"
    ):
        compiler.load(source)


@pytest.mark.parametrize(("given", "word"), [("   ", r"no g\+\+"), ('g++ "-DX', "quotation"), ("none -m64", "no none")])
def test_a_compiler_of_ones_own_that_is_none_is_said(given, word, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", given)
    with pytest.raises(NotCompiled, match=word):
        compiler.load(a_source(tmp_path))


def test_another_compiler_has_a_file_of_its_own(tmp_path, monkeypatch):
    source = a_source(tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    plain = compiler._digest(source)
    monkeypatch.setenv("CXX", "g++ -ffast-math")
    assert compiler._digest(source) != plain


def test_a_file_that_is_no_library_is_said(cache, tmp_path):
    source = a_source(tmp_path)
    cache.mkdir(parents=True, mode=0o700)
    (cache / f"small-{compiler._digest(source)}.so").write_bytes(b"cut")
    with pytest.raises(NotCompiled, match="small.cpp is compiled and cannot be loaded"):
        compiler.load(source)


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "tokenppo").write_text("a file, where a folder would be", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(NotCompiled, match="tokenppo"):
        compiler.load(a_source(tmp_path))


def test_a_compiler_that_hangs_is_not_waited_for_without_end(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "COMPILING_S", 0.2)
    source = a_source(tmp_path)
    cache.mkdir(parents=True, mode=0o700)
    with open(cache / f"small-{compiler._digest(source)}.lock", "w") as held:
        compiler._wait_for(held)
        with pytest.raises(NotCompiled, match="another process has held"):
            compiler.load(source)


def test_another_processor_has_a_file_of_its_own(tmp_path, monkeypatch):
    source, digests = a_source(tmp_path), []
    for flags in ("sse2 avx2", "sse2 avx2 avx512f"):
        lines = [
            "processor : 0",
            "model : 207",
            "cpu MHz : 2100",
            f"flags : {flags}",
            "",
            "processor : 1",
            "model : 207",
        ]
        (tmp_path / "cpuinfo").write_text("\n".join([*lines, f"flags : {flags}"]), encoding="utf-8")
        monkeypatch.setattr(compiler, "CPUINFO", tmp_path / "cpuinfo")
        digests.append(compiler._digest(source))
    (tmp_path / "cpuinfo").write_text("\n".join([*lines, "cpu MHz : 3000", f"flags : {flags}"]), encoding="utf-8")
    assert digests[0] != digests[1] == compiler._digest(source)
