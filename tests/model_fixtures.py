"""A very small Qwen2.5-VL, pictures of several sizes, and random groups: what the tests of the model share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from verl.models.policy import Policy, load_policy
from verl.models.tiny import TinySize, create_tiny_model
from verl.protocol import ImageRecord, Prompt, TrainGroup, TrainSample
from verl.utils.dataset.images import ImageSpec
from verl.utils.dataset.patches import StoredPatches

SIZE = TinySize(
    hidden=64,
    layers=2,
    mlp=128,
    vision_hidden=64,
    vision_layers=2,
    vision_mlp=128,
    max_vocabulary=300,
    context=1024,
)
TEXTS = ["Which class is it? <think>The level is high.</think><class>Desktop</class>"] * 3

WIDE, SMALL, ODD, WINDOW = (1, 8, 16), (1, 6, 10), (1, 10, 18), (1, 8, 8)
"""Grids of 224x112, 140x84 and 252x140 pixels, and of exactly one window of 112x112."""
GRIDS = (WIDE, SMALL, ODD, WINDOW)


def write_tiny(
    folder: Path, *, sharpness: float = 4.0, seed: int = 0, size: TinySize = SIZE, texts: Sequence[str] = TEXTS
) -> Path:
    """A tiny model with weights large enough that attention is far from uniform and a wrong position is seen."""
    create_tiny_model(folder, texts, size=size, seed=seed)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.mul_(sharpness)
            elif name.endswith("bias"):
                noise = torch.Generator().manual_seed(parameter.numel())
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.1)
    model.save_pretrained(folder)
    return folder


def open_policy(folder: Path, **kwargs: Any) -> Policy:
    return load_policy(folder, AutoTokenizer.from_pretrained(folder), dtype=torch.float32, **kwargs)


def rounded(policy: Policy) -> Policy:
    """The policy with fp32 parameters that bf16 holds exactly; buffers such as rotary frequencies stay as they are."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(parameter.bfloat16())
    return policy


def key_of(grid: tuple[int, int, int], number: int) -> str:
    return f"{grid[2]}x{grid[1]}-{number}"


def picture(grid: tuple[int, int, int], number: int) -> ImageRecord:
    """A picture of a random walk on noise; `number` tells pictures of one size apart."""
    rng = np.random.default_rng([number, *grid])
    height, width = grid[1] * 14, grid[2] * 14
    pixels = rng.integers(0, 60, (3, height, width), dtype=np.uint8)
    walk = np.clip(height / 2 + rng.standard_normal(width).cumsum(), 0, height - 1).astype(int)
    pixels[:, walk, np.arange(width)] = 255
    return ImageRecord(key_of(grid, number), pixels, grid)


def picture_store() -> dict[str, ImageRecord]:
    """Four pictures of each size, by key."""
    records = [picture(grid, number) for grid in GRIDS for number in range(4)]
    return {record.key: record for record in records}


def patch_source(device: str = "cpu") -> StoredPatches:
    return StoredPatches(picture_store(), ImageSpec(), device=device)


def image_patches(source: StoredPatches) -> dict[str, Tensor]:
    return {key: source([key]) for key in source.store}


class Maker:
    """Random prompts and groups for the tiny model; the same seed makes the same ones."""

    def __init__(self, config: Any, seed: int = 0) -> None:
        self.config = config
        self.rng = np.random.default_rng(seed)
        self.samples = 0
        self.prompts = 0

    def text(self, length: int) -> list[int]:
        return self.rng.integers(0, 256, length).tolist()

    def prompt(self, *grids: tuple[int, int, int], text: int = 6, uid: str | None = None) -> Prompt:
        """Text, then every picture between its vision tokens with text after it."""
        ids = self.text(text)
        for grid in grids:
            merged = grid[0] * grid[1] * grid[2] // 4
            ids += [self.config.vision_start_token_id, *[self.config.image_token_id] * merged]
            ids += [self.config.vision_end_token_id, *self.text(int(self.rng.integers(1, text + 1)))]
        number = self.prompts
        self.prompts += 1
        keys = tuple(key_of(grid, (number + i) % 4) for i, grid in enumerate(grids))
        return Prompt(uid or f"row-{number}", number, "test", np.array(ids, np.int32), keys, grids, "A")

    def group(self, lengths: Sequence[int], *grids: tuple[int, int, int], text: int = 6) -> TrainGroup:
        """A group with answers of these lengths; weights, advantages and all columns are random."""
        return TrainGroup(self.prompt(*grids, text=text), tuple(self.sample(length) for length in lengths))

    def sample(self, length: int) -> TrainSample:
        index, self.samples = self.samples, self.samples + 1
        old, ref, rollout = (self.rng.normal(-5.7, 1.0, length).astype(np.float32) for _ in range(3))
        return TrainSample(
            index=index,
            token_ids=np.array(self.text(length), np.int32),
            weights=self.rng.uniform(0.01, 0.1, length).astype(np.float32),
            advantage=float(self.rng.normal()),
            old_log_probs=old,
            ref_log_probs=ref,
            rollout_log_probs=rollout,
        )


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """Full gradients by Hugging Face name; gathers where sharded, so every rank must call."""
    found = {}
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        if grad is not None:
            found[name.removeprefix("hf.")] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    return found


def assert_gradients_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every entry within `tolerance` of the largest of its tensor (at least 0.01), the same parameters on both."""
    assert found.keys() == expected.keys(), f"gradients of {sorted(found.keys() ^ expected.keys())} on one side only"
    wrong = []
    for name, want in expected.items():
        error, scale = (found[name] - want).abs().max().item(), max(0.01, want.abs().max().item())
        if not error <= tolerance * scale:
            wrong.append(f"{name}: differs by {error:.3g}, largest entry {scale:.3g}")
    assert not wrong, f"beyond {tolerance}:\n" + "\n".join(wrong)
