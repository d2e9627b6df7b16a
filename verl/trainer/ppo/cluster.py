"""Starts the workers of a run: colocated, one bundle per rank holding an actor and a rollout worker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from verl.config import PPOConfig
from verl.single_controller.cluster import Resources, reserve, start_ray
from verl.single_controller.group import WorkerGroup
from verl.trainer.ppo.workers import Actors, Rollouts, peak_memory
from verl.workers.reward_manager import RewardManager
from verl.workers.reward_manager.pool import RewardPool, default_workers
from verl.workers.runtime import resolve_device
from verl.workers.weight_sync.sync import WeightSync, choose_transport

_CALL_TIMEOUT = float(os.environ.get("VERL_CALL_TIMEOUT", "7200"))  # seconds until a silent worker counts as hung
_START_TIMEOUT = float(os.environ.get("VERL_START_TIMEOUT", "600"))


@dataclass
class Workers:
    """All worker groups of a run."""

    actor_group: WorkerGroup | None
    rollout_group: WorkerGroup
    ranks: int
    device: str
    config: PPOConfig
    rewards: RewardPool | None = None
    """None: the driver scores."""

    def __post_init__(self) -> None:
        if self.actor_group is not None:
            self.actors = Actors(self.actor_group, self.config)
        rollout = self.config.actor_rollout_ref.rollout
        tp = rollout.tensor_model_parallel_size if rollout.name == "vllm" else 1
        self.rollouts = Rollouts(self.rollout_group, tp)
        self._weights: WeightSync | None = None

    @property
    def groups(self) -> list[WorkerGroup]:
        return [g for g in (self.actor_group, self.rollout_group) if g is not None]

    def memory(self) -> dict[str, float]:
        return peak_memory(self.groups)

    def connect(self) -> None:
        """Open the way from the actor's weights to the engines and check that both hold the same model."""
        assert self.actor_group is not None, "a run without an actor has no weights to send"
        transport = choose_transport(colocated=self.config.actor_rollout_ref.hybrid_engine)
        self._weights = WeightSync(self.actor_group, self.rollout_group, transport)

    def sync(self, *, with_checksum: bool) -> dict[str, float]:
        """Bring the actor's present weights into every engine; metrics."""
        assert self._weights is not None, "sync before connect"
        synced = self._weights(with_checksum=with_checksum)
        return {"weight_sync/bytes": float(synced.nbytes), "weight_sync/checked": float(synced.checked)}

    def close(self) -> None:
        for group in self.groups:
            group.kill()
        if self.rewards is not None:
            self.rewards.close()


def start_reward_pool(config: PPOConfig, manager: RewardManager) -> RewardPool | None:
    """Processes that score like `manager`."""
    return RewardPool(manager, workers=config.reward.num_workers or default_workers(), timeout=_CALL_TIMEOUT)


def start_workers(
    config: PPOConfig,
    stores: Sequence[Path],
    optimizer_steps: int,
    manager: RewardManager | None,
    *,
    actors: bool = True,
) -> Workers:
    """Start Ray, reserve one bundle per rank and build all workers. `actors=False`: the run only generates.

    Without a `manager` nothing is scored.
    """
    trainer = config.trainer
    resources = Resources(trainer.nnodes, trainer.n_gpus_per_node, resolve_device(trainer.device))
    start_ray()
    bundles = reserve(resources, _START_TIMEOUT)
    gpu_share = 0.5 if resources.device == "cuda" else 0.0

    def group(name: str) -> WorkerGroup:
        return WorkerGroup(
            name,
            bundles=bundles,
            size=resources.ranks,
            gpus=gpu_share,
            threads=resources.threads,
            timeout=_CALL_TIMEOUT,
        )

    workers = Workers(
        actor_group=group("actor") if actors else None,
        rollout_group=group("rollout"),
        ranks=resources.ranks,
        device=resources.device,
        config=config,
        rewards=None if manager is None else start_reward_pool(config, manager),
    )
    try:
        if actors:
            workers.actors.build(config, resources, stores, optimizer_steps)
        workers.rollouts.build(config, stores, waits_for_weights=actors)
        if actors:
            workers.connect()
        started = [f"{g.name} pid {_listed(g.pids())}" for g in workers.groups]
        if workers.rewards is not None:
            started.append(f"reward pid {_listed(workers.rewards.ready(_START_TIMEOUT))}")
        print(f"workers: {'; '.join(started)}", flush=True)
    except BaseException:
        workers.close()
        raise
    return workers


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
