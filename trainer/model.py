"""The policy with its value function, and the only place where states are shifted against tokens.

Legend: S samples, T response width, M scored tokens (the valid response tokens, row by row), N tokens of a packed
sequence, H hidden width, V vocabulary. The state that response token t is drawn from is "the tokens before t": from it
come the log-prob of t and the value V_t. One more state of each sample stands behind its last token; a cut response is
bootstrapped from it.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from core import pretrained
from core.faults import UserError
from core.logprobs import entropy_from_logits, logprobs_from_logits
from core.schema import ModelConfig
from trainer import adapters, fused_head
from trainer.batch import TrainBatch
from trainer.fused_head import TokenLoss
from trainer.kept import KeptSets
from trainer.packing import ATTENTION, Packed, pack, take_rows

# Settings by which some models change their logits after the output layer, where that shows on trained weights only.
_AFTER_THE_HEAD = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_logit_soft_cap",
)


def changes_logits(config: PretrainedConfig) -> bool:
    """Whether a setting of the (text) model changes its logits after the output layer."""
    return any(getattr(config, name, None) not in (None, 1, 1.0) for name in _AFTER_THE_HEAD)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A micro-batch on its device, packed or padded, as the model wants it."""

    packed: Packed | None
    input_ids: Tensor  # [S, P + T]
    prompt_lengths: Tensor  # [S]
    response_lengths: Tensor  # [S]
    mask: Tensor  # [S, T]
    kept: KeptSets | None = None  # of the M scored tokens; None: drawn from the whole vocabulary

    @property
    def token(self) -> Tensor:
        """[M] the scored tokens."""
        return self.packed.token if self.packed is not None else self.input_ids[:, -self.mask.shape[1] :][self.mask]

    def score_logits(
        self, logits: Tensor, temperature: float, *, with_entropy: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs and entropies [M] from whole logits [M, V], over the kept ids."""
        keep = None if self.kept is None else self.kept.keep(slice(None), logits.shape[-1])
        logprobs = logprobs_from_logits(logits, self.token, temperature, keep)
        return logprobs, entropy_from_logits(logits, temperature, keep) if with_entropy else None


def inputs_of(batch: TrainBatch, device: torch.device, *, packed: bool) -> Inputs:
    """What a forward reads of some rows."""
    mask = batch.response_mask
    lengths = batch.prompt_lengths, batch.response_lengths
    return Inputs(
        packed=pack(batch.input_ids, *lengths, mask, device) if packed else None,
        input_ids=batch.input_ids.to(device),
        prompt_lengths=batch.prompt_lengths.to(device),
        response_lengths=batch.response_lengths.to(device),
        mask=mask.to(device),
        kept=None if batch.kept is None else KeptSets.of(batch.kept, mask, device),
    )


def inputs_of_texts(texts: list[np.ndarray], device: torch.device, *, packed: bool) -> Inputs:
    """Texts as responses to their first token: every other token is scored."""
    n = torch.tensor([len(x) - 1 for x in texts])
    ids = torch.zeros(len(texts), 1 + int(n.max()), dtype=torch.long)
    for row, x in zip(ids, texts, strict=True):
        row[: len(x)] = torch.from_numpy(x)
    ones, mask = torch.ones_like(n), torch.arange(int(n.max())) < n[:, None]
    return Inputs(
        packed=pack(ids, ones, n, mask, device) if packed else None,
        input_ids=ids.to(device),
        prompt_lengths=ones.to(device),
        response_lengths=n.to(device),
        mask=mask.to(device),
    )


class CausalForward:
    """How a causal LM is read: what it computes before each scored token, and their log-probs.

    Three ways, the first that gives what the model itself gives on a few tokens (it is asked, no list of names is
    kept): packed (`trainer/packing.py`), padded with the fused head, padded with the model's own logits.
    It opens autocast itself: a plain process, DDP and DeepSpeed would each cast at other places.
    """

    def __init__(self, lm: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
        self.lm, self._dtype = lm.eval(), dtype  # dropout would move the ratios off 1, and what is asked of it below
        # Models without absolute or rotary positions (ALiBi) take none; they read the attention mask.
        self._takes_positions = "position_ids" in inspect.signature(lm.forward).parameters
        self._own_hidden: Tensor | None = None
        self.fused = self._head_is_one_product()
        self.packed = self.fused and self.reads_segments(lm)

    @property
    def head(self) -> nn.Module:
        return self.lm.get_output_embeddings()

    @property
    def slower(self) -> str | None:
        """Why it is not read in the fastest way, in one line; None where it is."""
        kind = type(self.lm).__name__
        if not self.fused:
            return f"{kind} changes its logits after the output layer: rows are padded and [tokens, vocabulary] is held"
        if not self.packed:
            return f"{kind} does not read several responses as one sequence: rows are padded"
        return None

    def states(self, inputs: Inputs, trunk: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """[M, H] before each scored token and [S, H] behind each response, of the LM's trunk or another like it."""
        trunk = self.lm.base_model if trunk is None else trunk
        if inputs.packed is not None:
            p = inputs.packed
            with self._autocast(p.ids.device):
                hidden = self._packed_hidden(trunk, p)
            return take_rows(hidden, p.state_at), take_rows(hidden, p.after_at)
        with self._autocast(inputs.input_ids.device):
            hidden = trunk(**self._padded(inputs)).last_hidden_state
        return self._select(hidden, inputs)

    def own_logits(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """The same states, and the model's own logits [M, V] of each scored token: its head is no mere product."""
        n = inputs.mask.shape[1]
        with self._catching_hidden(), self._autocast(inputs.input_ids.device):
            logits = self.lm(**self._padded(inputs), logits_to_keep=n + 1).logits
        hidden, self._own_hidden = self._own_hidden, None
        assert hidden is not None and hidden.shape[1] == logits.shape[1] == n + 1, "logits_to_keep is ignored"
        return *self._select(hidden, inputs), logits[:, :-1][inputs.mask]

    def score(self, inputs: Inputs, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the scored tokens, [M] each. No gradient."""
        with torch.no_grad():
            if not self.fused:
                *_, logits = self.own_logits(inputs)
                return inputs.score_logits(logits, temperature)
            states, _ = self.states(inputs)
            return fused_head.score(self.head, self.for_head(states), inputs.token, temperature, inputs.kept)

    def for_head(self, states: Tensor) -> Tensor:
        """States in the dtype in which the output layer computes: norms leave float32 behind them under autocast."""
        return states.to(self._dtype) if self._dtype == torch.bfloat16 else states

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self._dtype, enabled=self._dtype == torch.bfloat16)

    def _packed_hidden(self, trunk: nn.Module, p: Packed) -> Tensor:
        positions = {"position_ids": p.positions} if self._takes_positions else {}
        return trunk(input_ids=p.ids, use_cache=False, segments=p.segments, **positions).last_hidden_state[0]

    def _padded(self, inputs: Inputs) -> dict[str, Tensor]:
        width, n = inputs.input_ids.shape[1], inputs.mask.shape[1]
        column = torch.arange(width, device=inputs.input_ids.device)
        first, last = width - n - inputs.prompt_lengths, width - n + inputs.response_lengths
        mask = (column >= first[:, None]) & (column < last[:, None])
        positions = {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)} if self._takes_positions else {}
        return {"input_ids": inputs.input_ids, "attention_mask": mask.long(), "use_cache": False, **positions}

    @staticmethod
    def _select(hidden: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """States of [S, >= T + 1, H] by the same order as a packed sequence's."""
        n = inputs.mask.shape[1]
        hidden = hidden[:, -n - 1 :]
        after = hidden[torch.arange(len(hidden), device=hidden.device), inputs.response_lengths]
        return hidden[:, :-1][inputs.mask], after

    @contextmanager
    def _catching_hidden(self) -> Iterator[None]:
        """What enters the output layer is the last hidden state after its norm, in any architecture."""

        def catch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._own_hidden = args[0]

        handle = self.head.register_forward_pre_hook(catch)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def _head_is_one_product(self) -> bool:
        head, config = self.head, self.lm.config.get_text_config()
        if changes_logits(config):
            return False
        if not isinstance(getattr(head, "weight", None), Tensor) or not hasattr(head, "bias"):
            return False
        ids = self._few_tokens(9)[None]
        own = self.lm(input_ids=ids, use_cache=False).logits
        hidden = self.lm.base_model(input_ids=ids, use_cache=False)
        if not hasattr(hidden, "last_hidden_state") or hidden.last_hidden_state.shape[-1] != head.weight.shape[-1]:
            return False
        ours = nn.functional.linear(hidden.last_hidden_state, head.weight, head.bias)
        return ours.shape == own.shape and bool((ours - own).abs().max() <= 1e-5 * own.abs().max().clamp(min=1e-3))

    @torch.no_grad()
    def reads_segments(self, lm: PreTrainedModel) -> bool:
        """Switch the LM, or a trunk beside it, to attention over segments, if it then computes what it did before."""
        config = lm.config.get_text_config()
        if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
            return False
        before = config._attn_implementation
        ids = self._few_tokens(12)
        prompt, long, short, other = ids[:4], ids[4:9], ids[9:11], ids[3:12]
        rows = [torch.cat([prompt, long]), torch.cat([prompt, short]), other]  # two of one prompt, and one alone
        alone = [lm.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows]
        width = max(map(len, rows))
        lengths = [(4, 5), (4, 2), (4, 5)]
        padded = torch.zeros(3, 4 + 5, dtype=torch.long)
        for line, row in zip(padded, rows, strict=True):
            line[: len(row)] = row.cpu()
        n_prompts, n_responses = (torch.tensor(x) for x in zip(*lengths, strict=True))
        mask = torch.arange(width - 4) < n_responses[:, None]
        packed = pack(padded, n_prompts, n_responses, mask, ids.device)
        expected = torch.cat([x[p - 1 : p - 1 + t] for x, (p, t) in zip(alone, lengths, strict=True)])
        try:
            lm.set_attn_implementation(ATTENTION)
            hidden = self._packed_hidden(lm.base_model, packed)[packed.state_at]
        except (NotImplementedError, TypeError, ValueError, RuntimeError):
            hidden = None  # it does not hand `segments` on, or wants something that such attention has not
        scale = expected.abs().max().clamp(min=1e-3)
        if hidden is not None and bool((hidden - expected).abs().max() <= 1e-4 * scale):
            return True
        lm.set_attn_implementation(before)
        return False

    def _few_tokens(self, n: int) -> Tensor:
        weight = self.lm.get_input_embeddings().weight
        return torch.arange(1, n + 1, device=weight.device) % len(weight)


class PolicyWithValueHead(nn.Module):
    """A causal LM and its value function (`model.value`): one module, one engine, one forward.

    shared            the head reads the states of the policy's trunk, and its gradient reaches the trunk
    shared_detached   the same states, but the gradient stops at the head
    lora              states of the same frozen trunk under an adapter of its own
    separate          states of a trunk of its own

    The head starts at zero, so the first advantages are those of the rewards alone. It is kept in float32. There may be
    several (trainer/value_heads.py): one layer with an output for each.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        config: ModelConfig,
        *,
        critic: nn.Module | None = None,
        head: Tensor | None = None,
        n_heads: int = 0,
    ) -> None:
        """
        Args:
            critic: the trunk of `separate`; a copy of the policy's if None.
            head: [1, H] what the value head starts from (of a reward model); zeros if None.
            n_heads: of `model.value_heads: components`; 0: one head for the whole reward, and values without that axis.
        """
        super().__init__()
        self.config, self.value = config, config.value
        dtype = getattr(torch, config.dtype)
        self.reader = CausalForward(lm, dtype)
        self.lm = lm
        wide = torch.float64 if lm.dtype == torch.float64 else torch.float32
        if config.value == "separate":
            self.critic = copy.deepcopy(lm.base_model) if critic is None else critic
            if critic is not None:
                self._refuse_unlike(critic)
        if config.lora_rank:
            names = ["policy"] + ["critic"] * (config.value == "lora")
            adapters.inject(lm, names, config)
        width = self.critic.config.hidden_size if config.value == "separate" else self.reader.head.weight.shape[1]
        self._n_heads = n_heads
        self._no_split_modules = lm._no_split_modules  # layers that FSDP2 shards each by itself, by transformers' name
        self.value_head = nn.Linear(width, max(1, n_heads), dtype=wide, device=lm.device)
        nn.init.zeros_(self.value_head.bias)
        if head is None or n_heads:  # it knows the whole reward, and would be copied into the head of every part
            nn.init.zeros_(self.value_head.weight)
        else:
            with torch.no_grad():
                self.value_head.weight.copy_(head)

    def tie_weights(self) -> None:
        """By transformers' name for it: FSDP2, where it loads sparingly, parts tied parameters and asks this after."""
        self.lm.tie_weights()

    def _refuse_unlike(self, critic: PreTrainedModel) -> None:
        """Raise UserError for a trunk that cannot read what the policy reads, in the form in which it is read."""
        words, known = (len(x.get_input_embeddings().weight) for x in (self.lm, critic))
        if known < words:
            raise UserError(
                f"model.value_path = {self.config.value_path}: knows {known} tokens, the policy {words}; give a model"
                " with the policy's tokenizer"
            )
        if self.reader.packed and not self.reader.reads_segments(critic):
            raise UserError(
                f"model.value_path = {self.config.value_path}: its attention ({type(critic).__name__}) does not read"
                " several responses as one sequence, which the policy's does; give a model of the policy's kind"
            )

    def forward(
        self,
        inputs: Inputs,
        temperature: float,
        token_loss: TokenLoss | None = None,
        with_entropy: bool = False,
        value_only: bool = False,
        base: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, dict[str, Tensor]]:
        """Without `token_loss` (no gradient): log-probs [M], values [M + S], entropies [M], {}.

        With it: the loss of all tokens, values [M + S], None, and the sums that `token_loss` keeps. Of the values the
        last S are of the states behind each response; with several heads they are [M + S, K]. `value_only` keeps the
        value's gradient from a shared trunk. `base`: only log-probs and entropies, of the model without its adapter.
        """
        if base:
            with adapters.active(self.lm, None):
                logprobs, entropy = self.reader.score(inputs, temperature)
            return logprobs, None, entropy, {}
        with adapters.active(self.lm, "policy"):
            if self.reader.fused:
                states, after = self.reader.states(inputs)
                logits = None
            else:
                states, after, logits = self.reader.own_logits(inputs)
            entropy, sums = None, {}
            if logits is not None:
                first, entropy = inputs.score_logits(
                    logits, temperature, with_entropy=token_loss is None or with_entropy
                )
                if token_loss is not None:
                    first, sums = token_loss(first, entropy, slice(None))
                    entropy = None
            else:
                head, states_of_head = self.reader.head, self.reader.for_head(states)
                given = head, states_of_head, inputs.token, temperature
                if token_loss is None:
                    first, entropy = fused_head.score(*given, inputs.kept)
                else:
                    first, sums = fused_head.loss_of_tokens(
                        *given, token_loss, with_entropy=with_entropy, kept=inputs.kept
                    )
        return first, self._values(inputs, states, after, value_only), entropy, sums

    def _values(self, inputs: Inputs, states: Tensor, after: Tensor, value_only: bool) -> Tensor:
        if self.value == "separate":
            states, after = self.reader.states(inputs, self.critic)
        elif self.value == "lora":
            with adapters.active(self.lm, "critic"):
                states, after = self.reader.states(inputs)
        elif self.value == "shared_detached" or value_only:
            states, after = states.detach(), after.detach()
        both = torch.cat([states, after]).to(self.value_head.weight.dtype)
        with torch.autocast(both.device.type, enabled=False):
            values = self.value_head(both)  # no temperature here
            return values if self._n_heads else values.squeeze(-1)

    def value_parameters(self) -> list[nn.Parameter]:
        """Those that only the value loss trains, as far as they are apart."""
        of_trunk = self.critic.parameters() if self.value == "separate" else adapters.parameters(self.lm, "critic")
        return [*self.value_head.parameters(), *of_trunk]

    def compile_layers(self) -> None:
        """torch.compile of what stands around attention in each layer: norms and MLPs, many small kernels otherwise."""
        for layer in self.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                for name, part in layer.named_children():
                    if "attn" not in name and not name.endswith("attention"):
                        part.compile(dynamic=True)

    def checkpoint_activations(self) -> None:
        """Compute the activations of each layer again in the backward pass instead of keeping them.

        transformers does so in training mode alone, in which dropout would be on: the flag of the layer itself is set,
        those of the modules in it stay off.
        """
        settings = {"use_reentrant": False}
        self.lm.gradient_checkpointing_enable(settings | {"context_fn": lambda: adapters.as_now(self.lm)})
        if self.value == "separate":
            self.critic.gradient_checkpointing_enable(settings)
        for layer in self.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True


class Reference:
    """The frozen model that KL is measured against: a copy of its own, or the policy without its adapter."""

    def __init__(
        self, config: ModelConfig, policy: PolicyWithValueHead, engine: nn.Module, lm: PreTrainedModel | None
    ) -> None:
        """`engine`: which wraps the policy; ZeRO-3 gathers parameters in its forward alone. `lm`: the copy; None for
        the policy without its adapter."""
        self._engine, self._offload = engine, config.reference == "offload"
        self._reader = policy.reader
        if lm is not None:
            lm = lm.eval().requires_grad_(False)
            self._reader = CausalForward(lm, getattr(torch, config.dtype))
        self._own = lm is not None

    @property
    def packed(self) -> bool:
        return self._reader.packed

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """The block in which it computes; one that is offloaded is on the device only here."""
        if self._own:
            self._reader.lm.to(device)
        try:
            yield
        finally:
            if self._own and self._offload:
                self._reader.lm.to("cpu")

    def score(self, inputs: Inputs, temperature: float) -> Tensor:
        """[M] log-probs of the scored tokens."""
        if self._own:
            return self._reader.score(inputs, temperature)[0]
        return self._engine(inputs, temperature, base=True)[0]


def load_causal_lm(path: str, device: torch.device | str) -> PreTrainedModel:
    """A causal LM in float32, dropout off for good: ratios would not be 1 otherwise. Raises UserError: see core."""
    return pretrained.load_causal_lm(path, torch.float32).to(device).eval()
