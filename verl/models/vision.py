"""What the vision tower needs to know about a batch of images, made from cached per-grid pieces.

transformers 5.17 takes these tensors as keywords and skips its own per-image loops (`transformers.vision_utils`).

Invariant: a plan is made with the other inputs of its micro-batch, and the tower's forward copies nothing from the
host, however many sizes of pictures there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import vision_utils

from verl.models.transfer import to_device
from verl.protocol import Grid

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class VisionShape:
    """How a tower cuts pictures: the fields of its config that a plan depends on. By default those of every Qwen2.5-VL
    that was published."""

    merge_size: int = 2
    window_size: int = 112
    patch_size: int = 14

    @classmethod
    def of(cls, config: Any) -> VisionShape:
        """Of a `vision_config`."""
        return cls(config.spatial_merge_size, config.window_size, config.patch_size)


QWEN_VISION = VisionShape()


@lru_cache(maxsize=1024)
def _one_grid(grid: Grid, shape: VisionShape) -> tuple[Ints, Ints, Ints, Ints]:
    """Row/column positions (N, 2), window order (N / merge^2,), lengths of full segments, lengths of windows."""
    thw = torch.tensor([grid])
    positions = vision_utils.get_vision_position_ids(thw, shape.merge_size)
    full = vision_utils.get_vision_cu_seqlens(thw).diff()
    order, cu_windows = vision_utils.get_vision_window_index(
        thw, spatial_merge_size=shape.merge_size, window_size=shape.window_size, patch_size=shape.patch_size
    )
    return _ints(positions), _ints(order), _ints(full), _ints(cu_windows.diff())


def _ints(x: Tensor) -> Ints:
    return x.numpy().astype(np.int64)


def segment_lengths(grid: Grid, shape: VisionShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Patches of each full-attention segment (a frame) and of each window of one picture."""
    _, _, full, windows = _one_grid(grid, shape)
    return tuple(full.tolist()), tuple(windows.tolist())


@dataclass(frozen=True)
class VisionPlan:
    """All images of a micro-batch as the tower reads them, on its device."""

    shape: VisionShape
    position_ids: Tensor
    """(N, 2) row and column of each patch."""
    window_index: Tensor
    """(N / merge^2,) the order in which windows lie together."""
    cu_seqlens: Tensor
    cu_window_seqlens: Tensor
    """Bounds of the segments, int32."""
    max_seqlen: int
    max_window_seqlen: int

    @property
    def keywords(self) -> dict[str, Tensor | int]:
        """Arguments of the tower's forward."""
        return {name: value for name, value in vars(self).items() if name != "shape"}


def vision_plan(grids: Sequence[Grid], shape: VisionShape, device: torch.device) -> VisionPlan:
    """Positions, window order and segment bounds of all images; the host does not wait for the device."""
    parts = [_one_grid(tuple(grid), shape) for grid in grids]
    starts = itertools.accumulate((len(order) for _, order, _, _ in parts), initial=0)
    full, windows = (np.concatenate([p[i] for p in parts]) for i in (2, 3))
    arrays = (
        np.concatenate([p[0] for p in parts]),
        np.concatenate([p[1] + start for p, start in zip(parts, starts, strict=False)]),
        _bounds(full),
        _bounds(windows),
    )
    positions, order, cu_full, cu_windows = to_device(arrays, device)
    return VisionPlan(shape, positions, order, cu_full.int(), cu_windows.int(), int(full.max()), int(windows.max()))


def _bounds(lengths: Ints) -> Ints:
    return np.concatenate([[0], lengths.cumsum()])
