"""Which rank runs where; imports no ray."""

from __future__ import annotations

from collections.abc import Sequence


def by_node(nodes: Sequence[str]) -> tuple[int, ...]:
    """Bundle indices ordered so that those of a node are consecutive; `nodes[i]` is the node of bundle i.

    Ray numbers bundles in the order they were asked for and places them where it likes. HSDP shards over consecutive
    ranks, and those must not reach over the network. Nodes come in the order of their first bundle.
    """
    first = {node: nodes.index(node) for node in nodes}
    return tuple(sorted(range(len(nodes)), key=lambda index: (first[nodes[index]], index)))
