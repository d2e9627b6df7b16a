"""What the vision tower needs to know about a batch of images, made from cached per-grid pieces.

transformers 5.17 takes these tensors as keywords and skips its own per-image loops (`transformers.vision_utils`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers import vision_utils

Grid = tuple[int, int, int]


@lru_cache(maxsize=1024)
def _one_grid(grid: Grid, merge_size: int, window_size: int, patch_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row/column positions (N, 2), window order (N / merge^2,), lengths of full segments, lengths of windows."""
    thw = torch.tensor([grid])
    positions = vision_utils.get_vision_position_ids(thw, merge_size)
    full = vision_utils.get_vision_cu_seqlens(thw).diff()
    order, cu_windows = vision_utils.get_vision_window_index(
        thw, spatial_merge_size=merge_size, window_size=window_size, patch_size=patch_size
    )
    return positions, order, full, cu_windows.diff()


def segment_lengths(
    grid: Grid, *, merge_size: int, window_size: int, patch_size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Patches of each full-attention segment (a frame) and of each window of one picture."""
    _, _, full, windows = _one_grid(grid, merge_size, window_size, patch_size)
    return tuple(full.tolist()), tuple(windows.tolist())


def vision_plan(
    grids: Sequence[Grid], *, merge_size: int, window_size: int, patch_size: int, device: torch.device
) -> dict[str, Tensor | int]:
    """Keywords for the vision tower's forward: positions, window order and segment bounds of all images."""
    parts = [_one_grid(tuple(grid), merge_size, window_size, patch_size) for grid in grids]
    offsets, offset = [], 0
    for _, order, _, _ in parts:
        offsets.append(offset)
        offset += len(order)

    def bounds(lengths: Tensor) -> Tensor:
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(device, non_blocking=True)

    full = torch.cat([p[2] for p in parts])
    windows = torch.cat([p[3] for p in parts])
    return {
        "position_ids": torch.cat([p[0] for p in parts]).to(device, non_blocking=True),
        "window_index": torch.cat([p[1] + o for p, o in zip(parts, offsets, strict=True)]).to(device),
        "cu_seqlens": bounds(full),
        "cu_window_seqlens": bounds(windows),
        "max_seqlen": int(full.max()),
        "max_window_seqlen": int(windows.max()),
    }
