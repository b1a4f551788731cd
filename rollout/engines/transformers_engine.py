"""The embedded engine: a decode loop on any causal LM of transformers, with log-probs that are exact by construction.

Legend: B requests in the chunk, P padded prompt width, V vocabulary. Prompts are padded on the left; positions and the
attention mask come from recorded lengths, never from comparing ids.

Nothing of the checkpoint's generation config reaches the sampling (no top_p, no penalties): only its stop ids are read.
"""

import inspect

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache, GenerationConfig

from core.faults import UserError
from core.logprobs import logprobs_from_logits
from core.pretrained import load_causal_lm
from core.trajectory import PromptRequest
from core.weights import named_tensors
from rollout.engines.engine import Generation


def uniforms(request: PromptRequest, n: int) -> np.ndarray:
    """[n] float64 in [0, 1): number t decides token t. Counter based: a function of (seed, ordinal, k, t)."""
    key = np.array([request.seed, (request.ordinal << 20) | request.k], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(n)


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


class TransformersEngine:
    def __init__(
        self, model: torch.nn.Module, stop: tuple[int, ...], *, temperature: float, max_new_tokens: int
    ) -> None:
        self.model = model.eval()
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.device = next(model.parameters()).device
        self._stop = torch.tensor(stop, device=self.device)
        # Models without absolute or rotary positions (ALiBi) take none; they read the attention mask.
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    @classmethod
    def load(
        cls, path: str, stop: tuple[int, ...], *, dtype: str, device: str, temperature: float, max_new_tokens: int
    ) -> "TransformersEngine":
        model = load_causal_lm(path, getattr(torch, dtype)).to(device)
        return cls(model, stop, temperature=temperature, max_new_tokens=max_new_tokens)

    def live_tensors(self) -> dict[str, Tensor]:
        return named_tensors(self.model)

    @torch.inference_mode()
    def logprobs(self, prompt_ids: np.ndarray, response_ids: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(np.concatenate([prompt_ids, response_ids], axis=1)).to(self.device)
        n = response_ids.shape[1]
        logits = self.model(input_ids=ids, use_cache=False).logits[:, -n - 1 : -1]
        return logprobs_from_logits(logits, ids[:, -n:], self.temperature).float().cpu().numpy()

    @torch.inference_mode()
    def generate(self, requests: list[PromptRequest]) -> list[Generation]:
        n, steps = len(requests), self.max_new_tokens
        ids, mask = self._pad_left([r.prompt_ids for r in requests])  # [B, P]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        random = torch.from_numpy(np.stack([uniforms(r, steps) for r in requests])).to(self.device)  # [B, steps]
        out_ids = torch.zeros((n, steps), dtype=torch.long, device=self.device)
        out_logprobs = torch.zeros((n, steps), dtype=torch.float32, device=self.device)
        lengths = torch.full((n,), steps, device=self.device)
        stopped = torch.zeros(n, dtype=torch.bool, device=self.device)

        cache = DynamicCache(config=self.model.config)
        rows = torch.arange(n, device=self.device)  # which request each row of the cache belongs to
        for t in range(steps):
            logits = self._forward(ids, mask, positions, cache)
            token, logprob = sample(logits, random[rows, t], self.temperature)
            alive = ~stopped[rows]
            out_ids[rows[alive], t], out_logprobs[rows[alive], t] = token[alive], logprob[alive]
            ended = alive & torch.isin(token, self._stop)
            stopped[rows[ended]], lengths[rows[ended]] = True, t + 1
            alive &= ~ended
            n_alive = int(alive.sum())
            if n_alive == 0:
                break
            if n_alive <= len(rows) // 2:  # halve the batch; which rows stay depends on this chunk alone
                cache.batch_select_indices(alive.nonzero().squeeze(-1))
                rows, token, mask, positions = rows[alive], token[alive], mask[alive], positions[alive]
            ids, positions = token.unsqueeze(-1), positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)

        out_ids, out_logprobs = out_ids.cpu().numpy(), out_logprobs.cpu().numpy()
        return [
            Generation(
                response_ids=out_ids[i, :length].copy(),
                logprobs=out_logprobs[i, :length].copy(),
                finish_reason="stop" if stop else "length",
            )
            for i, (length, stop) in enumerate(zip(lengths.tolist(), stopped.tolist(), strict=True))
        ]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits of the next token, [B, V]; the cache grows by the width of ids."""
        extra = {"position_ids": positions} if self._takes_positions else {}
        out = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra
        )
        return out.logits[:, -1]

    def _pad_left(self, prompts: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        width = max(len(p) for p in prompts)
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)  # a copy: what Ray hands over is read-only
            mask[i, width - len(prompt) :] = 1
        return ids.to(self.device), mask.to(self.device)


def sample(logits: Tensor, random: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling from softmax(logits / temperature).

    Args:
        logits: [B, V].
        random: [B] float64 in [0, 1).
    Returns:
        token [B] int64, its log-prob [B] float32 under the very distribution that was sampled from.
    """
    cdf = torch.softmax(logits.double() / temperature, dim=-1).cumsum(-1)
    # right=True never picks a token of probability 0; the last entry scales away the rounding of the sum.
    token = torch.searchsorted(cdf, (random * cdf[:, -1]).unsqueeze(-1), right=True).clamp(max=logits.shape[-1] - 1)
    return token.squeeze(-1), logprobs_from_logits(logits.unsqueeze(1), token, temperature).squeeze(-1).float()
