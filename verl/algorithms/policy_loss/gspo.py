"""GSPO (arXiv 2507.18071, token-level form): one importance ratio per answer, the geometric mean of its tokens' ratios.

Invariants
- The ratio of every token equals exp(mean over its answer of log p - log p_old).
- The gradient of a token is that of its own log-prob, times the answer's ratio.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verl.algorithms.policy_loss.answers import answer_mean
from verl.algorithms.policy_loss.vanilla import PolicyLoss

_MAX_LOG_RATIO = 10.0


def gspo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    answers: Tensor,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
) -> PolicyLoss:
    """Per-token loss; all inputs (N,). The paper's clip is about 3e-4 below and 4e-4 above; there is no dual clip."""
    difference = log_probs - old_log_probs
    of_answer = answer_mean(difference.detach(), answers)
    log_ratio = (log_probs - log_probs.detach() + of_answer).clamp(max=_MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return PolicyLoss(
        loss=torch.maximum(plain, clipped),
        clipped=(clipped > plain).float().detach(),
        clipped_lower=torch.zeros_like(plain).detach(),
        log_ratio=difference.detach(),
    )
