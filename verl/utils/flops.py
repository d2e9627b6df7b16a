"""Floating-point operations of Qwen2.5-VL, from its config and the lengths of a batch (pure).

A multiplication with its addition counts two. Norms, rotary angles, activations and the softmax are left out, as is
usual; recomputation by checkpointing too, for it is no progress.

Counted: text layers with grouped key/value heads, attention by the (query, key) pairs that the mask leaves, the
vocabulary matrix on the response tokens alone (tied or not: the embedding itself is a look-up), patch embedding, vision
layers with a gated MLP, windows in most of them and whole pictures in `fullatt_block_indexes`, the patch merger.

Two ways to count tokens
- computed: what the shared-prefix forward does. A group's prompt and its pictures count once.
- logical: every answer with its own copy of the prompt. The same number whether or not the prompt is shared.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from verl.models.vision import VisionShape, segment_lengths
from verl.protocol import TrainGroup

log = logging.getLogger(__name__)

PEAK_FLOPS: dict[str, float] = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H20": 148e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
}
"""Dense bf16 peak by the exact name that CUDA gives a device, from the vendor's data sheets."""


def peak_flops(device_name: str) -> float | None:
    """Peak of a device; None, with a warning, for one that the table does not name: a near name is another card."""
    if device_name not in PEAK_FLOPS:
        log.warning("%r is not in verl.utils.flops.PEAK_FLOPS: no MFU is reported", device_name)
        return None
    return PEAK_FLOPS[device_name]


def causal_pairs(queries: int, before: int = 0) -> int:
    """(query, key) pairs of `queries` tokens that see each other causally and all of `before` earlier ones."""
    return queries * before + queries * (queries + 1) // 2


@dataclass(frozen=True)
class FlopCounter:
    """Forward FLOPs of one model. A training step is three times its forward."""

    config: Any
    """Qwen2_5_VLConfig."""

    @property
    def text_parameters(self) -> int:
        """Weights that a text token meets, the vocabulary matrix included: N of the rule 6 N per trained token."""
        text = self.config.text_config
        return text.num_hidden_layers * self._text_layer + text.vocab_size * text.hidden_size

    @property
    def _text_layer(self) -> int:
        text = self.config.text_config
        width = text.hidden_size
        kv = width // text.num_attention_heads * text.num_key_value_heads
        return 2 * width * width + 2 * width * kv + 3 * width * text.intermediate_size

    def text(self, tokens: int, pairs: int, responses: int) -> float:
        """`tokens` through the layers, `pairs` of attention in each, `responses` through the vocabulary matrix."""
        text = self.config.text_config
        attention = 4 * text.hidden_size * pairs
        layers = text.num_hidden_layers * (2 * self._text_layer * tokens + attention)
        return float(layers + 2 * text.vocab_size * text.hidden_size * responses)

    def vision_attention(self, grid: tuple[int, int, int]) -> float:
        """Attention of all vision layers inside the segments of one picture of (t, h, w) patches."""
        vision = self.config.vision_config
        whole, windows = segment_lengths(grid, VisionShape.of(vision))
        full = len(vision.fullatt_block_indexes)
        pairs = full * sum(n * n for n in whole) + (vision.depth - full) * sum(n * n for n in windows)
        return float(4 * vision.hidden_size * pairs)

    def vision(self, grid: tuple[int, int, int]) -> float:
        """One picture of (t, h, w) patches through the tower."""
        vision = self.config.vision_config
        width, merge = vision.hidden_size, vision.spatial_merge_size**2
        patches = grid[0] * grid[1] * grid[2]
        layer = 4 * width * width + 3 * width * vision.intermediate_size
        embed = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * width
        merger = (width * merge) * (width * merge) + (width * merge) * vision.out_hidden_size
        products = patches * (embed + vision.depth * layer) + patches // merge * merger
        return 2.0 * products + self.vision_attention(grid)

    def forward(self, groups: Sequence[TrainGroup], *, shared: bool) -> float:
        """Forward of these groups: computed FLOPs with `shared` prompts, else logical ones (see the module)."""
        total = 0.0
        for group in groups:
            prompt, answers = len(group.prompt.token_ids), [len(s.token_ids) for s in group.samples]
            copies = 1 if shared else len(answers)
            total += copies * (self.text(prompt, causal_pairs(prompt), 0) + self._pictures(group))
            total += sum(self.text(n, causal_pairs(n, prompt), n) for n in answers)
        return total

    def _pictures(self, group: TrainGroup) -> float:
        return sum(self.vision(grid) for grid in group.prompt.image_grids)
