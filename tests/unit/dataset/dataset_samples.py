"""Small PNGs and parquet rows for the data-set tests."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

QUESTION = "<image>The plot shows the power use of a computer. Is it a Desktop or a Laptop?"


def png(seed: int, width: int = 84, height: int = 56) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def make_row(index: int, *, text: str = QUESTION, images: Any = "one", **changes: Any) -> dict[str, Any]:
    truth = ("Desktop", "Laptop")[index % 2]
    return {
        "data_source": "computer_dataset",
        "prompt": [{"role": "user", "content": text}],
        "images": [{"bytes": png(index), "path": None}] if images == "one" else images,
        "ability": "time series",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": "train", "index": index, "answer": truth},
    } | changes
