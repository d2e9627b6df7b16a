"""Chains of pointwise operations and row sums, each meant to be one pass over memory.

They are written once in plain torch. `EAGER` runs them as they are: every operation is a kernel with its result in
memory. `compiled_kernels` lets torch.compile fuse each chain (`fsdp_config.use_torch_compile`, CUDA only). None of
them knows of autograd; `layers` and `log_probs` pair each with its gradient.

Invariants
- Compiled and eager agree up to rounding: what is kept in a register is not rounded to half precision in between.
- Statistics of the distribution are made in fp32, whatever the precision of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_BANNED_LOGIT = -1e9
"""A banned id's logit while sums are taken: its probability is exactly 0 and, unlike -inf, 0 times it is 0."""


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all (rows, F)."""
    return F.silu(gate) * up


def gated_silu_grads(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin in the precision of the angles, for x (rows, heads, d) and angles (rows, 1, d); the
    sine with its first half negated (`layers.signed`)."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * signed_sin).to(x.dtype)


def rotate_grad(grad: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Gradient of x."""
    return (grad * cos + (grad * signed_sin).roll(grad.shape[-1] // 2, -1)).to(grad.dtype)


def _policy_logits(logits: Tensor, banned: Tensor | None, temperature: float) -> Tensor:
    """(N, V) fp32, with a finite stand-in for minus infinity."""
    every = logits.float() / temperature
    return every if banned is None else every.masked_fill(banned, _BANNED_LOGIT)


def token_stats(
    logits: Tensor, targets: Tensor, banned: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits (N, V): log-prob of the targets (N,), log-sum-exp (N,) and entropy (N,), or (0,) without it; fp32."""
    every = _policy_logits(logits, banned, temperature)
    largest = every.amax(-1, keepdim=True)
    below = every - largest
    mass = below.exp()
    total = mass.sum(-1)
    log_total = total.log()
    log_probs = below.gather(-1, targets[:, None])[:, 0] - log_total
    entropy = log_total - (mass * below).sum(-1) / total if with_entropy else total[:0]
    return log_probs, largest[:, 0] + log_total, entropy


def logit_grads(
    logits: Tensor,
    targets: Tensor,
    banned: Tensor | None,
    temperature: float,
    normaliser: Tensor,
    d_log_probs: Tensor,
    entropy: Tensor | None,
    d_entropy: Tensor | None,
) -> Tensor:
    """Gradient (N, V) of the logits, in their precision, from those of log-probs and, if given, entropy.

    With p the softmax of a row, t its target and H its entropy: d log p_t = 1[t] - p and dH = -p (log p + H).
    """
    log_p = _policy_logits(logits, banned, temperature) - normaliser[:, None]
    factor = -d_log_probs[:, None]
    if d_entropy is not None:
        assert entropy is not None
        factor = factor - d_entropy[:, None] * (log_p + entropy[:, None])
    grads = log_p.exp() * factor
    is_target = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    grads = torch.where(is_target, grads + d_log_probs[:, None], grads)
    return (grads / temperature).to(logits.dtype)


@dataclass(frozen=True)
class Kernels:
    """The functions of this module, as they are or compiled."""

    gated_silu: Callable[..., Tensor]
    gated_silu_grads: Callable[..., tuple[Tensor, Tensor]]
    rotate: Callable[..., Tensor]
    rotate_grad: Callable[..., Tensor]
    token_stats: Callable[..., tuple[Tensor, Tensor, Tensor]]
    logit_grads: Callable[..., Tensor]
    rows: int
    """Rows of logits at a time. Eager, each takes a few fp32 copies of the vocabulary's size; compiled, two in the
    model's precision: 2.5 GB for the vocabulary of Qwen2.5-VL either way."""


EAGER = Kernels(gated_silu, gated_silu_grads, rotate, rotate_grad, token_stats, logit_grads, rows=1024)
COMPILED_ROWS = 4096


@lru_cache(maxsize=1)
def compiled_kernels() -> Kernels:
    """Every function through torch.compile, once a process; shapes are symbols, so one compilation serves all batches.

    torch compiles anew for each precision, memory layout and dimension of 1, and whether a gradient is wanted: hand in
    detached tensors of the shapes that the functions state. After eight versions it warns and runs the function as it
    is.

    Raises ValueError where no kernel can be made: without CUDA, or without a C compiler.
    """
    key = "fsdp_config.use_torch_compile=True"
    if not torch.cuda.is_available():
        raise ValueError(f"{key} needs a CUDA device: set it to False")
    made = {
        field.name: torch.compile(getattr(EAGER, field.name), dynamic=True)
        for field in fields(Kernels)
        if field.name != "rows"
    }
    kernels = Kernels(**made, rows=COMPILED_ROWS)
    probe = torch.ones(2, 8, device="cuda")
    try:
        kernels.gated_silu(probe, probe)
    except Exception as error:  # dynamo, inductor and triton each raise their own
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{key}: torch.compile cannot make a kernel here ({type(error).__name__}: {reason}). Install a C compiler "
            "(Debian: gcc and python3-dev), or set it to False"
        ) from error
    return kernels
