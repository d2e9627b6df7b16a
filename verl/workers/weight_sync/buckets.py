"""Flat buckets of named tensors, the unit of every weight transfer. Pure planning and copying.

Invariants
- Packing and unpacking give back every tensor, bit for bit in the transfer dtype.
- No bucket exceeds its size unless one tensor alone does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in its bucket, in elements."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Bucket:
    """`flat` (elements,) holds the tensors of `slots` one after another."""

    slots: tuple[Slot, ...]
    flat: Tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for slot in self.slots:
            yield slot.name, self.flat[slot.offset : slot.offset + slot.size].view(slot.shape)


def fill_buckets(tensors: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype, max_bytes: int) -> Iterator[Bucket]:
    """Copy named tensors into buckets of at most `max_bytes`, in order."""
    slots: list[Slot] = []
    parts: list[Tensor] = []
    used = 0
    limit = max_bytes // torch.empty(0, dtype=dtype).element_size()
    for name, tensor in tensors:
        if parts and used + tensor.numel() > limit:
            yield Bucket(tuple(slots), torch.cat(parts))
            slots, parts, used = [], [], 0
        slots.append(Slot(name, tuple(tensor.shape), used))
        parts.append(tensor.detach().to(dtype).reshape(-1))
        used += tensor.numel()
    if parts:
        yield Bucket(tuple(slots), torch.cat(parts))
