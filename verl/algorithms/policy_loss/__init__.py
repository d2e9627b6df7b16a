"""Policy losses: each gives a per-token loss (N,) and per-token indicators for the metrics. One file a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from verl.algorithms.policy_loss.reinforce import reinforce_loss
from verl.algorithms.policy_loss.vanilla import PolicyLoss, vanilla_loss

POLICY_LOSSES: Mapping[str, Callable[..., PolicyLoss]] = {"vanilla": vanilla_loss, "reinforce": reinforce_loss}

__all__ = ["POLICY_LOSSES", "PolicyLoss", "reinforce_loss", "vanilla_loss"]
