"""Models as rewards, against a forward for every prefix: shifts, telescoping, other tokenizers, company."""

import math

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerFast,
)

import tiny_models
from core.faults import RewardFault, UserError
from reward_server.components import Component, ScoreRequest, score_components
from reward_server.library.models import Fluency, LogRatio, PrefixDelta, TokenClassifier, sentence_ends
from rollout.offsets import OffsetMapper

PROMPTS = ["the cat", "a dog sat on", "the mat"]
TEXTS = ["the cat sat on the mat. a dog sat!", "the dog", "the cat. the mat. the park"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy, a reference, and reward models with the policy's tokenizer and with one of single characters."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("policy", "reference"):
        tiny_models.save_model(folder / name, "gpt2")
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_pretrained(folder / "reference")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    other.save_pretrained(folder / "reference")
    config = AutoModelForCausalLM.from_pretrained(folder / "policy").config
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    torch.manual_seed(2)
    config.num_labels = 1
    config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    for kind, name in (
        (AutoModelForSequenceClassification, "causal"),
        (AutoModelForTokenClassification, "tokens"),
    ):
        model = kind.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)  # scores that differ by more than rounding
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    letters = sorted(set("".join(TEXTS + PROMPTS)) | set("é😀\n"))
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{c: i + 2 for i, c in enumerate(letters)}}
    single = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    single.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    other = PreTrainedTokenizerFast(tokenizer_object=single, pad_token="[PAD]", unk_token="[UNK]")
    config.vocab_size, config.pad_token_id = len(vocabulary), 0
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder / "causal-letters")
    other.save_pretrained(folder / "causal-letters")
    bert = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        num_labels=1,
        pad_token_id=0,
    )
    AutoModelForSequenceClassification.from_config(bert).save_pretrained(folder / "both-ways")
    other.save_pretrained(folder / "both-ways")
    return folder


def request(folder, texts=TEXTS, prompts=PROMPTS) -> ScoreRequest:
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    mapper = OffsetMapper(tokenizer)
    ids = [tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] for text in texts]
    said = [mapper(row) for row in ids]
    assert [text for text, _ in said] == list(texts)
    return ScoreRequest(
        prompts=list(prompts),
        completions=list(texts),
        prompt_ids=[tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts],
        completion_ids=ids,
        offsets=[offsets for _, offsets in said],
        finish_reasons=["stop"] * len(texts),
        uids=[f"u{i}" for i in range(len(texts))],
        columns={},
    )


def take(batch: ScoreRequest, rows: list[int]) -> ScoreRequest:
    names = ("prompts", "completions", "prompt_ids", "completion_ids", "offsets", "finish_reasons", "uids")
    return ScoreRequest(**{name: [getattr(batch, name)[i] for i in rows] for name in names}, columns={})


def made(kind, **options) -> Component:
    component = Component("m", kind, options)
    component.setup("cpu")
    return component


def rewards(component: Component, batch: ScoreRequest) -> list[np.ndarray]:
    answers = score_components([component], batch)["m"]
    assert not [a for a in answers if isinstance(a, RewardFault)], answers
    return [placed for placed, _ in answers]


def alone(component: Component, batch: ScoreRequest) -> None:
    """The same in any company, in any order, beside longer and shorter ones."""
    together = rewards(component, batch)
    for order in ([2, 0, 1], [1], [0, 0, 2]):
        chosen = take(batch, order)
        chosen = ScoreRequest(**(vars(chosen) | {"uids": [f"v{i}" for i in range(len(order))]}))
        for i, got in zip(order, rewards(component, chosen), strict=True):
            np.testing.assert_allclose(got, together[i], rtol=0, atol=1e-5)


@torch.no_grad()
def slow_logprobs(path, batch, i) -> tuple[list[float], list[float]]:
    """log p and entropy of each response token, by a forward for every prefix."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids, logprobs, entropies = batch.prompt_ids[i].tolist(), [], []
    for token in batch.completion_ids[i].tolist():
        logp = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        logprobs.append(float(logp[token]))
        entropies.append(float(-(logp.exp() * logp).sum()))
        ids = [*ids, token]
    return logprobs, entropies


def test_fluency_is_the_log_prob_of_each_token_plus_the_entropy_it_was_drawn_with(folder):
    batch, path = request(folder), str(folder / "reference")
    centred, plain = made(Fluency, model=path, batch_size=2), made(Fluency, model=path, center=-1.5)
    for i, (a, b) in enumerate(zip(rewards(centred, batch), rewards(plain, batch), strict=True)):
        logprobs, entropies = slow_logprobs(path, batch, i)
        np.testing.assert_allclose(a, np.add(logprobs, entropies), atol=1e-5)
        np.testing.assert_allclose(b, np.add(logprobs, 1.5), atol=1e-5)
    alone(centred, batch)


def test_the_log_ratio_is_scaled_and_clipped(folder):
    batch, model, reference = request(folder), str(folder / "policy"), str(folder / "reference")
    ratio = made(LogRatio, model=model, reference=reference, scale=0.5)
    wanted = [
        0.5 * np.subtract(slow_logprobs(model, batch, i)[0], slow_logprobs(reference, batch, i)[0]) for i in range(3)
    ]
    for got, want in zip(rewards(ratio, batch), wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    bound = float(np.median(np.abs(np.concatenate(wanted))))
    clipped = made(LogRatio, model=model, reference=reference, scale=0.5, clip=bound)
    for got, want in zip(rewards(clipped, batch), wanted, strict=True):
        np.testing.assert_allclose(got, np.clip(want, -bound, bound), atol=1e-5)
    assert (np.abs(np.concatenate(wanted)) > bound).any()
    alone(ratio, batch)


@torch.no_grad()
def slow_scores(path, rows: list[list[int]]) -> list[float]:
    """The model's own score of each list of ids, one forward each."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    model.config.pad_token_id = (
        None  # which is the stop token here: transformers would take the end of a row for padding
    )
    return [float(model(torch.tensor([ids])).logits[0, 0]) for ids in rows]


class TestPrefixDelta:
    @pytest.mark.parametrize("subtract", [True, False])
    def test_it_is_the_difference_of_the_scores_of_prefixes_and_telescopes_exactly(self, folder, subtract):
        batch, path = request(folder), str(folder / "causal")
        component = made(PrefixDelta, model=path, policy_tokenizer=str(folder / "policy"), subtract_prompt=subtract)
        for i, got in enumerate(rewards(component, batch)):
            prompt, response = batch.prompt_ids[i].tolist(), batch.completion_ids[i].tolist()
            scores = slow_scores(path, [[*prompt, *response[:t]] for t in range(len(response) + 1)])
            want = np.diff(scores)
            want[0] += 0 if subtract else scores[0]
            np.testing.assert_allclose(got, want, atol=1e-4)
            assert math.fsum(got) == pytest.approx(scores[-1] - (scores[0] if subtract else 0), abs=1e-4)
            assert np.abs(want).max() > 1e-3  # not all the same by accident
        alone(component, batch)

    def test_the_sum_is_the_score_of_the_same_forward_to_the_last_bit(self, folder):
        batch = request(folder)
        component = made(PrefixDelta, model=str(folder / "causal"), same_tokenizer=True, subtract_prompt=False)
        by_sentence = made(
            PrefixDelta,
            model=str(folder / "causal"),
            same_tokenizer=True,
            subtract_prompt=False,
            granularity="sentence",
        )
        for a, b in zip(rewards(component, batch), rewards(by_sentence, batch), strict=True):
            assert math.fsum(a) == math.fsum(b)

    def test_another_tokenizer_is_mapped_by_characters(self, folder):
        """A model of single characters: the reward of a token is the difference over its characters."""
        texts, path = ["h\u00e9 the \U0001f600 cat.", "mat", "a"], str(folder / "causal-letters")
        batch = request(folder, texts)
        component = made(PrefixDelta, model=path, policy_tokenizer=str(folder / "policy"))
        tokenizer = AutoTokenizer.from_pretrained(path)
        for i, got in enumerate(rewards(component, batch)):
            prompt = tokenizer.encode(PROMPTS[i], add_special_tokens=False)
            letters = [tokenizer.encode(c, add_special_tokens=False)[0] for c in texts[i]]
            scores = slow_scores(path, [[*prompt, *letters[:n]] for n in range(len(letters) + 1)])
            owners = [max(t for t, (a, b) in enumerate(batch.offsets[i]) if a <= n < b) for n in range(len(letters))]
            want = np.zeros(len(got))
            for n, owner in enumerate(owners):
                want[owner] += scores[n + 1] - scores[n]
            np.testing.assert_allclose(got, want, atol=1e-4)
            assert math.fsum(got) == pytest.approx(scores[-1] - scores[0], abs=1e-4)
        alone(component, batch)

    def test_a_model_that_reads_both_ways_is_asked_sentence_by_sentence(self, folder):
        batch, path = request(folder), str(folder / "both-ways")
        options = {"model": path, "same_tokenizer": False}
        with pytest.raises(UserError, match="reads both ways.*granularity: sentence"):
            made(PrefixDelta, **options)
        component = made(PrefixDelta, **options, granularity="sentence")
        tokenizer = AutoTokenizer.from_pretrained(path)
        for i, got in enumerate(rewards(component, batch)):
            ends = sentence_ends(TEXTS[i])
            rows = [tokenizer.encode(PROMPTS[i] + TEXTS[i][:end]) for end in (0, *ends)]
            scores = slow_scores(path, rows)
            for k, end in enumerate(ends):
                inside = [
                    t for t, (a, b) in enumerate(batch.offsets[i]) if a < b and (ends[k - 1] if k else 0) < b <= end
                ]
                assert got[inside].sum() == pytest.approx(scores[k + 1] - scores[k], abs=1e-5)
        alone(component, batch)

    def test_a_vocabulary_that_differs_is_not_taken_for_the_policys(self, folder):
        component = made(PrefixDelta, model=str(folder / "causal-letters"), same_tokenizer=True, subtract_prompt=False)
        (fault, *_) = score_components([component], request(folder))["m"]
        assert isinstance(fault, RewardFault) and "tokenizer" in str(fault) and "sample u0" in str(fault)
        with pytest.raises(UserError, match="it is not guessed"):
            Component("m", PrefixDelta, {"model": "x"})


class TestTokenClassifier:
    def test_each_token_has_the_logit_of_the_model_at_it(self, folder):
        batch, path = request(folder), str(folder / "tokens")
        component = made(TokenClassifier, model=path, same_tokenizer=True)
        model = AutoModelForTokenClassification.from_pretrained(path).eval()
        for i, got in enumerate(rewards(component, batch)):
            prompt, response = batch.prompt_ids[i].tolist(), batch.completion_ids[i].tolist()
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *response]])).logits[0, :, 0]
            np.testing.assert_allclose(got, logits[len(prompt) :].numpy(), atol=1e-5)
        alone(component, batch)


def test_prefix_rewards_do_not_look_ahead(folder):
    """A causal model's differences of the first tokens stay when later tokens change."""
    texts = ["the cat sat on the mat", "the cat sat by a dog", "the cat"]
    batch = request(folder, texts, ["the mat"] * 3)
    first, second, _ = rewards(made(PrefixDelta, model=str(folder / "causal"), same_tokenizer=True), batch)
    same = next(t for t, (a, b) in enumerate(zip(*map(list, batch.completion_ids[:2]), strict=False)) if a != b)
    assert same >= 2
    np.testing.assert_allclose(first[:same], second[:same], atol=1e-5)
    assert not np.allclose(first[same], second[same], atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (Fluency, {"model": ""}, "model is ''"),
        (Fluency, {"model": "m", "batch_size": 0}, "batch_size is 0"),
        (Fluency, {"model": "m", "center": "mean"}, "center is 'mean'"),
        (LogRatio, {"model": "m", "reference": "r", "clip": -1}, "clip is"),
        (PrefixDelta, {"model": "m", "same_tokenizer": True, "granularity": "word"}, "granularity is 'word'"),
        (TokenClassifier, {"model": "m", "same_tokenizer": True, "minus": "bad"}, "without a label"),
    ],
)
def test_options_that_cannot_be_are_named(kind, options, says):
    with pytest.raises(UserError, match=says):
        Component("m", kind, options)


def test_a_prompt_beyond_the_positions_is_a_fault_of_its_sample(folder):
    batch = request(folder, ["the cat", "the cat sat " * 400, "a dog"])
    first, second, third = score_components([made(Fluency, model=str(folder / "reference"))], batch)["m"]
    assert isinstance(second, RewardFault) and "reads at most" in str(second)
    assert not isinstance(first, RewardFault) and not isinstance(third, RewardFault)
