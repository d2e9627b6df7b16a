"""Policy losses: each gives a per-token loss (N,) and per-token indicators for the metrics. One file a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from verl.algorithms.policy_loss.cispo import cispo_loss
from verl.algorithms.policy_loss.geo_mean import geo_mean_loss
from verl.algorithms.policy_loss.gspo import gspo_loss
from verl.algorithms.policy_loss.reinforce import reinforce_loss
from verl.algorithms.policy_loss.vanilla import PolicyLoss, vanilla_loss

POLICY_LOSSES: Mapping[str, Callable[..., PolicyLoss]] = {
    "vanilla": vanilla_loss,
    "gspo": gspo_loss,
    "cispo": cispo_loss,
    "geo_mean": geo_mean_loss,
    "reinforce": reinforce_loss,
}
"""By `actor.policy_loss.loss_mode`; reinforce by `algorithm.rollout_correction.loss_type`."""

__all__ = ["POLICY_LOSSES", "PolicyLoss", "reinforce_loss", "vanilla_loss"]
