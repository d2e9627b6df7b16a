"""Ray start-up and placement: one bundle per rank, the same way on a laptop and on many nodes."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.single_controller.placement import by_node

log = logging.getLogger(__name__)

_CPU_SHARE = 0.01  # a bundle may not be empty; workers on CPU ask for nothing more, or two cores could not hold four


@dataclass(frozen=True)
class Resources:
    """What a run asks of the cluster."""

    nodes: int
    ranks_per_node: int
    device: str
    """cpu or cuda"""

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def threads(self) -> int:
        """CPU threads of a worker: actor and rollout phases alternate, so each may use its rank's share of the node.

        OMP_NUM_THREADS of the driver wins: it is how a user keeps a run from taking the whole machine.
        """
        asked = os.environ.get("OMP_NUM_THREADS", "")
        return int(asked) if asked.isdigit() else max(1, (os.cpu_count() or 1) // self.ranks_per_node)


def start_ray() -> None:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine with at least four CPU slots."""
    if ray.is_initialized():
        return
    env = {name: os.environ.get(name, value) for name, value in _DEFAULT_ENV.items()}
    options = {"logging_level": logging.WARNING, "log_to_driver": True, "runtime_env": {"env_vars": env}}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**options)
    else:
        ray.init(address="local", num_cpus=max(4, os.cpu_count() or 1), include_dashboard=False, **options)


_DEFAULT_ENV = {
    "TOKENIZERS_PARALLELISM": "true",
    "NCCL_DEBUG": "WARN",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass(frozen=True)
class Placement:
    """Reserved bundles in the order of ranks: the ranks of a node are consecutive."""

    group: PlacementGroup
    bundles: tuple[int, ...]
    """Index of each rank's bundle in `group`."""

    def of_rank(self, rank: int) -> PlacementGroupSchedulingStrategy:
        """Where rank `rank` runs."""
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.bundles[rank])


def reserve(resources: Resources, timeout: float) -> Placement:
    """One bundle per rank, ranks of a node side by side. Raises TimeoutError saying what the cluster has and lacks."""
    bundle = {"GPU": 1.0, "CPU": _CPU_SHARE} if resources.device == "cuda" else {"CPU": _CPU_SHARE}
    group = placement_group([bundle] * resources.ranks, strategy="PACK")
    begin = time.monotonic()
    while not group.wait(timeout_seconds=10):
        waited = time.monotonic() - begin
        have = ray.cluster_resources()
        state = (
            f"{resources.ranks} bundles of {bundle}; the cluster has CPU={have.get('CPU', 0)} GPU={have.get('GPU', 0)}"
        )
        if waited > timeout:
            raise TimeoutError(
                f"could not reserve {state} within {timeout:.0f} s: lower trainer.n_gpus_per_node or nnodes"
            )
        log.warning("waiting for %s (%.0f s)", state, waited)
    node_of = placement_group_table(group)["bundles_to_node_id"]
    return Placement(group, by_node([node_of[index] for index in range(resources.ranks)]))
