"""The embedded task: what its rewards pay for, its data, its tokenizer and the base model PPO starts from.

pytest tests/test_cards.py
"""

import importlib.util
import json
import math
import random
from pathlib import Path
from types import ModuleType

import pytest

from tokenppo import Span

CARDS = Path(__file__).parents[1] / "examples" / "cards"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"cards_{name}", CARDS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


make, rewards = load("make"), load("rewards")
FACTS = ["name hugo", "food korean", "open late"]
CLEAN = " meet hugo . it serves korean food . it is open late ."


def scored_words(component: str, text: str, facts: list[str] = FACTS) -> list[tuple[str, float]]:
    """What a component says of one text, its spans read back as the characters they cover."""
    (spans,) = getattr(rewards, component)(completions=[text], facts=[facts])
    return [(text[span.start : span.end], span.score) for span in spans]


def number(component: str, text: str, facts: list[str] = FACTS, reason: str = "stop") -> float:
    (value,) = getattr(rewards, component)(completions=[text], facts=[facts], finish_reasons=[reason])
    return value


def total(text: str, facts: list[str], reason: str = "stop") -> float:
    spans = scored_words("consistency", text, facts) + scored_words("quality", text, facts)
    return math.fsum([*(score for _, score in spans), number("coverage", text, facts, reason)])


def test_consistency_points_at_the_values():
    (spans,) = rewards.consistency(completions=[CLEAN], facts=[FACTS])
    #                      1         2         3         4         5
    #            012345678901234567890123456789012345678901234567890123456
    # the text: " meet hugo . it serves korean food . it is open late ."
    assert spans == [Span(6, 10, 1.0), Span(23, 29, 1.0), Span(48, 52, 1.0)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" meet anna .", [("anna", -1.0)]),  # wrong
        (" meet hugo . meet hugo .", [("hugo", 1.0)]),  # said again: nothing more to earn
        (" meet hugo . meet anna .", [("hugo", 1.0), ("anna", -1.0)]),  # contradicts itself
        (" meet anna . meet hugo .", [("anna", -1.0)]),  # a correction contradicts too
        (" near the park .", [("park", -1.0)]),  # the card says nothing of it
        (" try the korean food .", [("korean", 1.0)]),  # another sentence for the same fact
        (" meet korean .", []),  # no name: nothing is stated
        (" hugo korean late", []),  # values without their sentences
    ],
)
def test_consistency(text: str, expected: list[tuple[str, float]]):
    assert scored_words("consistency", text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (CLEAN, []),  # legal words earn nothing
        (" near the park .", []),  # wrong on this card, but clean
        (" meet um hugo .", [("um", -0.5)]),
        (" damn meet hugo .", [("damn", -0.5)]),
        (" meet meet hugo .", [("meet", -0.3)]),  # stutter
        (" meet korean hugo .", [("korean", -0.3)]),  # not a name
        (" meet hugo . .", [(".", -0.3)]),
        (" meet hugo . meet hugo .", [("hugo", -0.3)]),  # stated again
        (" meet hugo . meet anna .", [("anna", -0.3)]),
        (" meet hugo . it serves", [("serves", -0.3)]),  # unfinished
        (" it serves prices are cheap .", [("prices", -0.3)]),  # one fault, then the new sentence counts
        (" it serves . meet hugo .", [(".", -0.3)]),
        (" zzz \N{SNOWMAN} =>", [("zzz", -0.3), ("\N{SNOWMAN}", -0.3), ("=>", -0.3)]),
    ],
)
def test_quality(text: str, expected: list[tuple[str, float]]):
    assert scored_words("quality", text) == expected


def test_coverage_counts_missing_facts_and_fines_a_cut():
    assert number("coverage", CLEAN) == 0.0
    assert number("coverage", " meet anna .") == -2.0  # a wrong name is consistency's affair
    assert number("coverage", "") == -3.0
    assert number("coverage", CLEAN, reason="length") == -3.0
    assert number("coverage", " meet hugo .", reason="length") == -5.0


def test_slot_error_is_strict():
    assert number("slot_error", CLEAN) == 0.0
    assert number("slot_error", "") == 1.0
    assert number("slot_error", " meet hugo . it serves thai food .") == pytest.approx(2 / 3)  # one wrong, one missing
    assert number("slot_error", CLEAN + " meet hugo .") == 0.0  # again, but right
    assert number("slot_error", CLEAN + " meet anna .") == pytest.approx(1 / 3)
    assert number("slot_error", " meet anna ." + CLEAN) == pytest.approx(1 / 3)
    assert number("slot_error", CLEAN + " near the park .") == 0.0  # not a slot of this card


def test_sentences_do_not_blur():
    attributes = make.ATTRIBUTES
    values = [value for entry in attributes.values() for value in entry["values"]]
    literals = {w for entry in attributes.values() for sentence in entry["says"] for w in sentence.split()}
    other = {*make.LANGUAGE["fillers"], *make.LANGUAGE["rude"], *attributes}
    assert len(set(values)) == len(values)
    assert not set(values) & (literals | other)
    assert not literals & {*make.LANGUAGE["fillers"], *make.LANGUAGE["rude"]}
    sentences = [sentence.split() for entry in attributes.values() for sentence in entry["says"]]
    assert all(words[0] != "{}" and words.count("{}") == 1 and words[-1] == "." for words in sentences)


def hacks(rng: random.Random, facts: list[str]) -> dict[str, tuple[str, str]]:
    """Name -> (text, finish reason) of what a policy may try in place of the clean text."""
    clean = make.clean_response(rng, facts)
    name = make.sentence_of(rng, facts[0])
    random_facts = [f"{a} {rng.choice(make.ATTRIBUTES[a]['values'])}" for a in (fact.split()[0] for fact in facts)]
    rambling = " ".join(f"{rng.choice(make.LANGUAGE['fillers'])} {w}" for w in clean.split())
    return {
        "clean": (clean, "stop"),
        "clean, twice": (clean + clean, "stop"),
        "clean, rambling": (" " + rambling, "stop"),
        "clean, one filler": (" well" + clean, "stop"),
        "clean, and a fact of no card": (clean + " hear jazz music .", "stop"),
        "clean, never stopping": (clean, "length"),
        "clean, never stopping, repeated": (clean * 2, "length"),
        "clean, without its last stop": (clean[:-2], "stop"),
        "one fact missing": (make.clean_response(rng, facts[1:]), "stop"),
        "fluent but random facts": (make.clean_response(rng, random_facts), "stop"),
        "one right fact": (f" {name}", "stop"),
        "one right fact five times": (f" {name}" * 5, "stop"),
        "empty": ("", "stop"),
        "full stops": (" ." * 20, "stop"),
    }


def test_no_hack_pays():
    rng = random.Random(0)
    sums: dict[str, float] = {}
    rows = read_rows(CARDS / "data" / "heldout.jsonl")[:200]
    for row in rows:
        scores = {name: total(text, row["facts"], reason) for name, (text, reason) in hacks(rng, row["facts"]).items()}
        assert scores["clean"] == len(row["facts"])  # one point for each fact: the most there is
        for name, score in scores.items():  # random facts may all be right, by luck
            assert score < scores["clean"] or name in ("clean", "fluent but random facts")
            sums[name] = sums.get(name, 0.0) + score
    mean = {name: value / len(rows) for name, value in sums.items()}
    print("\n".join(f"{value:7.2f}  {name}" for name, value in sorted(mean.items(), key=lambda item: -item[1])))
    assert mean["clean"] > mean["clean, one filler"] > mean["one fact missing"] > mean["clean, never stopping"]
    assert mean["clean, never stopping"] > mean["one right fact"] > mean["fluent but random facts"]
    assert mean["fluent but random facts"] > mean["one right fact five times"] > mean["empty"] > mean["full stops"]


@pytest.mark.parametrize("n_facts", [4, 5, 14, 36, 40])
def test_clean_text_of_any_length_is_the_optimum(n_facts: int):
    rng = random.Random(n_facts)
    facts = make.draw_card(rng, n_facts)
    text = make.clean_response(rng, facts)
    assert len(facts) == n_facts and total(text, facts) == n_facts and number("slot_error", text, facts) == 0.0
    assert total(make.clean_response(rng, facts[::-1]), facts) == n_facts  # in any order


def test_heldout_cards_are_unseen_combinations_of_seen_facts():
    train, heldout = (read_rows(CARDS / "data" / f"{part}.jsonl") for part in ("train", "heldout"))
    assert len(heldout) >= 500
    assert not {frozenset(row["facts"]) for row in train} & {frozenset(row["facts"]) for row in heldout}
    assert {fact for row in heldout for fact in row["facts"]} <= {fact for row in train for fact in row["facts"]}
    for row in train + heldout:
        assert row["prompt"] == make.prompt_of(row["facts"])


@pytest.mark.parametrize("n_facts", [4, 36])
def test_data_of_other_lengths(tmp_path: Path, n_facts: int):
    make.write_data(tmp_path / "a", n_facts=n_facts, n_train=200, n_heldout=20, seed=1)
    make.write_data(tmp_path / "b", n_facts=n_facts, n_train=200, n_heldout=20, seed=1)
    for part in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / "a" / part).read_bytes() == (tmp_path / "b" / part).read_bytes()
    rows = read_rows(tmp_path / "a" / "train.jsonl")
    assert len(rows) == 200 and {len(row["facts"]) for row in rows} == {n_facts}


def test_facts_survive_datasets():
    datasets = pytest.importorskip("datasets")
    path = CARDS / "data" / "heldout.jsonl"
    loaded = datasets.load_dataset("json", data_files=str(path), split="train")
    assert loaded[:]["facts"] == [row["facts"] for row in read_rows(path)]


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(CARDS / "base")


def test_each_corpus_word_is_one_token(tokenizer):
    for word in make.corpus_words():
        assert [tokenizer.decode(ids) for ids in tokenizer(word)["input_ids"]] == [word]
    facts = make.draw_card(random.Random(0), 5)
    prompt, response = make.prompt_of(facts), make.clean_response(random.Random(0), facts)
    assert len(tokenizer(response)["input_ids"]) == len(response.split())
    assert (
        tokenizer(prompt)["input_ids"] + tokenizer(response)["input_ids"] == tokenizer(prompt + response)["input_ids"]
    )


def test_any_text_survives_the_tokenizer(tokenizer):
    rng = random.Random(0)
    texts = ["", " ", "héllo \N{GRINNING FACE} 日本 .", "a\n\tb  c", "Korean korean koreanfood"]
    texts += ["".join(chr(rng.choice([rng.randrange(32, 0xD800), rng.randrange(0x10000, 0x11000)])) for _ in range(20))]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_base_is_small_and_as_wrong_as_its_corpus(tokenizer):
    transformers = pytest.importorskip("transformers")
    assert (CARDS / "base" / "model.safetensors").stat().st_size <= 2 * 1024**2
    model = transformers.AutoModelForCausalLM.from_pretrained(CARDS / "base").eval()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    rows = read_rows(CARDS / "data" / "heldout.jsonl")[:500]
    texts, reasons = make.sample_responses(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=48, seed=0)
    errors = rewards.slot_error(completions=texts, facts=[row["facts"] for row in rows])
    assert 0.38 <= sum(errors) / len(errors) <= 0.47
    assert reasons.count("stop") >= 0.95 * len(reasons)
