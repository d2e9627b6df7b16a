"""Processes that hold state: actor, rollout engines, weight sync, reward scoring."""
