"""Where the processes of a run stand: on the same GPUs, or actor and rollout on GPUs of their own. Pure planning."""

from __future__ import annotations

from dataclasses import dataclass

from verl.config import PPOConfig
from verl.single_controller.cluster import Resources


@dataclass(frozen=True)
class PlacementPlan:
    """Bundles of the actor and of the rollout; `colocated`: they are the same ones."""

    actors: Resources
    rollouts: Resources
    colocated: bool

    @property
    def gpus(self) -> int:
        """GPUs of the whole run (on a CPU: ranks)."""
        return self.actors.ranks if self.colocated else self.actors.ranks + self.rollouts.ranks

    @property
    def gpu_share(self) -> float:
        """Of its bundle's GPU that a worker asks Ray for."""
        if self.actors.device != "cuda":
            return 0.0
        return 0.5 if self.colocated else 1.0

    def describe(self) -> str:
        if self.colocated:
            return f"{self.actors.ranks} ranks, actor and rollout side by side"
        return f"{self.actors.ranks} actor ranks and {self.rollouts.ranks} rollout ranks on {self.actors.device} each"


def plan_placement(config: PPOConfig, device: str, *, as_on_gpus: bool = False) -> PlacementPlan:
    """The plan of `actor_rollout_ref.hybrid_engine`. Raises ValueError for a split run, or engine, on a CPU.

    `as_on_gpus` is for tests: a CPU is then given what only GPUs make sense for.
    """
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    tp = rollout.tensor_model_parallel_size
    if device == "cpu" and rollout.name == "vllm" and tp > 1 and not as_on_gpus:
        raise ValueError(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={tp} cuts the model over GPUs, and this run is on "
            "the CPU: set it to 1"
        )
    actors = Resources(trainer.nnodes, trainer.n_gpus_per_node, device)
    if config.actor_rollout_ref.hybrid_engine:
        return PlacementPlan(actors, actors, colocated=True)
    if device == "cpu" and not as_on_gpus:
        raise ValueError(
            "actor_rollout_ref.hybrid_engine=False puts actor and rollout on GPUs of their own, and this run is on "
            "the CPU: set actor_rollout_ref.hybrid_engine=True"
        )
    return PlacementPlan(actors, Resources(rollout.nnodes, rollout.n_gpus_per_node, device), colocated=False)
