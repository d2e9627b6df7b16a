"""Which tensor lies where: the plan of a transfer, made once per run and shared by both ends. Pure.

Invariants
- Every tensor lies in exactly one bucket, in order, and no two overlap.
- No bucket exceeds its size unless it holds a single tensor that does so alone.
- Offsets and bucket sizes are multiples of `ALIGNMENT` elements, so that copies are wide and checksums have no tail.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 128
_COLUMNS = 32


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in its bucket, in elements."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return int(torch.Size(self.shape).numel())

    def of(self, flat: Tensor) -> Tensor:
        """This tensor's part of a bucket, (size,)."""
        return flat[self.offset : self.offset + self.size]


@dataclass(frozen=True)
class Bucket:
    """The tensors of one transfer; `size` elements."""

    slots: tuple[Slot, ...]
    size: int

    def tensors(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Names and views of a filled bucket (size,)."""
        for slot in self.slots:
            yield slot.name, slot.of(flat).view(slot.shape)

    def __str__(self) -> str:
        names = [slot.name for slot in self.slots]
        return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"


@dataclass(frozen=True)
class TransferPlan:
    """Every bucket of a transfer and the type of its elements."""

    buckets: tuple[Bucket, ...]
    dtype: torch.dtype

    @property
    def largest(self) -> int:
        """Elements of the largest bucket."""
        return max(bucket.size for bucket in self.buckets)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(slot.size for bucket in self.buckets for slot in bucket.slots) * self.dtype.itemsize

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {slot.name: slot.shape for bucket in self.buckets for slot in bucket.slots}


def plan_transfer(shapes: Iterable[tuple[str, Sequence[int]]], *, dtype: torch.dtype, max_bytes: int) -> TransferPlan:
    """Buckets of at most `max_bytes` for named tensors, in order. Raises ValueError on none, or one twice."""
    limit = max_bytes // dtype.itemsize
    buckets: list[Bucket] = []
    slots: list[Slot] = []
    used, seen = 0, set()
    for name, shape in shapes:
        if name in seen:
            raise ValueError(f"weight {name} appears twice")
        seen.add(name)
        slot = Slot(name, tuple(shape), used)
        if slots and used + _aligned(slot.size) > limit:
            buckets.append(Bucket(tuple(slots), used))
            slots, used = [], 0
            slot = Slot(name, tuple(shape), 0)
        slots.append(slot)
        used += _aligned(slot.size)
    if not slots:
        raise ValueError("a model without weights cannot be sent")
    return TransferPlan((*buckets, Bucket(tuple(slots), used)), dtype)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def check_shapes(sent: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError naming the weights that the engine's model lacks, misses, or holds in another shape."""
    extra, missing = sorted(sent.keys() - expected.keys()), sorted(expected.keys() - sent.keys())
    wrong = [n for n in sent if n in expected and tuple(sent[n]) != tuple(expected[n])]
    problems = []
    if extra:
        problems.append(f"{len(extra)} weights of the actor are not in the rollout's model, e.g. {extra[:3]}")
    if missing:
        problems.append(f"{len(missing)} weights of the rollout's model are not in the actor's, e.g. {missing[:3]}")
    for name in wrong[:3]:
        problems.append(f"{name} is {tuple(sent[name])} in the actor and {tuple(expected[name])} in the rollout")
    if problems:
        raise ValueError(
            f"actor and rollout do not hold the same model: {'; '.join(problems)}. Both read "
            "actor_rollout_ref.model.path and model.override_config"
        )


def checksum(flat: Tensor) -> int:
    """A 64-bit sum of a bucket's bits that depends on their values and, within rows of 32 words, on their order.

    Integer arithmetic: the same on every device. `flat` has a multiple of `ALIGNMENT` elements of 2 or 4 bytes.
    """
    words = flat.view(torch.int32).view(-1, _COLUMNS)
    columns = words.sum(0, dtype=torch.int64)
    odd = torch.arange(1, 2 * _COLUMNS, 2, dtype=torch.int64, device=flat.device)
    return int((columns * odd).sum())
