"""The actor's end of a transfer: gathers weights into buckets. Every method is called on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from verl.workers.weight_sync.buckets import TransferPlan, checksum, plan_transfer
from verl.workers.weight_sync.channels import (
    BroadcastSendEnd,
    MappedHandle,
    MappedSendEnd,
    Meeting,
    Scratch,
    SendEnd,
)
from verl.workers.weight_sync.gather import gather_into

Transport = Literal["mapped", "broadcast"]


@dataclass(frozen=True)
class Offer:
    """What a rollout needs to know about the weights that will come."""

    plan: TransferPlan
    handle: MappedHandle | None
    """None: they are broadcast."""


@dataclass(frozen=True)
class Passed:
    """One bucket went through one end; `checksum` is None where nobody asked for it."""

    index: int
    checksum: int | None


class WeightSender:
    """One rank's parameters (by Hugging Face name, sharded or not) and the buckets they are sent in.

    `merge(name, whole)` changes a gathered parameter before it is sent, on every rank: it adds an adapter.
    Memory for the buckets is taken by `offer` or `join` and kept: a transfer allocates nothing.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_bytes: int,
        merge: Callable[[str, Tensor], None] = lambda name, whole: None,
    ) -> None:
        self._parameters, self._merge = dict(parameters), merge
        self._device = device
        shapes = ((name, tuple(p.shape)) for name, p in self._parameters.items())
        self.plan = plan_transfer(shapes, dtype=dtype, max_bytes=max_bytes)
        self._sizes = [bucket.size for bucket in self.plan.buckets]
        self._end: SendEnd

    def offer(self, transport: Transport) -> Offer:
        """Make the buckets that a rollout maps, or only say what will be broadcast."""
        if transport == "broadcast":
            return Offer(self.plan, None)
        end = MappedSendEnd(self._sizes, self.plan.dtype, self._device)
        self._end = end
        return Offer(self.plan, end.handle)

    def join(self, meeting: Meeting | None) -> None:
        """Meet the receivers of a broadcast; a rank without a `meeting` only helps to gather."""
        if meeting is None:
            self._end = Scratch(self._sizes, self.plan.dtype, self._device)
        else:
            self._end = BroadcastSendEnd(meeting, self._sizes, self.plan.dtype, self._device)

    def send(self, index: int, with_checksum: bool, after: object = None) -> Passed:
        """Fill bucket `index` and let it go. `after` is the end of whatever used the same memory before."""
        flat = self._end.bucket(index)
        if with_checksum:
            flat.zero_()  # the gaps between tensors are summed too
        for slot in self.plan.buckets[index].slots:
            whole = slot.of(flat)
            gather_into(self._parameters[slot.name], whole)
            self._merge(slot.name, whole)
        found = checksum(flat) if with_checksum else None
        self._end.post(index)
        return Passed(index, found)

    def make_room(self) -> None:
        """Give cached GPU memory back, so that an engine on the same GPU can take its own again."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
