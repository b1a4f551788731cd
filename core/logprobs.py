"""The one definition of log-probability and entropy, for rollout workers, policy and reference alike.

Legend: B samples, T response tokens, V vocabulary. Natural logarithms. The caller aligns logits and ids.
"""

import torch
from torch import Tensor

# The logit of what is left out. Its probability is exactly 0 and so is its gradient, and unlike -inf it stays a number
# in p log p and in products with any derivative of a loss.
LEFT_OUT = -1e30
MANY_IDS = 2**12


def log_softmax(z: Tensor) -> Tensor:
    """log softmax over the last dimension: to 2e-6, or a unit in the last place of `z` where that is more."""
    if z.is_cpu and z.dtype == torch.float32 and z.shape[-1] > MANY_IDS:
        # A row is added up there in as many float32 sums as a vector has lanes: with 50,000 ids 2e-5 off, one way.
        return z - z.logsumexp(dim=-1, keepdim=True)
    return torch.log_softmax(z, dim=-1)


def _log_softmax(logits: Tensor, temperature: float, keep: Tensor | None = None) -> Tensor:
    """log softmax(logits / temperature) over the last dimension; half precision is raised to fp32, fp64 stays."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it divides the logits and must be above 0")
    wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    # Out of place: the caller may read the logits again (a value, a second temperature).
    heated = wide / temperature if temperature != 1.0 else wide
    return log_softmax(heated if keep is None else heated.masked_fill(~keep, LEFT_OUT))


def logprobs_from_logits(logits: Tensor, ids: Tensor, temperature: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """Log-probability of each sampled token under softmax(logits / temperature), over the kept ids where `keep` is
    given.

    Args:
        logits: [B, T, V], position t scores token t (already shifted by the caller).
        ids: [B, T] int64, the sampled tokens.
        temperature: divides the logits, above 0.
        keep: [B, T, V] bool, at least one True for each token; the others have probability and gradient 0. None: all.
    Returns:
        [B, T] in nats, fp32 or wider; about -1e30 for a token that is left out.
    """
    if logits.shape[:-1] != ids.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and ids {tuple(ids.shape)} do not describe the same tokens")
    return _log_softmax(logits, temperature, keep).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits: Tensor, temperature: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """Entropy in nats of softmax(logits / temperature) over the kept ids, the distribution that is sampled from.

    Args:
        logits: [..., V], finite.
        keep: [..., V] bool, as in `logprobs_from_logits`.
    Returns:
        [...] in nats, between 0 and log V, fp32 or wider.
    """
    logp = _log_softmax(logits, temperature, keep)
    return -(logp.exp() * logp).sum(-1)
