"""PPO's clipped surrogate (arXiv 1707.06347, eq. 7) with a separate upper bound (DAPO, arXiv 2503.14476) and a dual
clip for negative advantages (arXiv 1912.09729)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MAX_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """All (N,): the loss of each token, and 0/1 indicators of clipping above and below, and the log-ratio."""

    loss: Tensor
    clipped: Tensor
    clipped_lower: Tensor
    log_ratio: Tensor


def vanilla_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
    answers: Tensor | None = None,
) -> PolicyLoss:
    """Per-token loss; all inputs (N,). `clip_dual` > 1 bounds the loss of a negative advantage.

    `answers` is the interface of losses that need it; a token's loss here is its own.
    """
    log_ratio = (log_probs - old_log_probs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    upper = torch.maximum(plain, clipped)
    bound = -advantages * clip_dual
    dual = torch.minimum(upper, bound)
    negative = advantages < 0
    loss = torch.where(negative, dual, upper)
    return PolicyLoss(
        loss=loss,
        clipped=(clipped > plain).float().detach(),
        clipped_lower=((upper > bound) & negative).float().detach(),
        log_ratio=log_ratio.detach(),
    )
