"""The rollout's end of a transfer: loads buckets into the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from verl.workers.rollout.base import RolloutEngine
from verl.workers.weight_sync.buckets import TransferPlan, check_shapes, checksum
from verl.workers.weight_sync.channels import BroadcastReceiveEnd, MappedReceiveEnd, Meeting, ReceiveEnd
from verl.workers.weight_sync.sender import Offer, Passed


class WeightReceiver:
    """Feeds one engine. `expected` maps the Hugging Face names of the engine's model to shapes."""

    def __init__(self, engine: RolloutEngine, expected: Mapping[str, Sequence[int]], device: torch.device) -> None:
        self._engine, self._expected, self._device = engine, expected, device
        self._plan: TransferPlan
        self._end: ReceiveEnd
        self._next = 0

    def connect(self, offer: Offer, receiver: int, meeting: Meeting | None) -> None:
        """Check what will come and open this end of the channel, once per run.

        Raises ValueError naming the weights that do not fit the engine's model.
        """
        check_shapes(offer.plan.shapes(), self._expected)
        self._plan = offer.plan
        sizes, dtype = [bucket.size for bucket in offer.plan.buckets], offer.plan.dtype
        if offer.handle is not None:
            self._end = MappedReceiveEnd(offer.handle, sizes, dtype, self._device)
        else:
            assert meeting is not None, "a broadcast needs a place to meet"
            self._end = BroadcastReceiveEnd(meeting, receiver, sizes, dtype, self._device)

    def begin(self) -> None:
        self._engine.begin_update()
        self._next = 0

    def take(self, index: int, with_checksum: bool, sent: object = None) -> Passed:
        """Load bucket `index`. `sent` is the call that filled it, where the channel does not order the two itself.

        The checksum is of the bucket as it is after loading: a sender that wrote too early is found out.
        """
        assert index == self._next, f"bucket {index} came, bucket {self._next} is next"  # the one before failed
        flat = self._end.bucket(index)
        self._engine.update_weights(self._plan.buckets[index].tensors(flat))
        self._end.release(index)
        self._next += 1
        return Passed(index, checksum(flat) if with_checksum else None)

    def end(self) -> None:
        assert self._next == len(self._plan.buckets), f"{self._next} of {len(self._plan.buckets)} buckets came"
        self._engine.end_update()
