"""Ray start-up and placement: one bundle per rank, the same way on a laptop and on many nodes."""

from __future__ import annotations

import logging
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.config.ppo import RayInitConfig
from verl.single_controller.placement import Node, choose, shortage
from verl.single_controller.worker import DEFAULT_ENV

log = logging.getLogger(__name__)

_CPU_SHARE = 0.01  # a bundle may not be empty; workers on CPU ask for nothing more, or two cores could not hold four
_SAY_EVERY = 10.0
_TAKE_TIMEOUT = 10.0


class ClusterError(RuntimeError):
    """There is no Ray cluster, or it lacks what the run asks for; the message says what and what to do."""


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


def start_ray(settings: RayInitConfig | None = None, *, nodes: int = 1) -> None:
    """Join a cluster, or start Ray on this machine with at least four CPU slots.

    The cluster is that of `settings.address`, else of RAY_ADDRESS, else for several nodes the one that `ray start` has
    left running on this machine. Raises ClusterError when there is none.
    """
    if ray.is_initialized():
        return
    asked = os.environ.get("RAY_ADDRESS") if settings is None else settings.address or os.environ.get("RAY_ADDRESS")
    address = asked or ("auto" if nodes > 1 else "local")
    given = {} if settings is None else _arguments(settings)
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True} | given
    if address == "local":
        options = {"num_cpus": max(4, os.cpu_count() or 1), "include_dashboard": False} | options
        env = {name: os.environ.get(name, value) for name, value in DEFAULT_ENV.items()}
    else:
        # A node of the cluster may have values of its own; workers fill in what is set nowhere.
        env = {name: os.environ[name] for name in DEFAULT_ENV if name in os.environ}
    if settings is not None:
        env |= {name: str(value) for name, value in settings.runtime_env.env_vars.items()}
    try:
        ray.init(address=address, runtime_env={"env_vars": env}, **options)
    except ConnectionError as error:
        raise ClusterError(
            f"no Ray cluster at {address!r}: run `ray start` on every node, and name the first in RAY_ADDRESS or "
            f"ray_kwargs.ray_init.address; where `ray start` says that it asks for a token, export RAY_AUTH_MODE=token "
            f"here too (docs/nodes.md): {error}"
        ) from error


def _arguments(settings: RayInitConfig) -> dict[str, Any]:
    """What the user set of `ray.init`'s arguments, address and environment aside."""
    arguments = {
        "num_cpus": settings.num_cpus,
        "num_gpus": settings.num_gpus,
        "object_store_memory": settings.object_store_memory,
        "include_dashboard": settings.include_dashboard,
        "dashboard_host": settings.dashboard_host,
        "dashboard_port": settings.dashboard_port,
        "namespace": settings.namespace,
        "log_to_driver": settings.log_to_driver,
        "_temp_dir": settings._temp_dir,
    }
    return {name: value for name, value in arguments.items() if value is not None}


@dataclass(frozen=True)
class Placement:
    """Reserved bundles, one per rank in the order of ranks: the ranks of a node are consecutive."""

    group: PlacementGroup
    nodes: tuple[Node, ...]
    ranks_per_node: int

    def of_rank(self, rank: int) -> PlacementGroupSchedulingStrategy:
        """Where rank `rank` runs."""
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank)

    def node_of(self, rank: int) -> Node:
        return self.nodes[rank // self.ranks_per_node]

    def describe(self) -> str:
        """E.g. `ranks 0-3 on 10.0.0.1 (Ray node ab12cd34), ranks 4-7 on ...`."""
        size = self.ranks_per_node
        spans = [f"{i * size}-{(i + 1) * size - 1}" if size > 1 else str(i) for i in range(len(self.nodes))]
        return ", ".join(f"rank{'s' * (size > 1)} {span} on {n}" for span, n in zip(spans, self.nodes, strict=True))


def reserve(resources: Resources, timeout: float) -> Placement:
    """A bundle per rank on `resources.nodes` nodes that hold `ranks_per_node` each.

    Says every 10 s what is still missing. Raises ClusterError with that after `timeout` seconds.
    """
    bundle = {"GPU": 1.0, "CPU": _CPU_SHARE} if resources.device == "cuda" else {"CPU": _CPU_SHARE}
    driver = ray.get_runtime_context().get_node_id()
    begin, said = time.monotonic(), -math.inf
    while True:
        nodes = living_nodes()
        chosen = choose(nodes, bundle, count=resources.nodes, ranks_per_node=resources.ranks_per_node, driver=driver)
        placed = None if chosen is None else _take(chosen, resources.ranks_per_node, bundle)
        if placed is not None:
            return placed
        waited = time.monotonic() - begin
        missing = shortage(nodes, bundle, count=resources.nodes, ranks_per_node=resources.ranks_per_node)
        if waited >= timeout:
            raise ClusterError(
                f"the cluster lacks what trainer.nnodes x trainer.n_gpus_per_node asks for (split: "
                f"actor_rollout_ref.rollout.*): {missing}; gave up after {waited:.0f} s (trainer.ray_wait_timeout)"
            )
        if waited - said >= _SAY_EVERY:
            log.warning("%s; waiting, %.0f of %.0f s", missing, waited, timeout)
            said = waited
        time.sleep(min(1.0, timeout - waited))


def living_nodes() -> list[Node]:
    """The cluster as it is now."""
    # Ray has no public call for what is free by node that works without its dashboard.
    free = available_resources_per_node()
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def why_dead(node: Node) -> str | None:
    """Why Ray gave a node up; None while it counts as alive."""
    for entry in ray.nodes():
        if entry["NodeID"] == node.id and not entry["Alive"]:
            return entry.get("DeathReasonMessage") or "no reason given"
    return None


def _take(nodes: tuple[Node, ...], ranks_per_node: int, bundle: dict[str, float]) -> Placement | None:
    """Reserve on exactly these nodes; None when somebody else was faster or one of them went away."""
    places = [{"ray.io/node-id": node.id} for node in nodes for _ in range(ranks_per_node)]
    group = placement_group([bundle] * len(places), strategy="PACK", bundle_label_selector=places)
    if not group.wait(timeout_seconds=_TAKE_TIMEOUT):
        remove_placement_group(group)
        return None
    where = placement_group_table(group)["bundles_to_node_id"]
    found = [where[rank] for rank in range(len(places))]
    assert found == [place["ray.io/node-id"] for place in places], f"Ray put the bundles elsewhere: {found}"
    return Placement(group, nodes, ranks_per_node)
