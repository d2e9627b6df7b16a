"""Rows by index, with a gradient that is summed in fp32 and always in one order.

Plain indexing sorts all indices in every backward pass; `index_select` adds with atomics. Both add up in the tensor's
own precision.

Memory: the copies of a row lie side by side while they are added up, as many rows at a time as `_AT_ONCE` numbers hold.
One last prompt token with 32 answers would otherwise give every row 32 places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_AT_ONCE = 1 << 26  # 128 MiB in bf16: the keys of a layer, with few answers a prompt, in one piece


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
        total = grad.new_empty(len(copies), *grad.shape[1:])
        rows = max(1, _AT_ONCE // (copies.shape[1] * max(1, padded[0].numel())))
        for part, places in zip(total.split(rows), copies.split(rows), strict=True):
            part.copy_(padded[places].sum(1, dtype=torch.float32))
        return total, None, None


def gather_rows(x: Tensor, index: Tensor, copies: Tensor) -> Tensor:
    """`x[index]` for x (T, ..) and index (K,). `copies` (T, c) names the places of each row of x among the K, filled
    up with K (`verl.packing.layout.copies_of`)."""
    return _GatherRows.apply(x, index, copies)
