"""Starts the workers of a run where the placement says, with the memory switches that the plan decided."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from verl.config import PPOConfig
from verl.models.policy import check_model_folder
from verl.protocol import Prompt
from verl.single_controller.cluster import Placement, Resources, reserve, start_ray
from verl.single_controller.group import WorkerGroup
from verl.single_controller.shared import check_shared
from verl.trainer.ppo.placement import plan_placement
from verl.trainer.ppo.switches import LargestPrompt, decide, without_plan
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
    """As the workers see it: without `auto`."""
    rewards: RewardPool | None = None
    """None: the driver scores."""

    def __post_init__(self) -> None:
        if self.actor_group is not None:
            self.actors = Actors(self.actor_group, self.config)
        rollout = self.config.actor_rollout_ref.rollout
        tp = rollout.tensor_model_parallel_size if rollout.name == "vllm" else 1
        self.rollouts = Rollouts(self.rollout_group, tp)
        self._weights: WeightSync | None = None
        self._asleep = False

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
        """Bring the actor's present weights into every engine, awake afterwards; metrics."""
        assert self._weights is not None and self.actor_group is not None, "sync before connect"
        if self._asleep:
            # In stages: the weights are overwritten before the cache takes the rest.
            self.actor_group.all("weights.make_room")
            self.rollout_group.all("wake", ["weights"])
        synced = self._weights(with_checksum=with_checksum)
        if self._asleep:
            self.rollout_group.all("wake", ["kv_cache"])
            self._asleep = False
        return {"weight_sync/bytes": float(synced.nbytes), "weight_sync/checked": float(synced.checked)}

    def rest(self) -> None:
        """The engines give their memory to the actor until the next `sync`, where the plan needs it."""
        if self.actor_group is not None and self.config.actor_rollout_ref.rollout.free_cache_engine:
            self.rollout_group.all("sleep", 2)
            self._asleep = True

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
    prompts: Sequence[Prompt] = (),
) -> Workers:
    """Start Ray, reserve a bundle per rank, plan the memory and build all workers.

    `actors=False`: the run only generates. Without a `manager` nothing is scored. `prompts` are those that will be
    trained on: the longest decides how much memory a micro-batch takes.
    """
    placement = plan_placement(config, resolve_device(config.trainer.device))
    start_ray(config.ray_kwargs.ray_init, nodes=config.trainer.nnodes)
    patience = config.trainer.ray_wait_timeout
    bundles = reserve(placement.actors, patience) if actors or placement.colocated else None
    own = bundles if placement.colocated else reserve(placement.rollouts, patience)
    check_nodes(config, [part for part in (bundles, own) if part is not None], stores, writes=actors)

    def group(name: str, where: Placement, resources: Resources) -> WorkerGroup:
        return WorkerGroup(
            name,
            bundles=where,
            size=resources.ranks,
            gpus=placement.gpu_share,
            threads=resources.threads,
            timeout=_CALL_TIMEOUT,
        )

    actor_group = group("actor", bundles, placement.actors) if actors else None
    config = _decide_memory(config, actor_group, prompts)
    workers = Workers(
        actor_group=actor_group,
        rollout_group=group("rollout", own, placement.rollouts),
        ranks=placement.gpus,
        device=placement.actors.device,
        config=config,
        rewards=None if manager is None else start_reward_pool(config, manager),
    )
    try:
        if actors:
            workers.actors.build(config, placement.actors, stores, optimizer_steps)
        workers.rollouts.build(config, stores, waits_for_weights=actors)
        if actors:
            workers.connect()
        started = [f"{g.name} pid {_listed(g.pids())}" for g in workers.groups]
        if workers.rewards is not None:
            started.append(f"reward pid {_listed(workers.rewards.ready(_START_TIMEOUT))}")
        print(f"workers: {'; '.join(started)}", flush=True)
        if any(g.several_nodes for g in workers.groups):
            actor_nodes = f"actor {bundles.describe()}; " if actors and bundles is not None else ""
            print(f"nodes: {actor_nodes}rollout {own.describe()}", flush=True)
    except BaseException:
        workers.close()
        raise
    return workers


def check_nodes(config: PPOConfig, parts: Sequence[Placement], stores: Sequence[Path], *, writes: bool) -> None:
    """Raises NotSharedError unless every node of `parts` sees outputs, model, adapter and images.

    `writes`: checkpoints too.
    """
    nodes = {node.id: node for part in parts for node in part.nodes}
    model = config.actor_rollout_ref.model
    inputs = {"actor_rollout_ref.model.path": check_model_folder(model.path)}
    if model.lora_adapter_path is not None:
        inputs["actor_rollout_ref.model.lora_adapter_path"] = Path(model.lora_adapter_path)
    inputs |= {f"image store {number} (data.image_cache_dir)": path for number, path in enumerate(stores)}
    outputs = Path(config.trainer.default_local_dir) if writes else None
    check_shared(list(nodes.values()), outputs=outputs, inputs=inputs)


def _decide_memory(config: PPOConfig, actors: WorkerGroup | None, prompts: Sequence[Prompt]) -> PPOConfig:
    """The config without `auto`; prints what was decided and why. Raises ValueError when the run cannot fit."""
    if actors is None or resolve_device(config.trainer.device) != "cuda":
        return without_plan(config)
    folder = check_model_folder(config.actor_rollout_ref.model.path)
    decided, plan = decide(config, folder, LargestPrompt.of(prompts), device=actors.gpu_bytes())
    print(plan.table(), flush=True)
    return decided


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
