"""Scores for a batch of answers."""

from verl.workers.reward_manager.manager import RewardFailureRateError, RewardItem, RewardManager
from verl.workers.reward_manager.metrics import reward_metrics

__all__ = ["RewardFailureRateError", "RewardItem", "RewardManager", "reward_metrics"]
