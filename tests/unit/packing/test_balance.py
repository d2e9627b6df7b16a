"""Invariants of the plan over ranks and micro-batches, over random mini-batches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.packing.balance import (
    PATCH_WEIGHT,
    assign_to_ranks,
    cut_group,
    group_tokens,
    plan_mini_batch,
    split_micro_batches,
)
from verl.protocol import Prompt, TrainGroup, TrainSample


def make_groups(shapes: list[tuple[int, int, list[int]]]) -> list[TrainGroup]:
    """(prompt tokens, images, answer lengths) each."""
    groups, index = [], 0
    for number, (head, images, lengths) in enumerate(shapes):
        grids = ((1, 4, 4),) * images
        prompt = Prompt(f"p{number}", number, "test", np.zeros(head, np.int32), ("k",) * images, grids, "A")
        samples = []
        for length in lengths:
            samples.append(TrainSample(index, np.zeros(length, np.int32), np.ones(length, np.float32)))
            index += 1
        groups.append(TrainGroup(prompt, tuple(samples)))
    return groups


shapes = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 3), st.lists(st.integers(1, 60), min_size=1, max_size=8)), max_size=8
)
budgets = st.integers(1, 300).map(float)


def indices(groups: list[TrainGroup]) -> list[int]:
    return [s.index for g in groups for s in g.samples]


@given(shapes, st.integers(1, 5), budgets, st.booleans())
@settings(max_examples=150)
def test_every_sample_appears_exactly_once_and_a_group_stays_on_one_rank(shapes, ranks, budget, balanced) -> None:
    groups = make_groups(shapes)
    plan = plan_mini_batch(groups, ranks=ranks, token_budget=budget, patch_weight=PATCH_WEIGHT, balanced=balanced)
    assert Counter(i for rank in plan for micro in rank for i in indices(micro)) == Counter(indices(groups))
    owners: dict[str, set[int]] = {}
    for rank, micro_batches in enumerate(plan):
        for micro in micro_batches:
            for group in micro:
                owners.setdefault(group.prompt.uid, set()).add(rank)
    assert all(len(ranks) == 1 for ranks in owners.values()), owners


@given(shapes, st.integers(1, 5), budgets)
@settings(max_examples=100)
def test_every_rank_has_the_same_number_of_micro_batches(shapes, ranks, budget) -> None:
    plan = plan_mini_batch(make_groups(shapes), ranks=ranks, token_budget=budget, patch_weight=PATCH_WEIGHT)
    assert len(plan) == ranks and len({len(micro_batches) for micro_batches in plan}) == 1, plan


@given(shapes, budgets)
@settings(max_examples=150)
def test_no_micro_batch_exceeds_the_budget_unless_a_single_answer_does(shapes, budget) -> None:
    for micro in split_micro_batches(make_groups(shapes), budget, PATCH_WEIGHT):
        cost = sum(group_tokens(g, PATCH_WEIGHT) for g in micro)
        assert cost <= budget + 1e-9 or len(indices(micro)) == 1, f"{cost} over {budget} with {indices(micro)}"


@given(shapes, st.integers(1, 4), budgets)
@settings(max_examples=50)
def test_the_plan_is_a_function_of_its_arguments(shapes, ranks, budget) -> None:
    groups = make_groups(shapes)
    plans = [
        [[indices(m) for m in rank] for rank in plan_mini_batch(groups, ranks=ranks, token_budget=budget)]
        for _ in range(2)
    ]
    assert plans[0] == plans[1]


@given(shapes, budgets)
@settings(max_examples=100)
def test_cut_pieces_repeat_the_prompt_and_keep_the_order_of_siblings(shapes, budget) -> None:
    for group in make_groups(shapes):
        pieces = cut_group(group, budget, PATCH_WEIGHT)
        assert all(p.prompt is group.prompt and p.samples for p in pieces)
        assert indices(pieces) == indices([group])


def test_a_group_within_the_budget_is_not_cut() -> None:
    (group,) = make_groups([(10, 1, [5, 5, 5])])
    assert group_tokens(group, PATCH_WEIGHT) == 25 + 16 * PATCH_WEIGHT
    assert len(cut_group(group, 25 + 16 * PATCH_WEIGHT, PATCH_WEIGHT)) == 1
    assert [len(p.samples) for p in cut_group(group, 28, PATCH_WEIGHT)] == [2, 1]


@given(st.lists(st.integers(1, 100).map(float), max_size=20), st.integers(1, 6))
def test_loads_of_ranks_differ_by_at_most_one_item(costs, ranks) -> None:
    assigned = assign_to_ranks(costs, ranks)
    assert sorted(i for rank in assigned for i in rank) == list(range(len(costs)))
    loads = [sum(costs[i] for i in rank) for rank in assigned]
    assert max(loads) - min(loads) <= max(costs, default=0.0)


def test_unbalanced_plans_share_out_by_count() -> None:
    groups = make_groups([(100, 0, [100]), (1, 0, [1]), (1, 0, [1]), (1, 0, [1])])
    counts = {
        balanced: [
            sum(len(m) for m in rank) for rank in plan_mini_batch(groups, ranks=2, token_budget=1e9, balanced=balanced)
        ]
        for balanced in (True, False)
    }
    assert counts == {True: [1, 3], False: [2, 2]}


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_mini_batch_of_nothing_is_a_plan_of_no_micro_batches(ranks) -> None:
    assert plan_mini_batch([], ranks=ranks, token_budget=10.0) == [[]] * ranks
