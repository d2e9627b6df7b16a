"""Qwen2.5-VL image processing on plain torch: encoded image -> resized uint8 pixels -> patches.

Equal bit for bit to the torchvision backend of transformers' `Qwen2VLImageProcessor` (read and compared at 5.17.0 with
torchvision 0.28), which cannot be imported without torchvision. Two steps, so that pixels are stored once as uint8
(an eighth of the size of the patches) and patches are made where they are used.

Invariants
- Pixels and patches equal the library's, whatever the source size and mode.
- Resizing is idempotent: pixels of a record pass through a second processor unchanged.
- An image that cannot be decoded is one ValueError that names its row.
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from verl.protocol import Grid, ImageRecord

RESCALE_FACTOR = 1 / 255
BICUBIC = 3
"""PIL's number of the filter, as processor files spell it."""
MAX_ASPECT_RATIO = 200
"""Refused above, as in the library."""
_PROCESSOR_NAMES = ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")
_OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageSpec:
    """What the model's processor file says about images. Sides are in pixels, `min_pixels`/`max_pixels` are areas."""

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, ...] = _OPENAI_CLIP_MEAN
    std: tuple[float, ...] = _OPENAI_CLIP_STD

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"min_pixels={self.min_pixels} must be in 1..max_pixels={self.max_pixels}")

    @property
    def factor(self) -> int:
        """Image sides are multiples of this."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Values of one patch: channels x temporal copies x patch x patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> ImageSpec:
        """Read `preprocessor_config.json` (or the nested one of `processor_config.json`) of a folder or hub id.

        `min_pixels` and `max_pixels` override the file. Raises ValueError when there is no such file, or when it asks
        for a step that this module does not do.
        """
        from transformers.image_processing_utils import BaseImageProcessor

        try:
            config, _ = BaseImageProcessor.get_image_processor_dict(str(path))
        except OSError as error:
            raise ValueError(
                f"{path}: no readable preprocessor_config.json or processor_config.json: {error}"
            ) from error
        return cls.from_config(config, where=str(path), min_pixels=min_pixels, max_pixels=max_pixels)

    @classmethod
    def from_config(
        cls, config: dict[str, Any], *, where: str, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> ImageSpec:
        """Read a processor file's content; both `min_pixels` and `size.shortest_edge` spellings of the bounds."""
        _refuse_unsupported(config, where)
        size = config.get("size") or {}

        def bound(override: int | None, name: str, edge: str, default: int) -> int:
            for value in (override, config.get(name), size.get(edge), size.get(name)):
                if value is not None:
                    return int(value)
            return default

        return cls(
            patch_size=config.get("patch_size", cls.patch_size),
            merge_size=config.get("merge_size", cls.merge_size),
            temporal_patch_size=config.get("temporal_patch_size", cls.temporal_patch_size),
            min_pixels=bound(min_pixels, "min_pixels", "shortest_edge", 56 * 56),
            max_pixels=bound(max_pixels, "max_pixels", "longest_edge", 28 * 28 * 1280),
            mean=tuple(config.get("image_mean") or _OPENAI_CLIP_MEAN),
            std=tuple(config.get("image_std") or _OPENAI_CLIP_STD),
        )


def _refuse_unsupported(config: dict[str, Any], where: str) -> None:
    name = config.get("image_processor_type", _PROCESSOR_NAMES[0])
    if name.removesuffix("Fast").removesuffix("Pil") not in _PROCESSOR_NAMES:
        raise ValueError(f"{where}: image_processor_type={name!r} is not Qwen2-VL's; only {_PROCESSOR_NAMES} work here")
    for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if config.get(key) is False:
            raise ValueError(f"{where}: {key}=False is not supported; remove it from the processor file")
    if (resample := config.get("resample", BICUBIC)) != BICUBIC:
        raise ValueError(f"{where}: resample={resample} is not supported; only bicubic ({BICUBIC}) is")
    if not math.isclose(factor := config.get("rescale_factor", RESCALE_FACTOR), RESCALE_FACTOR, rel_tol=1e-12):
        raise ValueError(f"{where}: rescale_factor={factor} is not supported; only 1/255 is")


def smart_resize(height: int, width: int, spec: ImageSpec) -> tuple[int, int]:
    """The (height, width) in pixels an image is resized to: multiples of `spec.factor`, area within its bounds.

    Source: `smart_resize` of transformers' Qwen2-VL image processor; sides round half to even as Python does.
    Raises ValueError when one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"a {width}x{height} image has an aspect ratio above {MAX_ASPECT_RATIO}")
    factor = spec.factor
    rounded = (round(height / factor) * factor, round(width / factor) * factor)
    area = rounded[0] * rounded[1]
    if area > spec.max_pixels:
        shrink = math.sqrt((height * width) / spec.max_pixels)
        height, width = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
        return height, width
    if area < spec.min_pixels:
        grow = math.sqrt(spec.min_pixels / (height * width))
        height, width = (math.ceil(side * grow / factor) * factor for side in (height, width))
        return height, width
    return rounded


def image_key(data: bytes) -> str:
    """The content address of an encoded image: its sha256 in hex."""
    return hashlib.sha256(data).hexdigest()


def read_image_file(path: Path, *, where: str) -> bytes:
    """The encoded bytes of a file. Raises ValueError beginning with `where`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{where}: image file {path} cannot be read: {error.strerror}") from error


def load_rgb(source: bytes | Image.Image, *, where: str) -> Image.Image:
    """Decode to RGB, upright by its EXIF tag. `where` names the row in the ValueError of a broken image."""
    try:
        image = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source
        image.load()
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        size = f"{len(source)} bytes" if isinstance(source, bytes) else f"{source.width}x{source.height} pixels"
        raise ValueError(f"{where}: image cannot be decoded ({size}): {error}") from error


def resize_pixels(image: Image.Image, spec: ImageSpec) -> NDArray[np.uint8]:
    """RGB image -> (3, H, W) uint8, sides multiples of `spec.factor`.

    torch's own uint8 kernel (fixed point, rounded and clamped inside) is the one torchvision calls for bicubic on CPU.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    height, width = smart_resize(image.height, image.width, spec)
    if (height, width) != (image.height, image.width):
        pixels = torch.nn.functional.interpolate(
            pixels[None], size=(height, width), mode="bicubic", align_corners=False, antialias=True
        )[0]
    return pixels.numpy()


def process_image(
    source: bytes | str | Path | Image.Image, spec: ImageSpec, *, key: str | None = None, where: str = "image"
) -> ImageRecord:
    """Encoded image, path or PIL image -> `ImageRecord`, pixels (3, H, W) uint8.

    The key is the sha256 of the encoded bytes; a PIL image has none, so its RGB content is hashed instead.
    Raises ValueError beginning with `where` when the image is missing, broken or too elongated.
    """
    if isinstance(source, str | Path):
        source = read_image_file(Path(source), where=where)
    image = load_rgb(source, where=where)
    if key is None:
        key = image_key(source) if isinstance(source, bytes) else image_key(repr(image.size).encode() + image.tobytes())
    try:
        pixels = resize_pixels(image, spec)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return ImageRecord(key, pixels, grid_of(pixels, spec))


def grid_of(pixels: NDArray[np.uint8], spec: ImageSpec) -> Grid:
    """(t, h, w) in patches of pixels (..., 3, H, W); t is 1 for a still image."""
    return 1, pixels.shape[-2] // spec.patch_size, pixels.shape[-1] // spec.patch_size


def token_count(grid: Grid, merge_size: int = 2) -> int:
    """Image tokens in the prompt: patches after merging `merge_size` x `merge_size` of them."""
    return grid[0] * grid[1] * grid[2] // merge_size**2


@lru_cache(maxsize=8)
def _scale(spec: ImageSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (3, 1, 1) of bytes, made once: what is sent to a GPU makes the host wait for it."""
    with torch.inference_mode(False):
        mean, std = (
            (torch.tensor(values, device=device) * (1.0 / RESCALE_FACTOR)).view(3, 1, 1)
            for values in (spec.mean, spec.std)
        )
    return mean, std


def to_patches(pixels: torch.Tensor | NDArray[np.uint8], spec: ImageSpec) -> torch.Tensor:
    """(3, H, W) or (B, 3, H, W) uint8 -> float32 (B * h * w, `spec.patch_dim`), the tower's `pixel_values`.

    Patches of one merged token are neighbours; a row holds channel, temporal copy, patch row, patch column. Rescaling
    and normalisation are one subtraction and one division with the mean and std scaled by 255, as the library fuses
    them. They run before the temporal copies are made, on the device that holds the pixels.
    """
    if not isinstance(pixels, torch.Tensor):
        pixels = torch.from_numpy(np.array(pixels))  # copied: a memory map is read-only, which torch cannot express
    assert pixels.dtype == torch.uint8, f"pixels must be uint8, got {pixels.dtype}"
    images = pixels[None] if pixels.ndim == 3 else pixels
    batch, channels, height, width = images.shape
    size, merge = spec.patch_size, spec.merge_size
    assert channels == 3 and height % spec.factor == 0 and width % spec.factor == 0, (
        f"pixels (B, 3, H, W) with sides multiples of {spec.factor} expected, got {tuple(images.shape)}"
    )
    rows, columns = height // spec.factor, width // spec.factor
    blocks = images.reshape(batch, 3, rows, merge, size, columns, merge, size).permute(0, 2, 5, 3, 6, 1, 4, 7)
    mean, std = _scale(spec, images.device)
    blocks = blocks.contiguous().to(torch.float32).sub_(mean).div_(std)
    copies = blocks.unsqueeze(6).expand(*blocks.shape[:6], spec.temporal_patch_size, size, size)
    return copies.reshape(batch * rows * columns * merge**2, spec.patch_dim)
