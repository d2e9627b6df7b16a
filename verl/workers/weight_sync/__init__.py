"""Moves the actor's weights to the rollout engines. `shared_memory` serves CPU workers on one node."""
