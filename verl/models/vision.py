"""What the vision tower needs to know about a batch of images, made from cached per-grid pieces.

transformers 5.17 takes these tensors as keywords and skips its own per-image loops (`transformers.vision_utils`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers import vision_utils

from verl.protocol import Grid


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
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
    """Keywords for the vision tower's forward: positions, window order and segment bounds of all images.

    Plans of recent sets of grids are kept on the device: pictures of one task have one size. Read-only. They are made
    outside of inference mode, as a sampler may ask first and a training forward, which saves them, later.
    """
    return dict(_plan(tuple(tuple(grid) for grid in grids), merge_size, window_size, patch_size, device))


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _plan(
    grids: tuple[Grid, ...], merge_size: int, window_size: int, patch_size: int, device: torch.device
) -> dict[str, Tensor | int]:
    parts = [_one_grid(grid, merge_size, window_size, patch_size) for grid in grids]
    starts = list(itertools.accumulate((len(order) for _, order, _, _ in parts), initial=0))

    def bounds(lengths: Tensor) -> Tensor:
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(device)

    full = torch.cat([p[2] for p in parts])
    windows = torch.cat([p[3] for p in parts])
    return {
        "position_ids": torch.cat([p[0] for p in parts]).to(device),
        "window_index": torch.cat([p[1] + start for p, start in zip(parts, starts, strict=False)]).to(device),
        "cu_seqlens": bounds(full),
        "cu_window_seqlens": bounds(windows),
        "max_seqlen": int(full.max()),
        "max_window_seqlen": int(windows.max()),
    }
