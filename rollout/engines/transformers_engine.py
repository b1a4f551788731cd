"""The embedded engine: a decode loop on any causal LM of transformers, with log-probs that are exact by construction.

Responses are written in slots (slots.py): when some have ended, the next requests take their places, a prompt is read
once for all its samples, and attention reads what is alive. A model that cannot be read so, which is asked when it is
loaded, writes all its requests side by side, with transformers' own cache and prompts padded on the left.

Legend: B requests, U prompts, P padded prompt width, V vocabulary, S slots. Lengths are recorded, never read off ids.

Nothing of the checkpoint's generation config reaches the sampling (no top_p, no penalties): only its stop ids are read.

With a value head the state before each token, which its logits are made of, is valued too. The state after the last
token of a response is read by no other step, so a response that is cut stays in its slot for one more.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache, GenerationConfig

from core.faults import UserError
from core.logprobs import logprobs_from_logits
from core.pretrained import load_causal_lm
from core.trajectory import PromptRequest
from core.weights import VALUE_HEAD, named_tensors
from rollout.engines import compiler
from rollout.engines.compiled import CompiledSteps
from rollout.engines.compiler import NotCompiled
from rollout.engines.decoder import Decoder, rotations_are_fixed, values_of
from rollout.engines.draw import CompiledDraw
from rollout.engines.engine import Begun, Generation
from rollout.engines.graphs import Graphs, OnCuda
from rollout.engines.packed import PackedLinears
from rollout.engines.responses import Responses
from rollout.engines.sampling import Filters, sample, sets_of
from rollout.engines.slots import ATTENTION, Prompts, Slots, Tokens
from rollout.stop_strings import StopStrings

GRAPHS_ON = ("cuda",)  # kinds of devices
READ_TOKENS, READ_LOGITS = 2**16, 2**10  # of one pass over texts


def stop_ids(model_path: str, tokenizer_eos: int | None) -> tuple[int, ...]:
    """Ids that end a response: all of the generation config, and the tokenizer's eos. Raises UserError if none."""
    try:
        configured = GenerationConfig.from_pretrained(model_path).eos_token_id
    except OSError:  # it has none, which is legal: transformers then goes by the model's own configuration
        configured = AutoConfig.from_pretrained(model_path).eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured]) | {tokenizer_eos}
    ids.discard(None)
    if not ids:
        raise UserError(
            f"model.path = {model_path}: neither generation_config.json nor the tokenizer names an eos token,"
            " so no response could ever end; set eos_token_id there"
        )
    return tuple(sorted(ids))


def _value_head(model: torch.nn.Module) -> torch.nn.Linear:
    """A head on what the output layer reads, in float32; zero until its weights come."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is None:
        raise UserError(
            f"rollout.emit_values = true: {type(model).__name__} has no output layer whose states a value head could"
            " read; leave it out"
        )
    head = torch.nn.Linear(weight.shape[1], 1, dtype=torch.float32, device=weight.device)
    for parameter in head.requires_grad_(False).parameters():
        torch.nn.init.zeros_(parameter)
    return head


def _fit(texts: list[np.ndarray], first: int, last: int) -> int:
    """The end of what is read in one pass, of the texts from `first` up to `last`: one, or as many as stay within
    READ_TOKENS padded tokens and READ_LOGITS rows of logits. Equal texts are read once."""
    different: set[bytes] = set()
    lengths: set[int] = set()
    for i in range(first, last):
        different.add(texts[i].tobytes())
        lengths.add(len(texts[i]))
        # Logits are made at each length that one of them ends at, for all of them.
        if i > first and (len(different) * max(lengths) > READ_TOKENS or len(different) * len(lengths) > READ_LOGITS):
            return i
    return last


class TransformersEngine:
    def __init__(
        self,
        model: torch.nn.Module,
        stop: tuple[int, ...],
        *,
        temperature: float,
        max_new_tokens: int,
        slots: int = 64,
        filters: Filters | None = None,
        stop_strings: StopStrings | None = None,
        values: bool = False,
        compiled: bool = True,
    ) -> None:
        """`slots`: most responses that are written side by side; no id depends on it. `stop`, `stop_strings`: ids and
        strings that end a response. `values`: a value head, whose weights come with those of the policy, says what it
        thinks of each state; such responses are written whole. `compiled`: what writes a token is, where it can be.

        Raises UserError for a value head on a model without an output layer of its own."""
        self.model = model.eval()
        self.temperature, self.max_new_tokens, self.slots = temperature, max_new_tokens, slots
        self.filters, self._stop_strings = filters, stop_strings
        self.device = next(model.parameters()).device
        self._stop = torch.tensor(stop, device=self.device)
        # Models without absolute or rotary positions (ALiBi) take none; they read the attention mask.
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._packed = PackedLinears(model)
        self._value_head = _value_head(model) if values else None
        self._room: Slots | None = None  # kept between calls: new memory is slow at its first touch
        self._decoder = self._graphs = self._compiled = None
        self.not_compiled: str | None = None  # why a decode step is not, as far as it could be
        self._compiled_draw = self._make_draw() if compiled else None
        self.own_forward = False  # whether a class that decoder.py knows is one that it does not compute
        if Decoder.fits(model):
            self._use_decoder(compiled)
        if self._decoder is None:
            self.in_slots = self._reads_slots()

    @classmethod
    def load(
        cls,
        path: str,
        stop: tuple[int, ...],
        *,
        dtype: str,
        device: str,
        temperature: float,
        max_new_tokens: int,
        slots: int = 64,
        filters: Filters | None = None,
        stop_strings: tuple[str, ...] = (),
        load_tokenizer: Callable[[], Any] | None = None,
        values: bool = False,
    ) -> "TransformersEngine":
        """`load_tokenizer` is asked only where there are stop strings."""
        model = load_causal_lm(path, getattr(torch, dtype)).to(device)
        strings = StopStrings(list(stop_strings), load_tokenizer()) if stop_strings else None
        settings = {"temperature": temperature, "max_new_tokens": max_new_tokens, "slots": slots}
        engine = cls(model, stop, **settings, filters=filters, stop_strings=strings, values=values)
        name = type(model).__name__  # Ray shows what is printed to whoever started the run
        if not engine.in_slots:
            print(f"{name} cannot be read in slots: responses are written side by side, slower, with the same ids")
        elif engine.own_forward:
            print(f"{name} of this transformers is not what decoder.py computes: its own forward writes, slower")
        if engine.not_compiled is not None:
            print(f"decode steps are not compiled as far as they could be, slower: {engine.not_compiled}")
        return engine

    def _use_decoder(self, compiled: bool) -> None:
        """Where it computes what the model does; and compiled, or recorded, where that does too."""
        try:
            self._decoder = Decoder(self.model, self._value_head)
        except AttributeError:  # of another transformers
            self.own_forward = True
            return
        if self.device.type in GRAPHS_ON and rotations_are_fixed(self.model):
            self._graphs = Graphs(self._decoder, OnCuda)
        elif compiled and CompiledSteps.fits(self.model):
            try:
                self._compiled = CompiledSteps(self.model, self._value_head)
            except NotCompiled as error:
                self._note_not_compiled(str(error))
        self.in_slots = self._reads_slots()
        if not self.in_slots and (self._graphs or self._compiled) is not None:
            recorded, self._graphs, self._compiled = self._graphs is not None, None, None
            self.in_slots = self._reads_slots()
            if self.in_slots and recorded:
                print("decode steps are launched one by one, slower: recorded as CUDA graphs they give other numbers")
            elif self.in_slots:
                self._note_not_compiled(f"{compiler.STEP.name}, compiled, fails or gives other numbers")
        if not self.in_slots:
            self._decoder, self.own_forward = None, True

    def _make_draw(self) -> CompiledDraw | None:
        if self.device.type != "cpu" or not CompiledDraw.fits(self.temperature):
            return None
        try:
            return CompiledDraw()
        except NotCompiled as error:
            self._note_not_compiled(str(error))
            return None

    def _note_not_compiled(self, why: str) -> None:
        if self.not_compiled != why:  # both parts may lack the same
            self.not_compiled = why if self.not_compiled is None else f"{self.not_compiled}; {why}"

    def live_tensors(self) -> dict[str, Tensor]:
        head = {} if self._value_head is None else dict(self._value_head.named_parameters(prefix=VALUE_HEAD))
        return named_tensors(self.model) | head

    def use_weights(self) -> None:
        """`generate` reads the very tensors that were written, or what it makes of them."""
        self._packed.drop()
        for steps in (self._decoder, self._compiled):
            if steps is not None:
                steps.drop()

    def rest(self) -> None:
        """Nothing: memory stays with its process."""

    @torch.inference_mode()
    def logprobs(self, prompt_ids: np.ndarray, response_ids: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(np.concatenate([prompt_ids, response_ids], axis=1)).to(self.device)
        n = response_ids.shape[1]
        logits = self.model(input_ids=ids, use_cache=False).logits[:, -n - 1 : -1]
        return logprobs_from_logits(logits, ids[:, -n:], self.temperature).float().cpu().numpy()

    def generate(
        self, requests: list[PromptRequest], begun: list[Begun | None] | None = None, most: int | None = None
    ) -> list[Generation]:
        """What `stream` gives, in the order of the requests."""
        return [generation for _, generation in sorted(self.stream(requests, begun, most), key=lambda pair: pair[0])]

    @torch.inference_mode()
    def stream(
        self, requests: list[PromptRequest], begun: list[Begun | None] | None = None, most: int | None = None
    ) -> Iterator[tuple[int, Generation]]:
        begun, filtered = begun or [None] * len(requests), self.filters is not None
        valued = self._value_head is not None
        assert not (valued and (most is not None or any(begun))), "responses with values are written whole"
        responses = Responses.of(
            requests, begun, self.max_new_tokens, self.device, filtered=filtered, most=most, valued=valued
        )
        texts = [  # that are read before the first token is written
            request.prompt_ids if start is None else np.concatenate([request.prompt_ids, start.response_ids])
            for request, start in zip(requests, begun, strict=True)
        ]
        if self.in_slots:
            longest = max(len(request.prompt_ids) for request in requests)
            with self._attention_over_slots():
                for ended in self._write_in_slots(texts, longest + self.max_new_tokens, responses):
                    yield from responses.generations(ended)
        else:
            for ended in self._write_side_by_side(texts, responses):
                yield from responses.generations(ended)

    # ------------------------------------------------------------------------------------------------------- in slots

    def _write_in_slots(self, texts: list[np.ndarray], room: int, out: Responses) -> Iterator[Tensor]:
        """Yields the requests that have ended after a token, [E]."""
        n_slots = min(self.slots, len(texts))
        slots = self._make_room(n_slots, room)
        # Of each slot in use, the first B: its request, the number of tokens written, its last token and its place.
        request, written, token, place = (torch.zeros(0, dtype=torch.long, device=self.device) for _ in range(4))
        waiting = 0  # the first request that has no slot yet
        few = max(1, n_slots // 8)  # places that are worth a pass over prompts
        while len(request) or waiting < len(texts):
            free = n_slots - len(request)
            if waiting < len(texts) and (free >= min(few, len(texts) - waiting) or not len(request)):
                last = _fit(texts, waiting, min(len(texts), waiting + free))
                entering = torch.arange(waiting, last, device=self.device)
                prompts = [texts[i] for i in entering.tolist()]
                logits, values, lengths = self._read_prompts(prompts, slots, len(request))
                first = self._sample(logits, values, entering, out.begun[entering], out)
                waiting += len(entering)
                request, token = torch.cat([request, entering]), torch.cat([token, first])
                written, place = torch.cat([written, out.begun[entering] + 1]), torch.cat([place, lengths])
            else:
                logits, values = self._next(token, place, slots)
                token = self._sample(logits, values, request, written, out)
                written, place = written + 1, place + 1
            stopped, ended = self._ends(token, request, written, out)
            if not bool(ended.any()):
                continue
            out.stopped[request[ended]] = stopped[ended]
            out.lengths[request[ended]] = torch.minimum(written[ended], out.limits[request[ended]])
            yield request[ended]
            # The slots in use stay the first ones: those behind move into the places of those that have ended.
            left = int((~ended).sum())
            gaps, movers = ended[:left].nonzero().squeeze(-1), left + (~ended[left:]).nonzero().squeeze(-1)
            if len(gaps):
                slots.move(movers, gaps, int(place[movers].max()))
                for x in (request, written, token, place):
                    x[gaps] = x[movers]
            request, written, token, place = (x[:left] for x in (request, written, token, place))

    def _sample(
        self, logits: Tensor, values: Tensor | None, request: Tensor, written: Tensor, out: Responses
    ) -> Tensor:
        random = out.random[request, written.clamp(max=out.steps - 1)]  # what is drawn behind a full one is left out
        token, logprob, kept = self._drawn(logits, random)
        out.write(request, written, token, logprob, kept, values)
        return token

    def _drawn(self, logits: Tensor, random: Tensor) -> tuple[Tensor, Tensor, list[np.ndarray] | None]:
        """As sampling.sample, with the kept ids of each row."""
        if self._compiled_draw is not None:
            return self._compiled_draw(logits, random, self.temperature, self.filters)
        token, logprob, keep = sample(logits, random, self.temperature, self.filters)
        return token, logprob, None if keep is None else sets_of(keep)

    def _ends(self, token: Tensor, request: Tensor, written: Tensor, out: Responses) -> tuple[Tensor, Tensor]:
        """[B] bool each: which requests `token`, the last of the `written` ones, ends; and which are done with."""
        if self._value_head is None:
            stopped = self._is_last(token, request, written, out)
            return stopped, stopped | (written == out.limits[request])
        done = written > out.limits[request]  # the value behind it is there
        stopped = self._is_last(token, request, written.clamp(max=out.steps), out) & ~done
        return stopped, stopped | done

    def _is_last(self, token: Tensor, request: Tensor, written: Tensor, out: Responses) -> Tensor:
        """[B] bool: whether `token`, the last of the `written` ones of its request, ends the response."""
        last = torch.isin(token, self._stop)
        if self._stop_strings is not None:
            ids = out.ids[request].cpu().numpy()
            counts = zip(ids, written.tolist(), out.turn[request].tolist(), strict=True)
            ends = [self._stop_strings.completed_by_last(x[:n], turn) for x, n, turn in counts]
            last |= torch.tensor(ends, device=self.device)
        return last

    def _read_prompts(
        self, prompts: list[np.ndarray], slots: Slots, first_slot: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Logits [B, V] behind each prompt, values [B] there, and their lengths [B]. They go to the slots from
        `first_slot` on."""
        numbers: dict[bytes, int] = {}
        of = torch.tensor([numbers.setdefault(x.tobytes(), len(numbers)) for x in prompts], device=self.device)
        different = [np.frombuffer(x, dtype=prompts[0].dtype) for x in numbers]
        lengths = torch.tensor([len(x) for x in different])
        ids = torch.zeros((len(different), int(lengths.max())), dtype=torch.long)
        for row, prompt in zip(ids, different, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)  # a copy: what Ray hands over is read-only
        ids, lengths = ids.to(self.device), lengths.to(self.device)
        into = torch.arange(first_slot, first_slot + len(of), device=self.device)
        ends, which = torch.unique(lengths - 1, return_inverse=True)
        places = torch.arange(ids.shape[1], device=self.device)[None].expand_as(ids)
        logits, values = self._read(
            input_ids=ids, position_ids=places, use_cache=False, step=Prompts(slots, into, of), logits_to_keep=ends
        )  # [U, ends, V], [U, ends]
        row = torch.arange(len(ids), device=self.device)
        return logits[row, which][of], None if values is None else values[row, which][of], lengths[of]

    def _next(self, token: Tensor, place: Tensor, slots: Slots) -> tuple[Tensor, Tensor | None]:
        """Logits [B, V] behind `token`, which stands at `place`, and values [B]."""
        if self._graphs is not None:
            return self._graphs.step(token, place, slots)
        if self._compiled is not None:
            return self._compiled.step(token, place, slots)
        if self._decoder is not None:
            return self._decoder.step(token, place, Tokens(slots, place))
        step = Tokens(slots, place)
        with self._packed.in_use():
            logits, values = self._read(
                input_ids=token[:, None], position_ids=place[:, None], use_cache=False, step=step, logits_to_keep=1
            )
        return logits[:, -1], None if values is None else values[:, -1]

    def _read(self, **inputs: Any) -> tuple[Tensor, Tensor | None]:
        """Logits [B, N, V] of the model's own forward, and values [B, N] of what its output layer reads."""
        if self._value_head is None:
            return self.model(**inputs).logits, None
        states: list[Tensor] = []
        handle = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: states.append(args[0]))
        try:
            logits = self.model(**inputs).logits
        finally:
            handle.remove()
        return logits, values_of(self._value_head, states[-1])

    @contextmanager
    def _attention_over_slots(self) -> Iterator[None]:
        """Only within the block: whoever calls the model otherwise means the attention that it has."""
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(ATTENTION)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def _make_room(self, n_slots: int, room: int) -> Slots:
        if self._room is None or self._room.n_slots < n_slots or self._room.room < room:
            self._room = None  # before the new one is made
            for steps in (self._graphs, self._compiled):
                if steps is not None:
                    steps.forget()
            self._room = Slots(n_slots, room)
        return self._room

    @torch.inference_mode()
    def _reads_slots(self) -> bool:
        """Whether the model computes the same with attention over slots."""
        if not self._takes_positions:
            return False
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        of = ((1, 8), (4, 9)) if self._compiled is None else ((1, 8), (4, 9), (2, 50), *[(3, 40)] * 13)
        texts = {ab: torch.arange(*ab) % vocabulary for ab in of}  # compiled code has parts for many rows and tokens
        logits = {ab: self.model(input_ids=r[None].to(self.device)).logits[0, -3:] for ab, r in texts.items()}
        rows, expected = [texts[ab] for ab in of], torch.stack([logits[ab] for ab in of])
        slots = Slots(len(rows), max(map(len, rows)))
        try:
            with self._attention_over_slots():
                logits, _, place = self._read_prompts([r[:-2].numpy() for r in rows], slots, 0)
                found = [logits]
                for i in (-2, -1):
                    token = torch.stack([r[i] for r in rows]).to(self.device)
                    found.append(self._next(token, place, slots)[0].clone())
                    place = place + 1
        except (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError, LookupError, MemoryError):
            return (
                False  # it does not hand `step` on, wants something that such attention has not, or is made otherwise
            )
        tolerance = 1e-4 if self.model.dtype == torch.float32 else 5e-2
        off = (torch.stack(found, dim=1) - expected).abs().max()
        return bool(off <= tolerance * expected.abs().max().clamp(min=1e-3))

    # --------------------------------------------------------------------------------------------------- side by side

    def _write_side_by_side(self, texts: list[np.ndarray], out: Responses) -> Iterator[Tensor]:
        """Yields the requests that have ended after a token, [E]."""
        ids, mask = self._pad_left(texts)  # [B, P]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        rows = torch.arange(len(texts), device=self.device)  # which request each row of the cache belongs to
        alive, written = torch.ones_like(rows, dtype=torch.bool), out.begun.clone()  # of each row
        while True:
            logits, values = self._forward(ids, mask, positions, cache)
            random = out.random[rows, written.clamp(max=out.steps - 1)]  # for what has ended it is drawn in vain
            token, logprob, kept = self._drawn(logits, random)
            if kept is not None:
                kept = [ids for ids, goes_on in zip(kept, alive.tolist(), strict=True) if goes_on]
            value = None if values is None else values[alive]
            out.write(rows[alive], written[alive], token[alive], logprob[alive], kept, value)
            written = written + 1
            stopped, ended = self._ends(token, rows, written, out)
            stopped = alive & stopped
            out.stopped[rows[stopped]], out.lengths[rows[stopped]] = True, written[stopped]
            left = alive & ~ended
            if not bool(torch.equal(left, alive)):
                yield rows[alive & ~left]
            alive = left
            n_alive = int(alive.sum())
            if n_alive == 0:
                break
            if n_alive <= len(rows) // 2:  # halve the batch; which rows stay depends on this chunk alone
                cache.batch_select_indices(alive.nonzero().squeeze(-1))
                rows, token, mask, positions = rows[alive], token[alive], mask[alive], positions[alive]
                written, alive = written[alive], alive[alive]
            ids, positions = token.unsqueeze(-1), positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)

    def _forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of the next token, [B, V], and values [B]; the cache grows by the width of ids."""
        extra = {"position_ids": positions} if self._takes_positions else {}
        logits, values = self._read(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra
        )
        return logits[:, -1], None if values is None else values[:, -1]

    def _pad_left(self, prompts: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        width = max(len(p) for p in prompts)
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)  # a copy: what Ray hands over is read-only
            mask[i, width - len(prompt) :] = 1
        return ids.to(self.device), mask.to(self.device)
