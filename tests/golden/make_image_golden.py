"""Writes `image_processing.json`: what transformers' torchvision backend makes of deterministic synthetic images.

Run it where torchvision can be imported. With the CPU build of torch, PyPI's CUDA build of torchvision works too, once
the operator schemas it expects from its own C++ library are defined (done below); keep it out of the project's venv:

    python -m venv /tmp/tv
    echo "$PWD/.venv/lib/python3.11/site-packages" > /tmp/tv/lib/python3.11/site-packages/project.pth
    /tmp/tv/bin/pip install --no-deps "torchvision==0.28.*" && /tmp/tv/bin/python tests/golden/make_image_golden.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

GOLDEN = Path(__file__).with_name("image_processing.json")
REAL = {"min_pixels": 3136, "max_pixels": 12845056}
CASES: list[tuple[int, int, str, dict[str, int]]] = [
    (588, 224, "RGB", REAL),
    (580, 230, "RGB", REAL),
    (563, 230, "RGB", REAL),
    (589, 229, "RGBA", REAL),
    (571, 231, "P", REAL),
    (300, 200, "L", REAL),
    (41, 43, "RGB", REAL),
    (20, 30, "RGB", REAL),
    (1500, 10, "RGB", REAL),
    (14, 1400, "RGB", REAL),
    (42, 70, "RGB", REAL),
    (641, 479, "RGB", {"min_pixels": 3136, "max_pixels": 100352}),
    (641, 479, "RGB", {"min_pixels": 3136, "max_pixels": 25088}),
    (97, 61, "RGB", {"min_pixels": 65536, "max_pixels": 4194304}),
    (1023, 767, "RGBA", {"min_pixels": 65536, "max_pixels": 131072}),
]
"""(width, height, mode, bounds)"""


_KEPT_ALIVE: list[Any] = []
"""A library's definitions vanish with it."""


def synthetic_image(width: int, height: int, mode: str) -> Image.Image:
    """Noise, hard lines and a ramp from integer arithmetic only, hence the same on every machine."""
    y, x = np.mgrid[0:height, 0:width].astype(np.uint64)
    noise = ((x * 2654435761 + y * 40503 + x * y * 97) >> 7) & 0xFF
    ramp = (x * 255) // max(width - 1, 1)
    lines = np.where((x * 3 + y * 5) % 31 < 2, 0, 255).astype(np.uint64)
    image = Image.fromarray(np.stack([noise, ramp, lines], axis=-1).astype(np.uint8))
    if mode == "P":
        return image.quantize(16, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(((x + y) % 256).astype(np.uint8)))
        return image
    return image.convert(mode)


def sha256_of(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def import_library_processor() -> Any:
    """transformers' torchvision-backed class; ImportError where torchvision is absent."""
    import importlib.util

    if importlib.util.find_spec("torchvision") is None:
        raise ImportError("torchvision is not installed")
    if torch.version.cuda is None and not _KEPT_ALIVE:
        schemas = torch.library.Library("torchvision", "FRAGMENT")
        _KEPT_ALIVE.append(schemas)
        for name in ("nms", "qnms"):
            schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    return Qwen2VLImageProcessor


def main() -> None:
    processor_class = import_library_processor()
    import torchvision
    import transformers

    cases = []
    for width, height, mode, bounds in CASES:
        image = synthetic_image(width, height, mode)
        out = processor_class(**bounds)(images=[image], return_tensors="pt")
        cases.append(
            {
                "width": width,
                "height": height,
                "mode": mode,
                **bounds,
                "input_sha256": hashlib.sha256(image.convert("RGB").tobytes()).hexdigest(),
                "grid": out["image_grid_thw"][0].tolist(),
                "patches_sha256": sha256_of(out["pixel_values"]),
            }
        )
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, transformers)}
    GOLDEN.write_text(json.dumps({"versions": versions, "cases": cases}, indent=1) + "\n")
    print(f"{GOLDEN}: {len(cases)} cases, {versions}")


if __name__ == "__main__":
    main()
