"""Patches of stored images: cached within a bound, and usable by whoever asks next."""

from __future__ import annotations

import pytest
import torch
from model_fixtures import SMALL, WIDE, patch_source, picture
from torch.nn import functional as F

from verl.utils.dataset.images import to_patches
from verl.utils.dataset.patches import StoredPatches

IMAGES = {record.key: record for record in (picture(SMALL, 0), picture(SMALL, 1), picture(WIDE, 0))}
KEYS = list(IMAGES)


def source(cache_bytes: int) -> StoredPatches:
    return StoredPatches(IMAGES, patch_source().spec, cache_bytes)


def test_patches_of_several_images_follow_each_other() -> None:
    made = source(1 << 24)
    expected = [to_patches(IMAGES[key].pixels[None], made.spec) for key in KEYS]
    assert torch.equal(made(KEYS), torch.cat(expected))
    assert torch.equal(made([KEYS[2], KEYS[0]]), torch.cat([expected[2], expected[0]]))
    assert made([]) is None


@pytest.mark.parametrize("keys", [KEYS, KEYS[:2], KEYS[:1]], ids=["sizes mixed", "one size", "one image"])
def test_the_way_to_a_gpu_makes_the_same_patches(keys: list[str]) -> None:
    """Its CPU twin: `pinned_to_device` leaves a tensor where it is. tests/gpu compares on the device itself."""
    made = source(0)
    assert torch.equal(made.made_of(made.pixels(keys)), torch.cat([source(0)([key]) for key in keys]))


def test_one_image_is_the_cached_tensor_itself() -> None:
    made = source(1 << 24)
    assert made(KEYS[:1]) is made(KEYS[:1])


def test_the_cache_drops_what_was_used_longest_ago() -> None:
    size = source(1 << 24)(KEYS[:1]).nbytes
    made = source(2 * size)
    first, second = made(KEYS[:1]), made(KEYS[1:2])
    assert made(KEYS[:1]) is first
    made(KEYS[2:])  # larger than the rest of the room
    assert made(KEYS[1:2]) is not second


def test_patches_that_a_sampler_asked_for_first_serve_a_gradient_later() -> None:
    made = source(1 << 24)
    with torch.inference_mode():
        made(KEYS)
    weight = torch.ones(4, made.dim, requires_grad=True)
    for keys in (KEYS[:1], KEYS):
        F.linear(made(keys), weight).sum().backward()
    assert weight.grad is not None
