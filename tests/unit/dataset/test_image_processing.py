"""Image processing equals transformers' torchvision backend, without torchvision."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from verl.utils.dataset.images import (
    ImageSpec,
    image_key,
    process_image,
    smart_resize,
    to_patches,
    token_count,
)

GOLDEN_FOLDER = Path(__file__).resolve().parents[2] / "golden"
_module_spec = importlib.util.spec_from_file_location("make_image_golden", GOLDEN_FOLDER / "make_image_golden.py")
assert _module_spec and _module_spec.loader
golden = importlib.util.module_from_spec(_module_spec)
_module_spec.loader.exec_module(golden)
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
if HAS_TORCHVISION:
    golden.import_library_processor()
CASES = json.loads(golden.GOLDEN.read_text())["cases"]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def spec_of(case: dict[str, Any]) -> ImageSpec:
    return ImageSpec(min_pixels=case["min_pixels"], max_pixels=case["max_pixels"])


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['width']}x{c['height']}-{c['mode']}-{c['max_pixels']}")
def test_patches_equal_the_library_bit_for_bit(case: dict[str, Any]) -> None:
    image = golden.synthetic_image(case["width"], case["height"], case["mode"])
    record = process_image(png(image), spec_of(case))
    assert list(record.grid) == case["grid"]
    assert golden.sha256_of(to_patches(record.pixels, spec_of(case))) == case["patches_sha256"]


@pytest.mark.skipif(not HAS_TORCHVISION, reason="needs torchvision")
@pytest.mark.parametrize("width", [588, 580, 563, 577])
def test_patches_equal_the_installed_torchvision_backend(width: int) -> None:
    images = [golden.synthetic_image(width, height, "RGB") for height in (224, 230)]
    spec = ImageSpec(max_pixels=12845056)
    out = golden.import_library_processor()(min_pixels=3136, max_pixels=12845056)(images=images, return_tensors="pt")
    records = [process_image(image, spec) for image in images]
    assert torch.equal(torch.cat([to_patches(record.pixels, spec) for record in records]), out["pixel_values"])
    assert [list(record.grid) for record in records] == out["image_grid_thw"].tolist()


def test_target_size_equals_the_library_for_random_sizes() -> None:
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as library

    random = np.random.default_rng(0)
    for height, width in random.integers(1, 2000, size=(3000, 2)).tolist():
        if max(height, width) > 200 * min(height, width):
            continue
        for bounds in ((3136, 12845056), (65536, 131072)):
            spec = ImageSpec(min_pixels=bounds[0], max_pixels=bounds[1])
            expected = library.smart_resize(height, width, 28, *bounds)
            assert smart_resize(height, width, spec) == expected, (height, width, bounds)


def test_an_image_without_resampling_keeps_its_pixels() -> None:
    image = golden.synthetic_image(588, 224, "RGB")
    record = process_image(png(image), ImageSpec())
    assert np.array_equal(record.pixels.transpose(1, 2, 0), np.asarray(image))
    assert record.grid == (1, 16, 42)
    assert token_count(record.grid) == 168


@pytest.mark.parametrize("case", CASES[:8], ids=lambda c: f"{c['width']}x{c['height']}-{c['mode']}")
def test_resizing_is_idempotent(case: dict[str, Any]) -> None:
    first = process_image(golden.synthetic_image(case["width"], case["height"], case["mode"]), spec_of(case))
    again = process_image(Image.fromarray(first.pixels.transpose(1, 2, 0)), spec_of(case))
    assert np.array_equal(first.pixels, again.pixels)


def test_a_batch_of_one_size_equals_one_by_one() -> None:
    spec = ImageSpec()
    pixels = torch.randint(0, 256, (3, 3, 56, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_patches(pixels, spec), torch.cat([to_patches(one, spec) for one in pixels]))
    assert to_patches(pixels, spec).shape == (3 * 4 * 6, spec.patch_dim)


def test_path_bytes_and_pil_give_the_same_pixels(tmp_path: Path) -> None:
    image = golden.synthetic_image(580, 230, "RGB")
    (tmp_path / "plot.png").write_bytes(png(image))
    from_path = process_image(tmp_path / "plot.png", ImageSpec())
    from_bytes = process_image(png(image), ImageSpec())
    assert from_path.key == from_bytes.key == image_key(png(image))
    assert np.array_equal(from_path.pixels, from_bytes.pixels)
    assert np.array_equal(from_path.pixels, process_image(image, ImageSpec()).pixels)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"not an image", lambda b: b""])
def test_a_corrupted_image_is_one_error_naming_the_row(damage: Any) -> None:
    with pytest.raises(ValueError, match=r"^train.parquet row 7: image cannot be decoded"):
        process_image(damage(png(golden.synthetic_image(64, 64, "RGB"))), ImageSpec(), where="train.parquet row 7")


def test_a_missing_file_and_a_thin_image_name_the_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^row 3: image file .*absent.png cannot be read"):
        process_image(tmp_path / "absent.png", ImageSpec(), where="row 3")
    with pytest.raises(ValueError, match=r"^row 4: a 4000x10 image has an aspect ratio above 200"):
        process_image(Image.new("RGB", (4000, 10)), ImageSpec(), where="row 4")


@pytest.mark.parametrize(
    "config",
    [
        {"min_pixels": 3136, "max_pixels": 12845056},
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}},
        {"size": {"min_pixels": 3136, "max_pixels": 12845056}},
        {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 3136, "max_pixels": 12845056},
    ],
)
def test_every_spelling_of_the_bounds_is_read(tmp_path: Path, config: dict[str, Any]) -> None:
    extra = {"patch_size": 14, "image_processor_type": "Qwen2VLImageProcessorFast", "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | extra))
    spec = ImageSpec.from_pretrained(tmp_path)
    assert (spec.min_pixels, spec.max_pixels) == (3136, 12845056)
    assert ImageSpec.from_pretrained(tmp_path, max_pixels=50176).max_pixels == 50176


def test_the_nested_processor_file_of_transformers_5_is_read(tmp_path: Path) -> None:
    nested = {"image_processor": {"size": {"shortest_edge": 784, "longest_edge": 50176}, "image_mean": [0.5, 0.5, 0.5]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    spec = ImageSpec.from_pretrained(tmp_path)
    assert (spec.min_pixels, spec.max_pixels, spec.mean) == (784, 50176, (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    "config", [{"resample": 2}, {"do_rescale": False}, {"image_processor_type": "CLIPImageProcessor"}]
)
def test_a_processor_with_other_steps_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=next(iter(config))):
        ImageSpec.from_pretrained(tmp_path)


def test_a_folder_without_processor_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no readable preprocessor_config"):
        ImageSpec.from_pretrained(tmp_path)


def test_the_spec_is_hashable_and_pickles() -> None:
    assert pickle.loads(pickle.dumps(ImageSpec())) == ImageSpec()
    assert len({ImageSpec(), ImageSpec()}) == 1
