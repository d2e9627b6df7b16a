"""Ranks of a node are consecutive and on it alone, and a cluster that is too small is described by what it lacks."""

from __future__ import annotations

import itertools

import pytest

from verl.single_controller.placement import Node, choose, shortage

GPU = {"GPU": 1.0, "CPU": 0.01}
CPU = {"CPU": 0.01}


def node(name: str, *, free: int, total: int | None = None, cpus: float = 8.0) -> Node:
    every = free if total is None else total
    return Node(f"{name}{'0' * 20}", f"10.0.0.{ord(name) - 96}", {"GPU": every, "CPU": 8.0}, {"GPU": free, "CPU": cpus})


def names(chosen: tuple[Node, ...] | None) -> str | None:
    return None if chosen is None else "".join(found.id[0] for found in chosen)


def test_the_drivers_node_comes_first_and_the_order_is_always_the_same() -> None:
    nodes = [node(name, free=4) for name in "abcd"]
    for order in itertools.permutations(nodes):
        assert names(choose(order, GPU, count=3, ranks_per_node=4, driver=nodes[2].id)) == "cab"
        assert names(choose(order, GPU, count=4, ranks_per_node=2, driver="elsewhere")) == "abcd"


@pytest.mark.parametrize(
    ("free", "chosen"),
    [([4, 4], "ab"), ([4, 3], None), ([8, 0], None), ([3, 4, 5], "bc"), ([4], None), ([], None)],
)
def test_only_nodes_with_room_for_all_their_ranks_are_chosen(free: list[int], chosen: str | None) -> None:
    """Eight GPUs of one node are not two nodes of four."""
    nodes = [node(name, free=count) for name, count in zip("abc", free, strict=False)]
    assert names(choose(nodes, GPU, count=2, ranks_per_node=4, driver="")) == chosen


def test_ranks_on_a_cpu_take_one_node_each_however_many_would_fit_on_the_first() -> None:
    nodes = [node(name, free=0) for name in "ab"]
    assert names(choose(nodes, CPU, count=2, ranks_per_node=2, driver="")) == "ab"
    assert choose(nodes[:1], CPU, count=2, ranks_per_node=2, driver="") is None


def test_a_remainder_of_subtractions_still_holds_a_rank() -> None:
    left = 1.0 - 33 * 0.03  # 0.010000000000000009 or a little less
    assert Node("a", "", {}, {"CPU": min(left, 0.00999999999)}).room(CPU) == 1


def test_the_message_counts_nodes_and_gpus_and_names_who_lacks_what() -> None:
    nodes = [node("a", free=2, total=4), node("b", free=4)]
    text = shortage(nodes, GPU, count=3, ranks_per_node=4)
    assert text.startswith("1 of 3 nodes, 6 of 12 GPUs: "), text
    assert "10.0.0.1 (Ray node a0000000) lacks 2 GPU (2 free of 4)" in text, text
    assert "1 more must join (`ray start --address=...` there)" in text and "10.0.0.2" not in text, text


def test_the_message_names_cpus_where_they_are_what_is_missing() -> None:
    text = shortage([node("a", free=4, cpus=0.0)], GPU, count=1, ranks_per_node=4)
    assert text == "0 of 1 nodes, 0 of 4 GPUs: 10.0.0.1 (Ray node a0000000) lacks 0.04 CPU (0 free of 8)"


def test_gpus_beyond_the_asked_nodes_and_ranks_are_not_counted() -> None:
    """A third node is no help to the second, nor are spare GPUs."""
    nodes = [node("a", free=8), node("b", free=1, total=8), node("c", free=1, total=8)]
    assert shortage(nodes, GPU, count=2, ranks_per_node=4).startswith("1 of 2 nodes, 5 of 8 GPUs: 10.0.0.2 ")
