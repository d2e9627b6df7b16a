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
from verl.workers.runtime import resolve_device

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

    def __post_init__(self) -> None:
        if self.actor_group is not None:
            self.actors = Actors(self.actor_group, self.config)
        self.rollouts = Rollouts(self.rollout_group)

    @property
    def groups(self) -> list[WorkerGroup]:
        return [g for g in (self.actor_group, self.rollout_group) if g is not None]

    def memory(self) -> dict[str, float]:
        return peak_memory(self.groups)

    def close(self) -> None:
        for group in self.groups:
            group.kill()


def start_workers(config: PPOConfig, stores: Sequence[Path], optimizer_steps: int, *, actors: bool = True) -> Workers:
    """Start Ray, reserve one bundle per rank and build all workers. `actors=False`: the run only generates."""
    trainer = config.trainer
    resources = Resources(trainer.nnodes, trainer.n_gpus_per_node, resolve_device(trainer.device))
    start_ray(None)
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
    )
    try:
        if actors:
            workers.actors.build(config, resources, stores, optimizer_steps)
        workers.rollouts.build(config, stores)
        print(f"workers: {'; '.join(f'{g.name} pid {_listed(g.pids())}' for g in workers.groups)}", flush=True)
    except BaseException:
        workers.close()
        raise
    return workers


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
