"""GMPO (arXiv 2507.20673): the geometric mean over an answer of its tokens' clipped ratios, times the advantage.

Invariants
- A token is clipped in log space, and only where that makes the objective smaller.
- Every token of an answer holds the answer's loss: with loss_agg_mode=seq-mean-token-mean the sum is the paper's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verl.algorithms.policy_loss.answers import answer_mean
from verl.algorithms.policy_loss.vanilla import PolicyLoss

_MAX_LOG_RATIO = 20.0


def geo_mean_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    answers: Tensor,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
) -> PolicyLoss:
    """Per-token loss; all inputs (N,). The clip is on the log-ratio: the paper's is 0.4 on both sides."""
    log_ratio = (log_probs - old_log_probs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    sign = advantages.sign()
    bounded = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-clip_low, clip_high))
    ratio = answer_mean(bounded, answers).exp()
    return PolicyLoss(
        loss=-advantages * ratio,
        clipped=((bounded != log_ratio) & (sign != 0)).float().detach(),
        clipped_lower=((bounded > log_ratio) & (sign != 0)).float().detach(),
        log_ratio=log_ratio.detach(),
    )
