"""How much of each part of a model is trained, and which parts a gradient reaches.

Parts are in the order of the forward; a gradient comes to a part and goes on through it where something in it, or
before it, is trained. Whole parts are looked at: that the inputs of the first trained matrix need no gradient is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from verl.models.lora import is_adapter


@dataclass(frozen=True)
class Part:
    """One layer, or what lies beside the layers."""

    share: float
    """Of the weights of its matrices, adapters aside, that are trained."""
    reached: bool
    """Whether a gradient flows through it."""
    adapters: int = 0
    """Weights of its trained adapters."""


@dataclass(frozen=True)
class TrainedParts:
    patch_embed: Part
    vision: tuple[Part, ...]
    merger: Part
    text: tuple[Part, ...]
    head: Part

    @classmethod
    def same(cls, config: Any, part: Part) -> TrainedParts:
        """Every part of a model with this config alike."""
        vision, text = config.vision_config.depth, config.text_config.num_hidden_layers
        return cls(part, (part,) * vision, part, (part,) * text, part)

    @classmethod
    def of(cls, hf: Any) -> TrainedParts:
        """Of a Qwen2.5-VL (without weights will do) by the `requires_grad` of its parameters."""
        tower, text = hf.model.visual, hf.model.language_model
        embed, *blocks, merger = _chain([tower.patch_embed, *tower.blocks, tower.merger], reached=False)
        before = merger.reached or text.embed_tokens.weight.requires_grad
        *layers, _, head = _chain([*text.layers, text.norm, hf.lm_head], reached=before)
        return cls(embed, tuple(blocks), merger, tuple(layers), head)


def _chain(modules: Iterable[nn.Module], *, reached: bool) -> list[Part]:
    found = []
    for module in modules:
        named = dict(module.named_parameters())
        matrices = [p for name, p in named.items() if p.ndim >= 2 and not is_adapter(name)]
        size, trained = (sum(p.numel() for p in some) for some in (matrices, [p for p in matrices if p.requires_grad]))
        adapters = sum(p.numel() for name, p in named.items() if is_adapter(name) and p.requires_grad)
        reached = reached or any(p.requires_grad for p in named.values())
        found.append(Part(trained / size if size else 0.0, reached, adapters))
    return found
