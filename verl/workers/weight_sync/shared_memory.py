"""Weights through Ray's object store, which is shared memory on one node and a copy per node on several.

The actor's rank 0 writes flat buckets; every rollout worker reads them without a copy of its own.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import ray
import torch
from torch import Tensor

from verl.workers.weight_sync.buckets import Bucket, Slot, fill_buckets

_BUCKET_BYTES = 512 << 20


@dataclass(frozen=True)
class StoredBucket:
    """A bucket whose bytes lie in the object store."""

    slots: tuple[Slot, ...]
    dtype: torch.dtype
    data: ray.ObjectRef


def publish(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, *, keep: bool) -> list[StoredBucket]:
    """Write weights to the object store. Every rank iterates (gathering is collective); only one needs `keep`."""
    if not keep:
        deque(weights, maxlen=0)
        return []
    stored = []
    for bucket in fill_buckets(weights, dtype=dtype, max_bytes=_BUCKET_BYTES):
        raw = bucket.flat.cpu().view(torch.uint8).numpy()
        stored.append(StoredBucket(bucket.slots, dtype, ray.put(raw)))
    return stored


def read(buckets: Iterable[StoredBucket]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors; they are views of shared memory and must be copied by whoever keeps them."""
    for stored in buckets:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")
            flat = torch.from_numpy(ray.get(stored.data)).view(stored.dtype)
        yield from Bucket(stored.slots, flat).tensors()
