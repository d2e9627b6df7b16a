"""Floating-point operations of Qwen2.5-VL, from its config and the lengths of a batch (pure).

A multiplication with its addition counts two. Norms, rotary angles, activations and the softmax are left out, as is
usual; recomputation by checkpointing too, for it is no progress.

Counted: text layers with grouped key/value heads, attention by the (query, key) pairs that the mask leaves, the
vocabulary matrix on the response tokens alone (tied or not: the embedding itself is a look-up), patch embedding, vision
layers with a gated MLP, windows in most of them and whole pictures in `fullatt_block_indexes`, the patch merger.

A training step is three times its forward where all is trained: a product's backward makes the gradient of its inputs
and that of its weights, each as much work as the product. A frozen matrix has none of the second, and neither where no
gradient reaches it, as in a frozen vision tower. Adapters count in a training step alone, with three passes.

Two ways to count tokens
- computed: what the shared-prefix forward does. A group's prompt and its pictures count once.
- logical: every answer with its own copy of the prompt. The same number whether or not the prompt is shared.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from verl.models.trained import Part, TrainedParts
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
class Passes:
    """How often the products of each kind are computed, added up over layers. A forward is one pass through each."""

    patch_embed: float
    vision: float
    windows: float
    """Attention of the vision layers that look at windows."""
    whole: float
    """Attention of those that look at whole pictures."""
    merger: float
    text: float
    text_attention: float
    head: float
    vision_adapters: float
    """Weights of adapters that a patch meets, times passes."""
    merger_adapters: float
    text_adapters: float

    @classmethod
    def of(cls, parts: TrainedParts, whole: Sequence[int]) -> Passes:
        """`whole`: the vision layers that attend to whole pictures. Parts that no gradient reaches are a forward."""
        attention = [_attention_passes(part) for part in parts.vision]
        return cls(
            patch_embed=_passes(parts.patch_embed),
            vision=sum(map(_passes, parts.vision)),
            windows=sum(n for layer, n in enumerate(attention) if layer not in whole),
            whole=sum(n for layer, n in enumerate(attention) if layer in whole),
            merger=_passes(parts.merger),
            text=sum(map(_passes, parts.text)),
            text_attention=sum(map(_attention_passes, parts.text)),
            head=_passes(parts.head),
            vision_adapters=3.0 * sum(part.adapters for part in parts.vision),
            merger_adapters=3.0 * parts.merger.adapters,
            text_adapters=3.0 * sum(part.adapters for part in parts.text),
        )


def _passes(part: Part) -> float:
    return 1.0 + part.reached + part.share


def _attention_passes(part: Part) -> float:
    return 3.0 if part.reached else 1.0  # both factors of a product of activations get a gradient


@dataclass(frozen=True)
class FlopCounter:
    """FLOPs of one model, forward and in training."""

    config: Any
    """Qwen2_5_VLConfig."""
    trained: TrainedParts | None = None
    """None: all of it."""

    @cached_property
    def _forward(self) -> Passes:
        return self._passes(TrainedParts.same(self.config, Part(share=0.0, reached=False)))

    @cached_property
    def _training(self) -> Passes:
        return self._passes(self.trained or TrainedParts.same(self.config, Part(share=1.0, reached=True)))

    def _passes(self, parts: TrainedParts) -> Passes:
        return Passes.of(parts, self.config.vision_config.fullatt_block_indexes)

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

    def text(self, tokens: int, pairs: int, responses: int, passes: Passes | None = None) -> float:
        """`tokens` through the layers, `pairs` of attention in each, `responses` through the vocabulary matrix; a
        forward without `passes`."""
        text, n = self.config.text_config, passes or self._forward
        attention = 4 * text.hidden_size * pairs * n.text_attention
        layers = 2 * (n.text * self._text_layer + n.text_adapters) * tokens + attention
        return float(layers + n.head * 2 * text.vocab_size * text.hidden_size * responses)

    def vision_attention(self, grid: tuple[int, int, int], passes: Passes | None = None) -> float:
        """Attention of all vision layers inside the segments of one picture of (t, h, w) patches."""
        vision, n = self.config.vision_config, passes or self._forward
        whole, windows = segment_lengths(grid, VisionShape.of(vision))
        pairs = n.whole * sum(size * size for size in whole) + n.windows * sum(size * size for size in windows)
        return float(4 * vision.hidden_size * pairs)

    def vision(self, grid: tuple[int, int, int], passes: Passes | None = None) -> float:
        """One picture of (t, h, w) patches through the tower."""
        vision, n = self.config.vision_config, passes or self._forward
        width, merge = vision.hidden_size, vision.spatial_merge_size**2
        patches = grid[0] * grid[1] * grid[2]
        layer = 4 * width * width + 3 * width * vision.intermediate_size
        embed = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * width
        merger = (width * merge) * (width * merge) + (width * merge) * vision.out_hidden_size
        products = patches * (n.patch_embed * embed + n.vision * layer + n.vision_adapters)
        products += patches // merge * (n.merger * merger + n.merger_adapters)
        return 2.0 * products + self.vision_attention(grid, n)

    def forward(self, groups: Sequence[TrainGroup], *, shared: bool) -> float:
        """Forward of these groups: computed FLOPs with `shared` prompts, else logical ones (see the module)."""
        return self._count(groups, self._forward, shared=shared)

    def training(self, groups: Sequence[TrainGroup], *, shared: bool) -> float:
        """The same of forward and backward, as far as parts are trained."""
        return self._count(groups, self._training, shared=shared)

    def _count(self, groups: Sequence[TrainGroup], passes: Passes, *, shared: bool) -> float:
        total = 0.0
        for group in groups:
            prompt, answers = len(group.prompt.token_ids), [len(s.token_ids) for s in group.samples]
            copies = 1 if shared else len(answers)
            pictures = sum(self.vision(grid, passes) for grid in group.prompt.image_grids)
            total += copies * (self.text(prompt, causal_pairs(prompt), 0, passes) + pictures)
            total += sum(self.text(n, causal_pairs(n, prompt), n, passes) for n in answers)
        return total
