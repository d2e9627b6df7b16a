"""Ranks of a node are consecutive, so that a shard group of HSDP does not reach over the network."""

from __future__ import annotations

from itertools import pairwise

import pytest

from verl.single_controller.placement import by_node


@pytest.mark.parametrize(
    ("nodes", "order"),
    [
        ("aaaa", (0, 1, 2, 3)),
        ("abab", (0, 2, 1, 3)),
        ("baab", (0, 3, 1, 2)),
        ("abcabc", (0, 3, 1, 4, 2, 5)),
        ("", ()),
    ],
)
def test_ranks_of_a_node_are_consecutive_and_every_bundle_is_used_once(nodes: str, order: tuple[int, ...]) -> None:
    assert by_node(list(nodes)) == order
    placed = "".join(nodes[index] for index in by_node(list(nodes)))
    runs = sum(one != other for one, other in pairwise(placed))
    assert runs == max(0, len(set(nodes)) - 1), f"{placed}: a node's ranks lie apart"


def test_shard_groups_of_a_divisor_of_the_nodes_ranks_stay_on_one_node() -> None:
    nodes = list("abbaabab")
    order = by_node(nodes)
    groups = [{nodes[index] for index in order[i : i + 2]} for i in range(0, len(order), 2)]
    assert [len(group) for group in groups] == [1, 1, 1, 1], groups
