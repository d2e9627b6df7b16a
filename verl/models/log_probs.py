"""Log-probabilities and entropy of response tokens under the one definition of the policy's distribution:
logits / temperature, banned ids at minus infinity, log-softmax in fp32. Sampler, actor, reference and SFT all use it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from verl.models.kernels import EAGER, Kernels


class TokenStats(NamedTuple):
    """Both (N,) fp32, one entry per response token; `entropy` is (0,) where it was not asked for."""

    log_probs: Tensor
    entropy: Tensor


def policy_logits(hidden: Tensor, vocabulary: Tensor, banned: Tensor | None, temperature: float) -> Tensor:
    """(N, D) hidden states -> (N, V) fp32 logits of the policy. `banned` (V,) is True at ids that are never drawn."""
    logits = F.linear(hidden, vocabulary).float()
    if temperature != 1.0:
        logits = logits / temperature
    return logits if banned is None else logits.masked_fill(banned, float("-inf"))


class _ChunkedStats(torch.autograd.Function):
    """Log-probs and entropy with a hand-written gradient.

    Kept for the backward pass are the inputs, the log-sum-exp and the entropy; the logits of a chunk are made a second
    time there, and no (N, V) tensor is larger than a chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        vocabulary: Tensor,
        targets: Tensor,
        banned: Tensor | None,
        temperature: float,
        entropy_grad: bool,
        with_entropy: bool,
        chunk: int,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor]:
        size = len(targets)
        log_probs, normaliser = (hidden.new_empty(size, dtype=torch.float32) for _ in range(2))
        entropy = hidden.new_empty(size if with_entropy else 0, dtype=torch.float32)
        for start in range(0, size, chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], vocabulary)
            found = kernels.token_stats(logits, targets[rows], banned, temperature, with_entropy)
            log_probs[rows], normaliser[rows] = found[:2]
            if with_entropy:
                entropy[rows] = found[2]
        if banned is not None:
            log_probs.masked_fill_(banned[targets], float("-inf"))
        ctx.save_for_backward(hidden, vocabulary, targets, banned, normaliser, entropy)
        ctx.temperature, ctx.entropy_grad, ctx.chunk, ctx.kernels = temperature, entropy_grad, chunk, kernels
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_log_probs: Tensor, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, vocabulary, targets, banned, normaliser, entropy = ctx.saved_tensors
        wants_hidden, wants_vocabulary = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        # A bf16 sum over chunks would lose the small contributions of each.
        d_vocabulary = torch.zeros_like(vocabulary, dtype=torch.float32) if wants_vocabulary else None
        for start in range(0, len(targets), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            of_entropy = (
                (entropy[rows], d_entropy[rows]) if ctx.entropy_grad and d_entropy is not None else (None, None)
            )
            d_logits = ctx.kernels.logit_grads(
                F.linear(hidden[rows], vocabulary),
                targets[rows],
                banned,
                ctx.temperature,
                normaliser[rows],
                d_log_probs[rows],
                *of_entropy,
            )
            if d_hidden is not None:
                torch.mm(d_logits, vocabulary, out=d_hidden[rows])
            if d_vocabulary is not None:
                d_vocabulary += d_logits.T @ hidden[rows]
        if d_vocabulary is not None:
            d_vocabulary = d_vocabulary.to(vocabulary.dtype)
        return d_hidden, d_vocabulary, None, None, None, None, None, None, None


def response_stats(
    hidden: Tensor,
    vocabulary: Tensor,
    targets: Tensor,
    *,
    banned: Tensor | None,
    temperature: float,
    entropy_grad: bool,
    with_entropy: bool = True,
    kernels: Kernels = EAGER,
    chunk: int | None = None,
) -> TokenStats:
    """Statistics of `targets` (N,) from the hidden states (N, D) that predict them.

    The vocabulary matrix (V, D) meets only these rows, `chunk` (default: `kernels.rows`) at a time; the backward pass
    makes a chunk's logits again and sums the matrix's gradient in fp32. `entropy_grad` lets the entropy carry a
    gradient, `with_entropy=False` leaves it out.
    """
    assert with_entropy or not entropy_grad, "an entropy that is not made has no gradient"
    rows = min(chunk or kernels.rows, max(1, len(targets)))
    how = (temperature, entropy_grad, with_entropy, rows, kernels)
    return TokenStats(*_ChunkedStats.apply(hidden, vocabulary, targets, banned, *how))
