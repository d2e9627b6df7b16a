"""M-RoPE positions of Qwen2.5-VL from token ids and image grids (Qwen2-VL, arXiv 2409.12191, section 2.1).

Invariants
- Text advances all three axes together; an image of merged grid (t, h, w) gets temporal, row and column indices and
  advances by max(h, w).
- `next_position` is (largest position so far + 1): every answer starts there on all three axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def image_spans(
    token_ids: NDArray[np.int32], grids: Sequence[tuple[int, int, int]], image_token_id: int, merge_size: int
) -> list[tuple[int, int]]:
    """Half-open spans of the image placeholders in `token_ids` (P,), one per grid, in order.

    Raises ValueError when the number of placeholders is not what the grids (t, h, w in patches) ask for.
    """
    places = np.flatnonzero(token_ids == image_token_id)
    sizes = [t * h * w // merge_size**2 for t, h, w in grids]
    if len(places) != sum(sizes):
        raise ValueError(f"{len(places)} image placeholder tokens but the images need {sizes} (sum {sum(sizes)})")
    spans, used = [], 0
    for size in sizes:
        start = int(places[used])
        if int(places[used + size - 1]) != start + size - 1:
            raise ValueError(f"the {size} placeholders of the image at token {start} are not contiguous")
        spans.append((start, start + size))
        used += size
    return spans


def mrope_positions(
    token_ids: NDArray[np.int32], grids: Sequence[tuple[int, int, int]], image_token_id: int, merge_size: int
) -> tuple[NDArray[np.int64], int]:
    """Positions (3, P) of a prompt and the position at which an answer starts.

    Equal to `Qwen2_5_VLModel.get_rope_index` of transformers 5.17 for text and still images.
    """
    positions = np.empty((3, len(token_ids)), dtype=np.int64)
    spans = image_spans(token_ids, grids, image_token_id, merge_size)
    cursor, current = 0, 0
    for (start, end), (t, h, w) in zip(spans, grids, strict=True):
        positions[:, cursor:start] = current + np.arange(start - cursor)
        current += start - cursor
        rows, cols = h // merge_size, w // merge_size
        positions[:, start:end] = current + np.indices((t, rows, cols)).reshape(3, -1)
        current += max(rows, cols)
        cursor = end
    positions[:, cursor:] = current + np.arange(len(token_ids) - cursor)
    return positions, int(positions.max(initial=-1)) + 1
