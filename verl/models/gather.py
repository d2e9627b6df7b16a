"""Rows by index, with a gradient that is summed in fp32 and always in one order.

Plain indexing sorts all indices in every backward pass; `index_select` adds with atomics. Both add up in the tensor's
own precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(copies)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (copies,) = ctx.saved_tensors
        padded = torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])])
        return padded[copies].sum(1, dtype=torch.float32).to(grad.dtype), None, None


def gather_rows(x: Tensor, index: Tensor, copies: Tensor) -> Tensor:
    """`x[index]` for x (T, ..) and index (K,). `copies` (T, c) names the places of each row of x among the K, filled
    up with K (`verl.packing.layout.copies_of`)."""
    return _GatherRows.apply(x, index, copies)
