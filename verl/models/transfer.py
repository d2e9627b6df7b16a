"""Numbers from the host to a device without making the host wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Tensors of arrays of one type. To a GPU they travel as one pinned buffer: a copy from pageable memory would wait
    for all work in the queue, and many small ones cost more than their bytes."""
    if device.type == "cpu":
        return [torch.from_numpy(x) for x in arrays]
    assert len({x.dtype for x in arrays}) == 1, f"one buffer holds one type, not {[x.dtype for x in arrays]}"
    sizes = [x.size for x in arrays]
    host = torch.from_numpy(np.concatenate([x.reshape(-1) for x in arrays])).pin_memory()
    parts = host.to(device, non_blocking=True).split(sizes)
    return [part.view(x.shape) for part, x in zip(parts, arrays, strict=True)]


def pinned_to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device, itself where it is there; on the way to a GPU it is pinned: the host does not wait."""
    return x if x.device.type == device.type else x.pin_memory().to(device, non_blocking=True)
