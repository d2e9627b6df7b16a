"""CISPO (arXiv 2506.13585): the importance ratio is clipped and carries no gradient, so no token is left out.

Invariant: the gradient of a token's loss in its log-prob is -advantage x clipped ratio.
"""

from __future__ import annotations

from torch import Tensor

from verl.algorithms.policy_loss.vanilla import PolicyLoss

_MAX_LOG_RATIO = 20.0


def cispo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    answers: Tensor,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
) -> PolicyLoss:
    """Per-token loss; all inputs (N,). The paper opens the lower side: set clip_ratio_low=1."""
    log_ratio = (log_probs - old_log_probs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).detach()
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return PolicyLoss(
        loss=-advantages * bounded * log_probs,
        clipped=(bounded != ratio).float(),
        clipped_lower=(bounded > ratio).float(),
        log_ratio=log_ratio,
    )
