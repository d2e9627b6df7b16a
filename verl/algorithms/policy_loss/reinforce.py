"""REINFORCE on answers of another policy: -A min(ratio, bound) log p, the ratio held constant (`bypass_mode`)."""

from __future__ import annotations

import torch
from torch import Tensor

from verl.algorithms.policy_loss.vanilla import PolicyLoss

_MAX_LOG_RATIO = 20.0


def reinforce_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
    bound: float | None = None,
    answers: Tensor | None = None,
) -> PolicyLoss:
    """Per-token loss; all inputs (N,). `bound` truncates the ratio to the sampler, None leaves it out (weight 1). The
    clips have no effect."""
    log_ratio = (log_probs - old_log_probs).detach().clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    weight = torch.ones_like(ratio) if bound is None else ratio.clamp(max=bound)
    truncated = torch.zeros_like(ratio) if bound is None else (ratio > bound).float()
    return PolicyLoss(-advantages * weight * log_probs, truncated, torch.zeros_like(ratio), log_ratio)
