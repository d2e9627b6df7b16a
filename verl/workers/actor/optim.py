"""Optimizer and learning-rate schedule, as plain functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from verl.config import warmup_steps
from verl.config.nodes import OptimConfig


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """AdamW and its schedule. `style` is constant or cosine; both start with a linear warm-up."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    clip_grad: float
    """Largest global gradient norm; <= 0 switches clipping off."""
    warmup_steps: int
    total_steps: int
    style: str
    min_lr_ratio: float
    num_cycles: float = 0.5


def optim_spec(optim: OptimConfig, *, clip_grad: float, optimizer_steps: int) -> OptimSpec:
    """The spec of a config node for a run of `optimizer_steps`, unless the node fixes the schedule's length itself."""
    total = optim.total_training_steps if optim.total_training_steps > 0 else optimizer_steps
    return OptimSpec(
        lr=optim.lr,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        clip_grad=clip_grad,
        warmup_steps=warmup_steps(optim, total),
        total_steps=total,
        style=optim.warmup_style,
        min_lr_ratio=optim.min_lr_ratio,
        num_cycles=optim.num_cycles,
    )


def lr_factor(step: int, spec: OptimSpec) -> float:
    """Factor on `lr` for optimizer step `step` (0-based).

    Warm-up rises linearly and reaches 1 at `warmup_steps`; cosine then falls to `min_lr_ratio` at `total_steps`
    (with `num_cycles` 0.5; 1 rises again to the peak).
    """
    if step < spec.warmup_steps:
        return (step + 1) / (spec.warmup_steps + 1)
    if spec.style == "constant":
        return 1.0
    if spec.style != "cosine":
        raise ValueError(f"warmup_style={spec.style!r}: choose constant or cosine")
    span = max(1, spec.total_steps - spec.warmup_steps)
    progress = min(1.0, (step - spec.warmup_steps) / span)
    wave = 0.5 * (1.0 + math.cos(2.0 * math.pi * spec.num_cycles * progress))
    return spec.min_lr_ratio + (1.0 - spec.min_lr_ratio) * wave


def build_optimizer(model: nn.Module, spec: OptimSpec) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; norms and biases carry no weight decay."""
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decay, "weight_decay": spec.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    on_cuda = any(p.is_cuda for p in decay)
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, fused=on_cuda or None)
