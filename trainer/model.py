"""The policy with its value head, and the only place where logits are shifted against tokens.

Legend: B samples, P prompt width, T response width, V vocabulary, H hidden size. The logits of column P - 1 + t and the
state that they are computed from belong to response token t: that state is "the tokens before t", so its value is V_t.
One more column, P - 1 + T, holds the state after the last token; a cut response is bootstrapped from it.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from core import pretrained
from core.logprobs import entropy_from_logits, logprobs_from_logits
from trainer.batch import TrainBatch


@dataclass(frozen=True)
class PolicyOutput:
    logprobs: Tensor  # [B, T] of the response tokens, after temperature
    values: Tensor  # [B, T + 1] V of the state before token t; the last is the state after a response of full width
    entropy: Tensor | None  # [B, T] nats


class PolicyWithValueHead(nn.Module):
    """A causal LM and a linear value head on its last hidden state: one module, one engine, one forward.

    The head starts at zero, so the first advantages are those of the rewards alone. It is kept in float32.
    """

    def __init__(self, lm: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
        """`dtype`: what the causal LM computes in; all parameters are in float32."""
        super().__init__()
        self.lm = lm
        self.value_head = nn.Linear(lm.get_output_embeddings().in_features, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self._forward = CausalForward(lm, dtype)

    def forward(
        self,
        input_ids: Tensor,
        prompt_lengths: Tensor,
        response_lengths: Tensor,
        n_response: int,
        temperature: float,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Fields of PolicyOutput as a tuple (engines that wrap modules want one). input_ids is [B, P + T]."""
        logits, hidden = self._forward(input_ids, prompt_lengths, response_lengths, n_response)
        logprobs = logprobs_from_logits(logits, input_ids[:, -n_response:], temperature)
        values = self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1)  # no temperature here
        return logprobs, values, entropy_from_logits(logits, temperature) if with_entropy else None


class CausalForward:
    """Logits of the response tokens of a padded batch, and the hidden states that they come from.

    It opens autocast itself: a plain process, DDP and DeepSpeed would each cast at other places.
    """

    def __init__(self, lm: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
        self._lm, self._dtype = lm, dtype
        # Models without absolute or rotary positions (ALiBi) take none; they read the attention mask.
        self._takes_positions = "position_ids" in inspect.signature(lm.forward).parameters
        self._hidden: Tensor | None = None
        # What enters the output embedding is the last hidden state after its norm, in any architecture.
        lm.get_output_embeddings().register_forward_pre_hook(self._catch)

    def _catch(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._hidden = args[0]

    def __call__(
        self, input_ids: Tensor, prompt_lengths: Tensor, response_lengths: Tensor, n_response: int
    ) -> tuple[Tensor, Tensor]:
        """[B, P + T] ids -> logits [B, T, V] that score each response token, hidden [B, T + 1, H]."""
        width = input_ids.shape[1]
        p = width - n_response
        column = torch.arange(width, device=input_ids.device)
        mask = (column >= p - prompt_lengths[:, None]) & (column < p + response_lengths[:, None])
        extra = {}
        if self._takes_positions:
            extra["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        with torch.autocast(input_ids.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            logits = self._lm(
                input_ids=input_ids,
                attention_mask=mask.long(),
                use_cache=False,
                logits_to_keep=n_response + 1,
                **extra,
            ).logits
        hidden, self._hidden = self._hidden, None
        assert hidden is not None and hidden.shape[1] == logits.shape[1] == n_response + 1, "logits_to_keep is ignored"
        return logits[:, :-1], hidden


def run_policy(module: nn.Module, batch: TrainBatch, temperature: float, *, with_entropy: bool = False) -> PolicyOutput:
    """Forward of the policy (or its engine) on a batch that is on its device."""
    n_response = batch.response_mask.shape[1]
    return PolicyOutput(
        *module(batch.input_ids, batch.prompt_lengths, batch.response_lengths, n_response, temperature, with_entropy)
    )


def load_causal_lm(path: str, device: torch.device | str) -> PreTrainedModel:
    """A causal LM in float32, dropout off for good: ratios would not be 1 otherwise. Raises UserError: see core."""
    return pretrained.load_causal_lm(path, torch.float32).to(device).eval()
