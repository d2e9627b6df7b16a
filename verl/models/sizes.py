"""Parameters, activations and cache of a Qwen2.5-VL, counted from its config.json. Pure; imports no torch.

Activations are those that autograd keeps for the backward pass, with varlen attention and without checkpointing, in
16-bit compute. Two countings: `LIBRARY` of transformers' own layers, whose peaks on 1x H200 are known (54 GiB with 4
groups of CTU-3B and 90 GiB with 8, bf16 weights and gradients included), and `FUSED` of `verl.models.layers`, which
keeps neither the fp32 copy of a norm's input nor silu(gate).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that one layer keeps for a token, as multiples of its widths."""

    per_mlp_width: int
    per_hidden_width: int
    """Of both norms: their inputs, and their outputs, which are the inputs of the matrices behind them."""


LIBRARY = LayerActivations(per_mlp_width=8, per_hidden_width=16)
"""gate, silu(gate), up and their product; per norm an fp32 input, a rounded one and the output."""
FUSED = LayerActivations(per_mlp_width=6, per_hidden_width=8)
"""gate, up and the product; per norm the input and the output."""


@dataclass(frozen=True)
class TextSizes:
    hidden: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    head: int
    """Width of a head."""
    vocabulary: int
    tied: bool

    @property
    def parameters(self) -> int:
        queries, keys = self.heads * self.head, self.kv_heads * self.head
        attention = (self.hidden + 1) * (queries + 2 * keys) + queries * self.hidden
        layer = attention + 3 * self.hidden * self.mlp + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def token_parameters(self) -> int:
        """What every token meets: the layers. The embedding is a look-up and the head sees answers alone."""
        return self.parameters - self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def layer_parameters(self) -> int:
        """Of the largest block that FSDP2 gathers at once: a layer, or what lies outside the layers."""
        return max(self.parameters - self.token_parameters, self.token_parameters // self.layers)

    def activation_bytes(self, kind: LayerActivations) -> int:
        """Of one token in one layer. The attention keeps its rotated queries, its output, and gathered keys and values
        (a group's prompt is gathered once an answer: about twice its own length)."""
        attention = 2 * 2 * self.heads * self.head + 2 * 2 * 2 * self.kv_heads * self.head
        return kind.per_mlp_width * self.mlp + kind.per_hidden_width * self.hidden + attention

    @property
    def kv_bytes(self) -> int:
        """Of one token in a 16-bit cache, all layers."""
        return self.layers * 2 * self.kv_heads * self.head * 2


@dataclass(frozen=True)
class VisionSizes:
    hidden: int
    layers: int
    mlp: int
    patch: int
    """Numbers in a patch."""
    merge: int
    """Patches that become one token."""
    out: int

    @property
    def parameters(self) -> int:
        attention = (self.hidden + 1) * 4 * self.hidden
        mlp = 3 * self.hidden * self.mlp + 2 * self.mlp + self.hidden
        wide = self.merge * self.hidden
        merger = self.hidden + (wide + 1) * wide + (wide + 1) * self.out
        return self.layers * (attention + mlp + 2 * self.hidden) + self.patch * self.hidden + merger

    def activation_bytes(self, kind: LayerActivations) -> int:
        """Of one patch in one layer: the joint projection, rotated queries and keys, values, the output."""
        return kind.per_mlp_width * self.mlp + kind.per_hidden_width * self.hidden + 14 * self.hidden


@dataclass(frozen=True)
class ModelSizes:
    """Both halves of a model."""

    text: TextSizes
    vision: VisionSizes

    @property
    def parameters(self) -> int:
        return self.text.parameters + self.vision.parameters

    @property
    def patch_weight(self) -> float:
        """What a patch costs beside a text token of the same forward, by the parameters that each meets: 0.24 at the
        3B, 0.10 at the 7B. At most one token for all patches that become a token: budgets count tokens, and in a toy
        model, whose tower is larger than its text layers, no picture would fit into one."""
        return min(self.vision.parameters / self.text.token_parameters, 1.0 / self.vision.merge)

    def activation_bytes(self, tokens: float, patches: float, *, kind: LayerActivations, checkpointing: bool) -> float:
        """Kept of a micro-batch. With checkpointing the input of every layer, and one layer while it is recomputed."""
        text, vision = self.text, self.vision
        layer_text, layer_vision = text.activation_bytes(kind) * tokens, vision.activation_bytes(kind) * patches
        if not checkpointing:
            return text.layers * layer_text + vision.layers * layer_vision
        inputs = 2 * (text.layers * text.hidden * tokens + vision.layers * vision.hidden * patches)
        return inputs + max(layer_text, layer_vision)

    @classmethod
    def from_folder(cls, folder: Path, overrides: Mapping[str, Any] | None = None) -> ModelSizes:
        """Read config.json; text fields lie under `text_config`, or beside it in files of older versions."""
        return cls.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")), overrides)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> ModelSizes:
        """`overrides` replaces fields of the text model, as `model.override_config` does."""
        text = {**config, **config.get("text_config", {}), **(overrides or {})}
        vision = config["vision_config"]
        channels, times = vision.get("in_channels", vision.get("in_chans", 3)), vision.get("temporal_patch_size", 2)
        return cls(
            TextSizes(
                hidden=text["hidden_size"],
                layers=text["num_hidden_layers"],
                mlp=text["intermediate_size"],
                heads=text["num_attention_heads"],
                kv_heads=text["num_key_value_heads"],
                head=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
                vocabulary=text["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            ),
            VisionSizes(
                hidden=vision["hidden_size"],
                layers=vision["depth"],
                mlp=vision["intermediate_size"],
                patch=channels * times * vision["patch_size"] ** 2,
                merge=vision.get("spatial_merge_size", 2) ** 2,
                out=vision["out_hidden_size"],
            ),
        )
