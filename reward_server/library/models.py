"""Rewards that a model gives token by token: fluency, a reward model made dense, a classifier, a DPO log-ratio.

Where the tokens of the model are those of the policy, the ids are read as they were sampled and each token has its own
number. Where they are not, the model reads the text and its numbers come back as spans of characters. Which of the two
it is, an option says or a comparison of both vocabularies decides; nothing is guessed.

Rows are padded on the right with an attention mask, longest first, in batches of `batch_size`. A sample's numbers do
not depend on what else is in its batch beyond rounding (1e-5 in float32); with `batch_size: 1` not even in their bits.

Legend: B samples, P prompt tokens, T response tokens, N tokens that the model reads, V vocabulary. Natural logarithms.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from core.faults import RewardFault
from reward_server.components import ScoreRequest
from reward_server.placing import Span
from reward_server.texts import Messages

if TYPE_CHECKING:
    from torch import Tensor

Entry = float | list[float] | list[Span] | None | RewardFault
Range = tuple[int, int]  # characters [start, end) of the completion

_DTYPES = ("float32", "bfloat16", "float16", "float64")


# ------------------------------------------------------------------------------------------------- the components


class Fluency:
    """log p(y_t | x, y_<t) of each response token under a language model with the policy's tokenizer, in nats.

    `center` keeps length from being paid or fined. "entropy" adds the entropy H of the model's own next-token
    distribution: log p + H has mean zero over what the model itself would write, in every state (the centred surprisal
    of locally typical sampling, Meister et al. 2023, with its sign). A number is subtracted from every log-prob: then
    text that the model finds easy, a repetition say, earns by the token.

    Errors: an id that the model has no embedding for, and a text that its tokenizer reads otherwise than the policy's,
    is a RewardFault of that sample; `policy_tokenizer` has both vocabularies compared at setup.
    """

    def __init__(
        self,
        model: str,
        batch_size: int = 8,
        center: float | str = "entropy",
        policy_tokenizer: str | None = None,
        max_tokens: int | None = None,
        dtype: str = "float32",
    ) -> None:
        if center != "entropy":
            center = _number("center", center, "a number of nats, or entropy")
        self._center = center
        self._options = _Options(model, batch_size, dtype, max_tokens)
        self._policy_tokenizer = policy_tokenizer
        self._show: Callable[[str, Tensor, Tensor], None] | None = None

    def setup(self, device: str) -> None:
        """Loads the model. Raises ValueError where its weights or its vocabulary do not fit."""
        self._loaded = _load("AutoModelForCausalLM", self._options, device)
        _demand_same_tokenizer(self._loaded, self._policy_tokenizer)

    def reads(self, model: str, dtype: str) -> bool:
        """Whether its numbers are those of that model in that dtype."""
        return (self._options.model, self._options.dtype) == (model, dtype)

    def show_logits(self, to: "Callable[[str, Tensor, Tensor], None]") -> None:
        """Have each `score` call `to` with the uid of each sample it reads, the logits [T, V] of the response, and its
        ids [T]: the reference of the policy, out of the same forward."""
        self._show = to

    def score(self, batch: ScoreRequest) -> list[Entry]:
        """B entries, each T floats."""
        entropic, show = self._center == "entropy", self._show

        def entry(logprobs: list[float], entropies: list[float]) -> Entry:
            if entropic:
                return [a + b for a, b in zip(logprobs, entropies, strict=True)]
            return [logprob - self._center for logprob in logprobs]

        rows, entries = _prepared(batch, lambda i: _ids_row(self._loaded, batch, i, needs_prompt=True))
        also = None if show is None else lambda i, logits, ids: show(batch.uids[i], logits, ids)
        for i, (logprobs, entropies) in _token_logprobs(self._loaded, rows, with_entropy=entropic, also=also):
            entries[i] = entry(logprobs, entropies)
        return entries

    def close(self) -> None:
        """Lets go of the model and of its memory on the device."""
        _release(self)


class LogRatio:
    """scale * (log pi(y_t | s_t) - log pi_ref(y_t | s_t)): what a DPO-trained model has learnt, token by token.

    The implicit reward beta log(pi / pi_ref) of DPO (Rafailov et al. 2023) is that of single tokens, up to a potential
    ("From r to Q*", Rafailov et al. 2024), and PPO on it token by token is RTO (Zhong et al. 2024). `scale` is beta.
    `clip` c, on what is scaled, bounds each token to [-c, c]: one token that the reference holds for impossible
    would otherwise outweigh the response. Both models have the policy's tokenizer; errors are those of `Fluency`.
    """

    def __init__(
        self,
        model: str,
        reference: str,
        scale: float = 1.0,
        clip: float | None = None,
        batch_size: int = 8,
        policy_tokenizer: str | None = None,
        max_tokens: int | None = None,
        dtype: str = "float32",
    ) -> None:
        self._scale = _number("scale", scale, "a number, the beta of DPO")
        self._clip = None if clip is None else _number("clip", clip, "a number above 0, or null for none")
        if self._clip is not None and self._clip <= 0:
            raise ValueError(f"clip is {clip!r}; allowed: a number above 0, or null for none")
        self._options = _Options(model, batch_size, dtype, max_tokens)
        self._reference_options = _Options(reference, batch_size, dtype, max_tokens, name="reference")
        self._policy_tokenizer = policy_tokenizer

    def setup(self, device: str) -> None:
        """Loads both models. Raises ValueError where weights or a vocabulary do not fit."""
        self._loaded = _load("AutoModelForCausalLM", self._options, device)
        self._reference = _load("AutoModelForCausalLM", self._reference_options, device)
        for loaded in (self._loaded, self._reference):
            _demand_same_tokenizer(loaded, self._policy_tokenizer)

    def score(self, batch: ScoreRequest) -> list[Entry]:
        """B entries, each T floats."""

        def row(i: int) -> "_Row":
            _ids_row(self._reference, batch, i)  # its vocabulary and its length bind as well
            return _ids_row(self._loaded, batch, i, needs_prompt=True)

        rows, entries = _prepared(batch, row)
        reference = {i: logprobs for i, (logprobs, *_) in _token_logprobs(self._reference, rows)}
        for i, (logprobs, *_) in _token_logprobs(self._loaded, rows):
            ratios = [self._scale * (a - b) for a, b in zip(logprobs, reference[i], strict=True)]
            c = math.inf if self._clip is None else self._clip
            entries[i] = [min(max(ratio, -c), c) for ratio in ratios]
        return entries

    def close(self) -> None:
        """Lets go of both models and of their memory on the device."""
        _release(self)


class PrefixDelta:
    """A sequence reward model made dense: r_t = s_t - s_(t-1), where s_t is its score of the response up to token t.

    s_0 is the score of the prompt alone. These differences are potential-based shaping with the model's score as the
    potential and gamma 1 (Ng, Harada & Russell 1999, theorem 1): the best policy is that of s_T paid at the end. The
    entries of a sample sum (`math.fsum`, exactly, as float64) to

        s_T - s_0    with `subtract_prompt: true`, the default: s_0 is the same for every answer to a prompt
        s_T          with `subtract_prompt: false`: s_0 is paid with the first token (or span)

    `granularity: token`: one difference per token of the reward model, for one forward per response. It needs a causal
    model whose score is a head on the state of the last token; both are measured at setup. With the policy's tokenizer
    the entry is T floats, with another one a Span for each of its tokens; a token without characters of its own (an end
    of turn, a byte inside a character's space) counts for the one before it.

    `granularity: sentence`: differences between the ends of sentences, as a Span for each sentence. A causal model
    still needs one forward; one that reads both ways one forward per sentence.

    Tokenizer, one of the two must be given: `policy_tokenizer`, the path of the policy's, whose vocabulary is compared
    (the ids are shared if each of its tokens has the same id in the reward model), or `same_tokenizer: true | false`.

    A model with another tokenizer reads: for a prompt that is text, prompt + `separator` + completion with the special
    tokens that its tokenizer adds; for messages, its chat template, end of turn included; without one, the contents of
    the messages joined by `separator` (default: a line break; none for text). The end of the turn is part of every
    prefix of a model that reads both ways, and comes after the last token for a causal one. An empty prompt scores 0.

    Errors: a RewardFault of the sample for more tokens than the model has positions (`max_tokens`), ids outside its
    vocabulary, and a chat template that changes the text; ValueError at setup for all else. Nothing is truncated.
    """

    def __init__(
        self,
        model: str,
        granularity: str = "token",
        batch_size: int = 8,
        subtract_prompt: bool = True,
        policy_tokenizer: str | None = None,
        same_tokenizer: bool | None = None,
        separator: str | None = None,
        max_tokens: int | None = None,
        dtype: str = "float32",
    ) -> None:
        if granularity not in ("token", "sentence"):
            raise ValueError(f"granularity is {granularity!r}; allowed: token, sentence")
        if not isinstance(subtract_prompt, bool):
            raise ValueError(f"subtract_prompt is {subtract_prompt!r}; allowed: true, false")
        self._granularity, self._subtract_prompt = granularity, subtract_prompt
        self._options = _Options(model, batch_size, dtype, max_tokens)
        self._reading = _Reading(policy_tokenizer, same_tokenizer, separator)

    def setup(self, device: str) -> None:
        """Loads the model and measures how it reads. Raises ValueError where it cannot be used as asked."""
        self._loaded = _load("AutoModelForSequenceClassification", self._options, device)
        path, labels = self._loaded.path, self._loaded.net.config.num_labels
        if labels != 1:
            raise ValueError(f"{path} has {labels} labels; a reward model has one (num_labels 1)")
        self._reads_ids = self._reading.decide(self._loaded)
        self.causal = _is_causal(self._loaded)
        self._head = _score_head(self._loaded) if self.causal else None
        if self._granularity == "token" and self._head is None:
            why = "its score is no head on the last token" if self.causal else "it reads both ways"
            raise ValueError(
                f"{path}: {why}, so a prefix needs a forward of its own; set granularity: sentence, one for each"
            )

    def score(self, batch: ScoreRequest) -> list[Entry]:
        """B entries: T floats or Spans; a float for a completion without characters that is scored by spans."""
        score = self._score_by_forwards if self._head is None else self._score_in_one_forward
        return score(batch)

    def close(self) -> None:
        """Lets go of the model and of its memory on the device."""
        self._head = None
        _release(self)

    def _score_in_one_forward(self, batch: ScoreRequest) -> list[Entry]:
        by_token = self._granularity == "token"

        def row(i: int) -> _Row:
            if self._reads_ids:
                return _ids_row(self._loaded, batch, i)
            return _text_row(self._loaded, self._reading.separator, batch, i)

        rows, entries = _prepared(batch, row)
        for i, scores in _position_scores(self._loaded, self._head, rows):  # N float64
            start = rows[i].start
            before = scores[start - 1] if start else 0.0
            parts = self._differences([before, *scores[start:]])
            if by_token and self._reads_ids:
                entries[i] = parts
                continue
            spans = _merged(rows[i].ranges, parts)
            if not by_token:
                spans = _by_sentence(spans, _text(batch.completions[i]))
            entries[i] = _entry(spans, self._total(before, scores[-1]))
        return entries

    def _score_by_forwards(self, batch: ScoreRequest) -> list[Entry]:
        def prefixes(i: int) -> tuple[list[int], list[list[int]]]:
            text = _text(batch.completions[i])
            ends = sentence_ends(text)
            if self._reads_ids:
                return _id_prefixes(_ids_row(self._loaded, batch, i, needs_prompt=True), ends)
            reader = _TextReader(self._loaded.tokenizer, self._reading.separator)
            read = [reader.ids(batch.prompts[i], text[:end]) for end in (0, *ends)]
            for ids in read:
                _check_ids(self._loaded, ids)
            return ends, read

        wanted, entries = _prepared(batch, prefixes)
        # Every prefix of every sample is a row of its own: a batch is full even where responses have few sentences.
        keys = [(i, k) for i, (_, read) in wanted.items() for k in range(len(read))]
        rows = {key: _Row(wanted[key[0]][1][key[1]], 0, []) for key in keys}
        scores = dict(_whole_scores(self._loaded, rows))
        for i, (ends, read) in wanted.items():
            values = [scores[i, k] for k in range(len(read))]
            starts = [0, *ends][: len(ends)]
            parts = self._differences(values) if ends else []
            spans = [Span(*where) for where in zip(starts, ends, parts, strict=True)]
            entries[i] = _entry(spans, self._total(values[0], values[-1]))
        return entries

    def _total(self, before: float, last: float) -> float:
        return last - before if self._subtract_prompt else last

    def _differences(self, scores: list[float]) -> list[float]:
        """s_0 .. s_n -> n differences whose `math.fsum` is the total."""
        parts = [b - a for a, b in zip(scores, scores[1:], strict=False)]
        if parts and not self._subtract_prompt:
            parts[0] = scores[1]
        return _conserved(parts, self._total(scores[0], scores[-1]))


class TokenClassifier:
    """The value that a token-classification reward model gives to each token.

    A model with one label answers its logit. With several, `label` names the one that is paid and `minus` those (one
    name or a list) that are fined; `value` says in what:

        prob       p(label) - sum of p(minus)                     default; in [-1, 1]
        logprob    log p(label) - log sum of p(minus)             without `minus`: log p(label), never above 0

    The value belongs to the token that the model has just read. With the policy's tokenizer the entry is T floats; with
    another one a Span for each token of the model that has characters: special tokens are not paid. Tokenizer options,
    what is read, and errors: as for `PrefixDelta`. Source: token-level reward models, e.g. Yoon et al. 2024 (TLCR,
    p(positive) - p(negative) of each token).
    """

    def __init__(
        self,
        model: str,
        label: str | None = None,
        minus: str | Sequence[str] = (),
        value: str = "prob",
        batch_size: int = 8,
        policy_tokenizer: str | None = None,
        same_tokenizer: bool | None = None,
        separator: str | None = None,
        max_tokens: int | None = None,
        dtype: str = "float32",
    ) -> None:
        if value not in ("prob", "logprob"):
            raise ValueError(f"value is {value!r}; allowed: prob, logprob")
        self._minus = [minus] if isinstance(minus, str) else list(minus)
        if label is None and self._minus:
            raise ValueError(f"minus is {minus!r} without a label; name the label that is paid")
        if label in self._minus:
            raise ValueError(f"minus holds {label!r}, which is the label that is paid")
        self._label, self._value = label, value
        self._options = _Options(model, batch_size, dtype, max_tokens)
        self._reading = _Reading(policy_tokenizer, same_tokenizer, separator)

    def setup(self, device: str) -> None:
        """Loads the model. Raises ValueError where labels, weights or the vocabulary do not fit."""
        self._loaded = _load("AutoModelForTokenClassification", self._options, device)
        config, path = self._loaded.net.config, self._loaded.path
        if config.num_labels == 1 and self._label is not None:
            raise ValueError(f"{path} has one label, whose logit is the reward; leave out label, {self._label!r}")
        there = ", ".join(config.label2id)
        if config.num_labels > 1 and self._label is None:
            raise ValueError(f"{path} has {config.num_labels} labels: say which is paid, label: one of {there}")
        for name in [] if self._label is None else [self._label, *self._minus]:
            if name not in config.label2id:
                raise ValueError(f"{path} has no label {name!r}; there is {there}")
        self._reads_ids = self._reading.decide(self._loaded)

    def score(self, batch: ScoreRequest) -> list[Entry]:
        """B entries: T floats or Spans, [] where no token of the model has characters."""

        def row(i: int) -> _Row:
            if self._reads_ids:
                return _ids_row(self._loaded, batch, i)
            return _text_row(self._loaded, self._reading.separator, batch, i)

        rows, entries = _prepared(batch, row)
        for i, logits in _forward(self._loaded, self._loaded.net, rows, lambda out: out.logits):  # [N, labels]
            values = self._values(logits[rows[i].start :])
            if self._reads_ids:
                entries[i] = values
            else:
                ranged = zip(rows[i].ranges, values, strict=True)
                entries[i] = [Span(start, end, value) for (start, end), value in ranged if start < end]
        return entries

    def close(self) -> None:
        """Lets go of the model and of its memory on the device."""
        _release(self)

    def _values(self, logits: "Tensor") -> list[float]:
        """[T, labels] fp32 or wider -> T values."""
        if self._label is None:
            return logits[:, 0].double().tolist()
        label2id = self._loaded.net.config.label2id
        logp = logits.log_softmax(-1)
        paid = logp[:, label2id[self._label]]
        fined = logp[:, [label2id[name] for name in self._minus]]
        if self._value == "prob":
            return (paid.exp() - fined.exp().sum(-1)).double().tolist()
        return (paid - fined.logsumexp(-1) if self._minus else paid).double().tolist()


# -------------------------------------------------------------------------------------------- options, each checked


@dataclass(frozen=True)
class _Options:
    """What every model here takes. Raises ValueError, in one line, for what it cannot be."""

    model: str
    batch_size: int
    dtype: str
    max_tokens: int | None
    name: str = "model"

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"{self.name} is {self.model!r}; allowed: the folder or hub id of a model")
        for name in ("batch_size", "max_tokens"):
            value = getattr(self, name)
            optional = name == "max_tokens" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; allowed: a whole number of at least 1")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {', '.join(_DTYPES)}")


@dataclass(frozen=True)
class _Reading:
    """Whether a model reads the ids of the policy or the text. Raises ValueError unless that is said, once."""

    policy_tokenizer: str | None
    same_tokenizer: bool | None
    separator: str | None

    def __post_init__(self) -> None:
        if (self.policy_tokenizer is None) == (self.same_tokenizer is None):
            raise ValueError(
                "give either policy_tokenizer, the path of the policy's, to be compared with the model's, or"
                " same_tokenizer: true | false; it is not guessed whether the model can read the policy's ids"
            )
        if self.same_tokenizer is not None and not isinstance(self.same_tokenizer, bool):
            raise ValueError(f"same_tokenizer is {self.same_tokenizer!r}; allowed: true, false")
        if self.separator is not None and not isinstance(self.separator, str):
            raise ValueError(f"separator is {self.separator!r}; allowed: text between prompt and completion")

    def decide(self, loaded: "_Loaded") -> bool:
        """True: the ids; False: the text, for which the model must have a fast tokenizer."""
        if self.policy_tokenizer is not None:
            same = not _differing(loaded, self.policy_tokenizer)
        else:
            same = self.same_tokenizer
        if not same and not getattr(loaded.tokenizer, "is_fast", False):
            raise ValueError(
                f"{loaded.path} has no fast tokenizer (tokenizer.json): without one it is not known which characters"
                " its tokens stand for"
            )
        return same


def _number(name: str, value: Any, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")
    return float(value)


# ------------------------------------------------------------------------------------------- a model on its device


@dataclass(frozen=True)
class _Loaded:
    path: str
    net: Any  # PreTrainedModel in eval mode
    tokenizer: Any  # of the model's folder, None where it has none
    device: str
    batch_size: int
    vocabulary: int  # rows of the embedding
    max_tokens: int | None  # None: no limit is known


def _load(auto: str, options: _Options, device: str) -> _Loaded:
    """The model `auto`.from_pretrained(options.model), on `device`.

    Raises ValueError for weights that leave a layer out, which transformers would fill with random numbers.
    """
    import torch
    import transformers

    net, found = getattr(transformers, auto).from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{options.model}: the weights have no {missing[0]}{more}, which would be random")
    if getattr(net.config, "is_encoder_decoder", False) or net.base_model is net:
        raise ValueError(f"{options.model} is no single stack of layers with a head; wanted is a decoder or an encoder")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    except (OSError, ValueError, KeyError):  # a folder of weights alone; who needs its tokenizer says so
        tokenizer = None
    return _Loaded(
        path=options.model,
        net=net.to(device).eval(),
        tokenizer=tokenizer,
        device=device,
        batch_size=options.batch_size,
        vocabulary=net.get_input_embeddings().num_embeddings,
        max_tokens=options.max_tokens or _positions(net),
    )


def _positions(net: Any) -> int | None:
    """How many positions a model has: beyond them GPT-2's lookup ends a CUDA context, and rotary ones are untrained."""
    limit = getattr(net.config.get_text_config(), "max_position_embeddings", None)
    embeddings = getattr(getattr(net.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(embeddings, "padding_idx", None)
    # RoBERTa numbers positions from padding_idx + 1.
    return limit - padding - 1 if limit and padding is not None else limit


def _release(component: Any) -> None:
    devices = {value.device for value in vars(component).values() if isinstance(value, _Loaded)}
    for name in [name for name, value in vars(component).items() if isinstance(value, _Loaded)]:
        delattr(component, name)
    if any(device.startswith("cuda") for device in devices):
        import torch

        torch.cuda.empty_cache()


def _differing(loaded: _Loaded, policy_tokenizer: str) -> str:
    """Empty where each token of the policy has the same id in the model, else the first that has not.

    The model may know more tokens: the policy never writes them. Raises ValueError without a tokenizer to compare, and
    where the ids are shared but the embedding is too small for them.
    """
    import transformers

    if loaded.tokenizer is None:
        raise ValueError(
            f"{loaded.path} has no tokenizer to compare with {policy_tokenizer}; put one into its folder or leave out"
            " policy_tokenizer"
        )
    theirs = loaded.tokenizer.get_vocab()
    ours = transformers.AutoTokenizer.from_pretrained(policy_tokenizer).get_vocab()
    for token, token_id in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != token_id:
            return f"{token!r} is id {token_id} in {policy_tokenizer} and {theirs.get(token)} in {loaded.path}"
    if (top := max(ours.values())) >= loaded.vocabulary:
        raise ValueError(f"{loaded.path} has {loaded.vocabulary} embeddings; the policy's tokenizer has id {top}")
    return ""


def _demand_same_tokenizer(loaded: _Loaded, policy_tokenizer: str | None) -> None:
    if policy_tokenizer is not None and (differing := _differing(loaded, policy_tokenizer)):
        raise ValueError(f"the tokenizer of the model must be that of the policy: {differing}")


def _is_causal(loaded: _Loaded) -> bool:
    """Whether no state depends on a later token: another last token, and nothing before it moves.

    Measured, since no entry of a config says it of every architecture. Both rows are in one batch, so that the same
    kernels compute them and what is masked adds exact zeros.
    """
    import torch

    ids = _probe(loaded)
    for other in ids[:-1]:
        rows = torch.tensor([ids, [*ids[:-1], other]], device=loaded.device)
        with torch.inference_mode():
            states = _call(loaded.net.base_model, rows, torch.ones_like(rows)).last_hidden_state.double()
        moved = (states[0] - states[1]).abs().amax(-1)  # [N]
        if moved[-1] > 0:  # else the two tokens share an embedding, as untrained ones may
            return bool(moved[:-1].max() <= 1e-6 * states.abs().max())
    raise ValueError(f"{loaded.path}: the state of the last token does not depend on the last token; is it trained?")


def _score_head(loaded: _Loaded) -> Any | None:
    """The module that maps a state to the score, if the score is that of the last token's state; measured too."""
    import torch

    net = loaded.net
    head = next((getattr(net, name) for name in ("score", "classifier") if hasattr(net, name)), None)
    rows = torch.tensor([_probe(loaded)], device=loaded.device)
    with torch.inference_mode():
        whole = _call(net, rows, torch.ones_like(rows)).logits
        try:
            last = head(_call(net.base_model, rows, torch.ones_like(rows)).last_hidden_state)[:, -1]
        except (TypeError, RuntimeError, IndexError):  # no head, or one that takes something else
            return None
    return head if last.shape == whole.shape and torch.allclose(last, whole, rtol=1e-3, atol=1e-5) else None


def _probe(loaded: _Loaded) -> list[int]:
    """8 different ids, none of them padding."""
    pad = _pad_id(loaded)
    ids = [token_id for token_id in range(loaded.vocabulary) if token_id != pad]
    return ids[:: max(1, len(ids) // 8)][:8]


def _pad_id(loaded: _Loaded) -> int | None:
    pad = loaded.net.config.get_text_config().pad_token_id
    return pad if pad is not None and 0 <= pad < loaded.vocabulary else None  # -1 in old Llama configs


# ------------------------------------------------------------------------------------------------ what a model reads


class _Row(NamedTuple):
    """What a model reads of one sample: `ids` [N]; from `start` on they are the response's, each with its range."""

    ids: list[int]
    start: int
    ranges: list[Range]  # [N - start], empty (a, a) for a token without characters of the completion


def _prepared(batch: ScoreRequest, prepare: Callable[[int], Any]) -> tuple[dict[int, Any], list[Entry]]:
    """`prepare(i)` of every sample that it works for, and B entries with the RewardFaults of the others."""
    prepared, entries = {}, [None] * len(batch)
    for i in range(len(batch)):
        try:
            prepared[i] = prepare(i)
        except RewardFault as fault:
            entries[i] = fault
    return prepared, entries


def _check_ids(loaded: _Loaded, ids: list[int]) -> None:
    """Raises RewardFault: on a CUDA device either would end the process, not the call."""
    if not ids:
        raise RewardFault(f"{loaded.path} has nothing to read: no tokens")
    for token_id in (min(ids), max(ids)):
        if not 0 <= token_id < loaded.vocabulary:
            raise RewardFault(
                f"id {token_id} is not in the vocabulary of {loaded.path} ({loaded.vocabulary}): it has another"
                " tokenizer than the policy"
            )
    if loaded.max_tokens is not None and len(ids) > loaded.max_tokens:
        raise RewardFault(
            f"{loaded.path} reads at most {loaded.max_tokens} tokens, prompt and response have {len(ids)}; nothing is"
            " cut: shorten rollout.max_new_tokens or the prompts, or raise the option max_tokens if it can do more"
        )


def _ids_row(loaded: _Loaded, batch: ScoreRequest, i: int, *, needs_prompt: bool = False) -> _Row:
    """The ids of the policy as they are. Raises RewardFault where the model's own tokenizer reads other text there."""
    prompt, response = batch.prompt_ids[i].tolist(), batch.completion_ids[i].tolist()
    if needs_prompt and not prompt:
        raise RewardFault("the prompt has no tokens: nothing comes before the first token that it could depend on")
    _check_ids(loaded, [*prompt, *response])
    if loaded.tokenizer is not None:
        text = loaded.tokenizer.decode(response, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text != _text(batch.completions[i]):
            raise RewardFault(
                f"the ids of the response are other text in {loaded.path}: its tokenizer is not that of the policy"
            )
    return _Row([*prompt, *response], len(prompt), [(int(a), int(b)) for a, b in batch.offsets[i]])


def _text_row(loaded: _Loaded, separator: str | None, batch: ScoreRequest, i: int) -> _Row:
    """Prompt and completion as the model's tokenizer cuts them."""
    reader = _TextReader(loaded.tokenizer, separator)
    row = reader.row(batch.prompts[i], _text(batch.completions[i]))
    _check_ids(loaded, row.ids)
    return row


def _text(completion: str | Messages) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _content(message: dict[str, Any]) -> str:
    content = message["content"]
    if not isinstance(content, str):
        raise RewardFault(f"a message has content of type {type(content).__name__}; only text can be scored here")
    return content


@dataclass(frozen=True)
class _TextReader:
    """Prompt and completion in the words of another tokenizer."""

    tokenizer: Any
    separator: str | None

    def ids(self, prompt: str | Messages, completion: str) -> list[int]:
        """The ids of all that is read."""
        return self.row(prompt, completion).ids

    def row(self, prompt: str | Messages, completion: str) -> _Row:
        """The ids, where those of the completion begin, and the characters of the completion that each stands for.

        A token across the border of prompt and completion is the completion's first.
        """
        before, body, after, special = self._parts(prompt, completion)
        encoded = self.tokenizer(
            before + body + after, add_special_tokens=special, return_offsets_mapping=True, verbose=False
        )
        p, n = len(before), len(body)
        lead = len(completion) - len(completion.lstrip()) if body != completion else 0
        offsets = encoded["offset_mapping"]
        # Special tokens that the tokenizer adds have (0, 0), wherever they stand.
        start = next((j for j, (a, b) in enumerate(offsets) if a < b and b > p), None)
        if start is None:  # nothing after the prompt has characters: what the tokenizer closes it with is not a reply
            start = len(offsets)
        ranges = []
        for a, b in offsets[start:]:
            a, b = max(a - p, 0), min(b - p, n)
            ranges.append((a + lead, b + lead) if a < b else (0, 0))
        return _Row(list(encoded["input_ids"]), start, ranges)

    def _parts(self, prompt: str | Messages, completion: str) -> tuple[str, str, str, bool]:
        """Text before, of and after the completion, and whether the tokenizer adds its special tokens."""
        if isinstance(prompt, str):
            return prompt + (self.separator or ""), completion, "", True
        if not getattr(self.tokenizer, "chat_template", None):
            separator = "\n" if self.separator is None else self.separator
            return "".join(_content(message) + separator for message in prompt), completion, "", True
        reply = {"role": "assistant", "content": completion}
        before = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        whole = self.tokenizer.apply_chat_template([*prompt, reply], tokenize=False)
        for body in (completion, completion.strip()):  # many templates strip what is said
            if whole.startswith(before + body):
                return before, body, whole[len(before + body) :], False
        raise RewardFault("the chat template of the model does not hold the completion as it is after the prompt")


def _id_prefixes(row: _Row, ends: list[int]) -> tuple[list[int], list[list[int]]]:
    """The ends of sentences that tokens tell apart, and the ids of the prompt and of each prefix that ends there.

    The last prefix has all tokens, those without characters included.
    """
    kept, read = [], [row.ids[: row.start]]
    for end in ends:
        reached = max((t for t, (a, b) in enumerate(row.ranges) if a < b and a < end), default=-1) + 1
        ids = row.ids if end == ends[-1] else row.ids[: row.start + reached]
        if kept and len(ids) == len(read[-1]):
            kept[-1] = end
        else:
            kept.append(end)
            read.append(ids)
    if not ends:
        read.append(row.ids)
    return kept, read


_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+[」』”’）]*|\n+")


def sentence_ends(text: str) -> list[int]:
    """Where sentences end, in characters, the end of the text last; [] for an empty text.

    A sentence ends with . ! ? … (and closing quotes and brackets) before white space, with 。！？, or with its line.
    Abbreviations are not known: "e.g. this" is two.
    """
    ends: list[int] = []
    for end in [*(found.end() for found in _SENTENCE_END.finditer(text)), len(text)]:
        if text[ends[-1] if ends else 0 : end].strip():  # white space alone is no sentence
            ends.append(end)
    return [*ends[:-1], len(text)] if text else []


# ------------------------------------------------------------------------------------------------------- forwards


def _batches(loaded: _Loaded, rows: dict[Any, _Row]) -> Iterator[tuple[list[Any], "Tensor", "Tensor"]]:
    """Keys, ids [b, N] and attention mask [b, N] of each batch: longest rows first, padded on the right.

    No position ids: on the right, every architecture's own (rotary, absolute, from the mask, from padding) are right.
    """
    import torch

    # transformers' own pooling finds the last token by the padding id.
    pad = _pad_id(loaded) or 0
    keys = sorted(rows, key=lambda key: (-len(rows[key].ids), key))
    for at in range(0, len(keys), loaded.batch_size):
        chunk = keys[at : at + loaded.batch_size]
        width = len(rows[chunk[0]].ids)
        ids = torch.full((len(chunk), width), pad, dtype=torch.int64)
        mask = torch.zeros((len(chunk), width), dtype=torch.int64)
        for r, key in enumerate(chunk):
            n = len(rows[key].ids)
            ids[r, :n] = torch.tensor(rows[key].ids)
            mask[r, :n] = 1
        yield chunk, ids.to(loaded.device), mask.to(loaded.device)


def _call(module: Any, ids: "Tensor", mask: "Tensor", **more: Any) -> Any:
    parameters = inspect.signature(module.forward).parameters
    if "use_cache" in parameters:
        more["use_cache"] = False
    more = {name: value for name, value in more.items() if name in parameters}
    return module(input_ids=ids, attention_mask=mask, **more)


def _forward(
    loaded: _Loaded, module: Any, rows: dict[Any, _Row], output: Callable[[Any], "Tensor"]
) -> Iterator[tuple[Any, "Tensor"]]:
    """For each row its part [N, ...] of `output` of the module, fp32 or wider."""
    import torch

    for chunk, ids, mask in _batches(loaded, rows):
        with torch.inference_mode():  # never around a yield: the mode would be the caller's too
            out = output(_call(module, ids, mask))
        for r, key in enumerate(chunk):
            yield key, _wide(out[r, : len(rows[key].ids)])


def _position_scores(loaded: _Loaded, head: Any, rows: dict[Any, _Row]) -> Iterator[tuple[Any, list[float]]]:
    """The score after each of the N tokens of a row, by one forward."""
    states = _forward(loaded, loaded.net.base_model, rows, lambda out: head(out.last_hidden_state))
    for key, scores in states:
        yield key, scores[:, 0].double().tolist()


def _whole_scores(loaded: _Loaded, rows: dict[Any, _Row]) -> Iterator[tuple[Any, float]]:
    """The model's own score of each row."""
    import torch

    single = _pad_id(loaded) is None  # its pooling could not tell padding from tokens
    for chunk, ids, mask in _batches(loaded, rows):
        parts = [(ids, mask)]
        if single:
            parts = [(ids[r : r + 1, :n], mask[r : r + 1, :n]) for r, n in enumerate(mask.sum(-1).tolist())]
        with torch.inference_mode():
            logits = torch.cat([_wide(_call(loaded.net, *part).logits) for part in parts])  # [b, 1]
        yield from zip(chunk, logits[:, 0].double().tolist(), strict=True)


def _token_logprobs(
    loaded: _Loaded,
    rows: dict[int, _Row],
    *,
    with_entropy: bool = False,
    also: "Callable[[int, Tensor, Tensor], None] | None" = None,
) -> Iterator[tuple[int, tuple[list[float], list[float]]]]:
    """For each row the T log-probs of its response tokens and, if wanted, the T entropies they were drawn with. `also`
    gets to see the number of the row, its logits [T, V] and ids [T].

    The logits of position N-1 score token N: those of response token t stand at start + t - 1.
    """
    import torch

    from core.logprobs import entropy_from_logits, logprobs_from_logits

    for chunk, ids, mask in _batches(loaded, rows):
        # Of the prompt, which is often the longer part, only the last position is needed: logits are wide.
        first = min(rows[key].start for key in chunk) - 1
        with torch.inference_mode():
            logits = _call(loaded.net, ids, mask, logits_to_keep=ids.shape[1] - first).logits
        skipped = ids.shape[1] - logits.shape[1]
        for r, key in enumerate(chunk):
            start, n = rows[key].start, len(rows[key].ids)
            these = logits[r, start - 1 - skipped : n - 1 - skipped]  # [T, V]; one row at a time is raised to fp32
            logprobs = logprobs_from_logits(these, ids[r, start:n]).double().tolist()
            entropies = entropy_from_logits(these).double().tolist() if with_entropy else []
            if also is not None:
                also(key, these, ids[r, start:n])
            yield key, (logprobs, entropies)


def _wide(values: "Tensor") -> "Tensor":
    return values if values.dtype.itemsize >= 4 else values.float()


# ------------------------------------------------------------------------------------- from numbers to an entry


def _conserved(parts: list[float], total: float) -> list[float]:
    """The same parts but for rounding, so that `math.fsum` of them is `total`: the last one takes the remainder.

    Where the last is too big to hold it, it goes on to the smallest of the others, which resolves it.
    """
    parts = list(parts)
    last = len(parts) - 1
    for i in [] if not parts else [last, *sorted(range(last), key=lambda i: abs(parts[i]))]:
        if math.fsum(parts) == total:
            break
        parts[i] = math.fsum([total, *(-part for k, part in enumerate(parts) if k != i)])
    return parts


def _merged(ranges: Sequence[Range], parts: Sequence[float]) -> list[Span]:
    """One Span for each range that has characters; the parts of empty ones join the one before, else the one after."""
    spans: list[tuple[Range, list[float]]] = []
    early: list[float] = []
    for (start, end), part in zip(ranges, parts, strict=True):
        if start < end:
            spans.append(((start, end), [*early, part]))
            early = []
        else:
            (spans[-1][1] if spans else early).append(part)
    return [Span(*where, math.fsum(held)) for where, held in spans]


def _by_sentence(spans: list[Span], text: str) -> list[Span]:
    """The spans of tokens summed up by the sentence that they end in."""
    starts_ends = list(zip([0, *(ends := sentence_ends(text))], ends, strict=False))
    grouped: dict[Range, list[float]] = {}
    for span in spans:
        where = next(where for where in starts_ends if span.end <= where[1])
        grouped.setdefault(where, []).append(span.score)
    return [Span(*where, math.fsum(scores)) for where, scores in grouped.items()]


def _entry(spans: list[Span], total: float) -> Entry:
    """The spans with their sum held to `total`; where there is no character to pay, the float that the last token gets.

    Adding up the parts of merged tokens has rounded, so the sum is made good once more.
    """
    if not spans:
        return total
    scores = _conserved([span.score for span in spans], total)
    return [span._replace(score=score) for span, score in zip(spans, scores, strict=True)]
