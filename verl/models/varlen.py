"""The kernel for attention over segments of unequal length on CUDA, chosen once by trying it.

Candidates in order: torch's `varlen_attn` (`torch.nn.attention.varlen`, read at torch 2.11 and 2.13, where it moved
from taking fewer key/value heads as they are to `enable_gqa`), and flash-attn (2.1 or later). One that does not align
causal masking to the end of a longer key, or whose gradient is wrong, is not used.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class VarlenKernel(Protocol):
    """q (Tq, Hq, d), k and v (Tk, Hkv, d), bounds (S+1,) int32 of the S segments in each -> (Tq, Hq, d).

    `max_q` and `max_k` bound the segments' lengths; causal aligns to the bottom right.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        scale: float,
        *,
        causal: bool,
    ) -> Tensor: ...


def _of_torch() -> VarlenKernel:
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, *, causal):  # type: ignore[no-untyped-def]
        options = grouped if q.shape[1] != k.shape[1] else {}
        window = (-1, 0) if causal else (-1, -1)
        return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window, **options)

    return kernel


def _of_flash_attn() -> VarlenKernel:
    from flash_attn import flash_attn_varlen_func

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, *, causal):  # type: ignore[no-untyped-def]
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=causal)

    return kernel


CANDIDATES: Mapping[str, Callable[[], VarlenKernel]] = {"torch": _of_torch, "flash-attn": _of_flash_attn}


@torch.inference_mode(False)
@torch.enable_grad()
def probe(kernel: VarlenKernel, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """What is wrong with a kernel, None when nothing is: 2 queries on 5 keys, 4 heads on 2, values and gradients
    against a written-out softmax. The first caller may be a sampler, without gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 64), (5, 2, 64), (5, 2, 64), (2, 4, 64))
    q, k, v, weight = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    bounds = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in (2, 5)]
    try:
        out = kernel(*inputs, *bounds, 128, 128, 0.125, causal=True)
        found = (out.detach(), *torch.autograd.grad((out * weight).sum(), inputs))
    except Exception as error:  # whatever a kernel of another version raises, it cannot be used
        return f"{type(error).__name__}: {error}"
    exact = [x.detach().float().requires_grad_() for x in inputs]
    keys, values = (x.repeat_interleave(2, dim=1) for x in exact[1:])
    scores = torch.einsum("qhd,khd->hqk", exact[0], keys) * 0.125
    visible = torch.ones(2, 5, dtype=torch.bool, device=device).tril(3)
    wanted = torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), values)
    expected = (wanted.detach(), *torch.autograd.grad((wanted * weight.float()).sum(), exact))
    for name, one, other in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        error, limit = float((one.float() - other).abs().max()), 3e-2 * float(other.abs().max())
        if not error <= limit:
            return f"{name} is off by {error:.3g}, more than {limit:.3g}"
    return None


@functools.cache
def varlen_kernel() -> VarlenKernel:
    """The first candidate that passes `probe` on this process's CUDA device. RuntimeError with the reasons when none
    does."""
    reasons: dict[str, str] = {}
    for name, make in CANDIDATES.items():
        try:
            kernel = make()
        except ImportError as error:
            reasons[name] = f"cannot be imported ({error})"
            continue
        wrong = probe(kernel, "cuda")
        if wrong is None:
            log.info("attention kernel: %s", name)
            return kernel
        reasons[name] = wrong
        log.warning("attention kernel of %s is not used: %s", name, wrong)
    raise RuntimeError(f"no attention kernel for segments works on {torch.cuda.get_device_name()}: {reasons}")
