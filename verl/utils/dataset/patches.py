"""Patches of stored images, made where they are used.

On a CPU they are kept for a while, because an epoch sees each image many times. For a GPU they are made there: a plot
travels as bytes, an eighth of its patches in fp32, and nothing has to be kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from verl.models.transfer import pinned_to_device
from verl.protocol import ImageRecord
from verl.utils.dataset.image_store import open_images
from verl.utils.dataset.images import ImageSpec, to_patches


class PatchSource(Protocol):
    """Image keys -> patches (N, `dim`) fp32 of all images in order, on any device; None when there are no keys.

    In two steps for who must wait between them: `pixels`, small and on the host, and `made_of` them, patches.
    """

    dim: int

    def __call__(self, keys: Sequence[str]) -> Tensor | None: ...

    def pixels(self, keys: Sequence[str]) -> list[Tensor]: ...

    def made_of(self, pixels: Sequence[Tensor]) -> Tensor: ...


class StoredPatches:
    """Patches from image stores on `device`; on a CPU the most recently used ones are cached up to `cache_bytes`."""

    def __init__(
        self,
        store: Mapping[str, ImageRecord],
        spec: ImageSpec,
        cache_bytes: int = 256 << 20,
        device: torch.device | str = "cpu",
    ) -> None:
        self.store = store
        self.spec = spec
        self.dim = spec.patch_dim
        self.cache_bytes = cache_bytes
        self.device = torch.device(device)
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._held = 0

    def __call__(self, keys: Sequence[str]) -> Tensor | None:
        if not keys:
            return None
        if self.device.type != "cpu":
            return self.made_of(self.pixels(keys))
        found = [self._one(key) for key in keys]
        return found[0] if len(found) == 1 else torch.cat(found)  # one is the cached tensor: nobody writes to patches

    def pixels(self, keys: Sequence[str]) -> list[Tensor]:
        """(3, H, W) uint8 of every image, on the host."""
        return [torch.from_numpy(np.array(self.store[key].pixels)) for key in keys]

    def made_of(self, pixels: Sequence[Tensor]) -> Tensor:
        """(N, `dim`) patches of images, at least one, on the device; the host does not wait for it."""
        alike = len({image.shape for image in pixels}) == 1
        parts = [torch.stack(list(pixels))] if alike else [image[None] for image in pixels]
        with torch.inference_mode(False):  # a sampler may ask first, and a gradient later
            made = [to_patches(pinned_to_device(part, self.device), self.spec) for part in parts]
            return made[0] if alike else torch.cat(made)

    def _one(self, key: str) -> Tensor:
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        patches = self.made_of(self.pixels([key]))
        self._cache[key] = patches
        self._held += patches.nbytes
        while self._held > self.cache_bytes and len(self._cache) > 1:
            _, old = self._cache.popitem(last=False)
            self._held -= old.nbytes
        return patches


def open_patches(stores: Sequence[Path], spec: ImageSpec, device: torch.device | str = "cpu") -> StoredPatches:
    """Patches of the images in all `stores` (train, validation, test), on `device`."""
    return StoredPatches(open_images(stores), spec, device=device)
