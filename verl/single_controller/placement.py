"""Which rank runs on which node; imports no ray.

Invariants
- Rank r runs on node r // ranks_per_node, so that a shard group of HSDP that divides a node's ranks stays on it.
- No two of the chosen nodes are the same, and each holds all of its ranks.
- The driver's node comes first where it is among them: rank 0, where all ranks meet, is then next to the driver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A machine of the cluster (a raylet) and its resources, by Ray's names."""

    id: str
    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]

    def __str__(self) -> str:
        return f"{self.address} (Ray node {self.id[:8]})"

    def room(self, bundle: Mapping[str, float]) -> int:
        """How many ranks that ask for `bundle` fit beside what runs there now."""
        # Ray counts in units of 1/10000: what is left after subtractions is no exact multiple.
        return min(int(self.free.get(name, 0.0) / need + 1e-6) for name, need in bundle.items())


def choose(
    nodes: Sequence[Node], bundle: Mapping[str, float], *, count: int, ranks_per_node: int, driver: str
) -> tuple[Node, ...] | None:
    """`count` nodes with room for `ranks_per_node` bundles each; None while there are too few.

    The driver's node comes first, the others by address and id: the same cluster gives the same order.
    """
    fit = [node for node in nodes if node.room(bundle) >= ranks_per_node]
    fit.sort(key=lambda node: (node.id != driver, node.address, node.id))
    return tuple(fit[:count]) if len(fit) >= count else None


def shortage(nodes: Sequence[Node], bundle: Mapping[str, float], *, count: int, ranks_per_node: int) -> str:
    """E.g. `1 of 2 nodes, 3 of 4 GPUs: 10.0.0.2 (Ray node ab12cd34) lacks 1 GPU (1 of 2 free); ...`."""
    rooms = [(min(node.room(bundle), ranks_per_node), node) for node in nodes]
    rooms.sort(key=lambda pair: (-pair[0], pair[1].address, pair[1].id))
    ready = sum(room == ranks_per_node for room, _ in rooms)
    held = sum(room for room, _ in rooms[:count])
    thing = "GPUs" if "GPU" in bundle else "CPU ranks"
    lacking = [_lacks(node, bundle, ranks_per_node) for room, node in rooms[:count] if room < ranks_per_node]
    if len(nodes) < count:
        lacking.append(f"{count - len(nodes)} more must join (`ray start --address=...` there)")
    return f"{min(ready, count)} of {count} nodes, {held} of {count * ranks_per_node} {thing}: {'; '.join(lacking)}"


def _lacks(node: Node, bundle: Mapping[str, float], ranks: int) -> str:
    missing = []
    for name, need in bundle.items():
        free, total = node.free.get(name, 0.0), node.total.get(name, 0.0)
        if free + 1e-6 < need * ranks:
            missing.append(f"{need * ranks - free:g} {name} ({free:g} free of {total:g})")
    return f"{node} lacks {', '.join(missing)}"
