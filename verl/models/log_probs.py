"""Log-probabilities and entropy of response tokens under the one definition of the policy's distribution:
logits / temperature, banned ids at minus infinity, log-softmax in fp32. Sampler, actor, reference and SFT all use it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_KEEP_LOGITS = 1 << 24  # logits of a micro-batch up to this many are kept for the backward pass instead of recomputed


class TokenStats(NamedTuple):
    """Both (N,) fp32, one entry per response token."""

    log_probs: Tensor
    entropy: Tensor


def policy_logits(hidden: Tensor, vocabulary: Tensor, banned: Tensor | None, temperature: float) -> Tensor:
    """(N, D) hidden states -> (N, V) fp32 logits of the policy. `banned` (V,) is True at ids that are never drawn."""
    logits = torch.nn.functional.linear(hidden, vocabulary).float()
    if temperature != 1.0:
        logits = logits / temperature
    return logits if banned is None else logits.masked_fill(banned, float("-inf"))


def _chunk_stats(
    hidden: Tensor, vocabulary: Tensor, targets: Tensor, banned: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    logits = policy_logits(hidden, vocabulary, banned, temperature)
    normaliser = logits.logsumexp(-1)
    log_probs = logits.gather(-1, targets[:, None])[:, 0] - normaliser
    with torch.set_grad_enabled(torch.is_grad_enabled() and with_entropy):
        every = logits - normaliser[:, None]
        finite = every if banned is None else every.masked_fill(banned, 0.0)
        entropy = -(every.exp() * finite).sum(-1)
    return log_probs, entropy


def response_stats(
    hidden: Tensor,
    vocabulary: Tensor,
    targets: Tensor,
    *,
    banned: Tensor | None,
    temperature: float,
    entropy_grad: bool,
    chunk: int = 1024,
) -> TokenStats:
    """Statistics of `targets` (N,) from the hidden states (N, D) that predict them.

    The vocabulary matrix (V, D) meets only these rows, `chunk` at a time; under autograd a chunk is recomputed in the
    backward pass, so that no large (N, V) tensor outlives its chunk. `entropy_grad` lets the entropy carry a gradient.
    """
    log_probs, entropies = [], []
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        args = (hidden[rows], vocabulary, targets[rows], banned, temperature, entropy_grad)
        if torch.is_grad_enabled() and len(targets) * len(vocabulary) > _KEEP_LOGITS:
            lp, ent = checkpoint(_chunk_stats, *args, use_reentrant=False)
        else:
            lp, ent = _chunk_stats(*args)
        log_probs.append(lp)
        entropies.append(ent)
    return TokenStats(torch.cat(log_probs), torch.cat(entropies))
