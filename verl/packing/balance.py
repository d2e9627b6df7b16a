"""Which rank computes which groups, in which micro-batches. Pure planning on the driver.

Invariants
- Every sample appears exactly once; the samples of one group stay on one rank.
- Every rank has the same number of micro-batches (some may be empty), so collectives match.
- No micro-batch exceeds the token budget unless it holds a single answer that does so alone.
- The plan is a function of its arguments: two drivers make the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence

from verl.protocol import TrainGroup, TrainSample

PATCH_WEIGHT = 0.24
"""What a patch costs beside a text token of the same forward at the 3B: 0.67e9 tower against 2.8e9 text parameters.
Other models have their own (`verl.models.sizes`)."""
Plan = list[list[list[TrainGroup]]]
"""plan[rank][micro_batch] is a list of groups; all ranks have equally many micro-batches."""


def group_tokens(group: TrainGroup, patch_weight: float) -> float:
    """Cost of a group in tokens: its prompt once, every answer, and its patches at `patch_weight` tokens each."""
    patches = sum(t * h * w for t, h, w in group.prompt.image_grids)
    return len(group.prompt.token_ids) + sum(len(s.token_ids) for s in group.samples) + patch_weight * patches


def cut_group(group: TrainGroup, budget: float, patch_weight: float) -> list[TrainGroup]:
    """Cut a group over the budget into sub-groups that each repeat the prompt; siblings keep their order."""
    head = group_tokens(TrainGroup(group.prompt, ()), patch_weight)
    pieces: list[list[TrainSample]] = [[]]
    used = head
    for sample in group.samples:
        if pieces[-1] and used + len(sample.token_ids) > budget:
            pieces.append([])
            used = head
        pieces[-1].append(sample)
        used += len(sample.token_ids)
    return [TrainGroup(group.prompt, tuple(piece)) for piece in pieces if piece]


def assign_to_ranks(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Largest first to the least loaded rank; indices of each rank in their first order."""
    loads = [0.0] * ranks
    assigned: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        loads[rank] += costs[index]
        assigned[rank].append(index)
    return [sorted(indices) for indices in assigned]


def split_micro_batches(groups: Sequence[TrainGroup], budget: float, patch_weight: float) -> list[list[TrainGroup]]:
    """First-fit decreasing of (cut) groups into micro-batches of at most `budget` tokens."""
    pieces = [piece for group in groups for piece in cut_group(group, budget, patch_weight)]
    order = sorted(range(len(pieces)), key=lambda i: (-group_tokens(pieces[i], patch_weight), i))
    bins: list[list[int]] = []
    loads: list[float] = []
    for index in order:
        cost = group_tokens(pieces[index], patch_weight)
        place = next((b for b, load in enumerate(loads) if load + cost <= budget), None)
        if place is None:
            bins.append([])
            loads.append(0.0)
            place = len(bins) - 1
        bins[place].append(index)
        loads[place] += cost
    return [[pieces[i] for i in sorted(members)] for members in bins]


def plan_mini_batch(
    groups: Sequence[TrainGroup], *, ranks: int, token_budget: float, patch_weight: float = 0.0, balanced: bool = True
) -> Plan:
    """Spread groups over ranks by cost (by count, when not `balanced`) and cut each rank's share into micro-batches.

    See the module's invariants.
    """
    costs = [group_tokens(g, patch_weight) if balanced else 1.0 for g in groups]
    shares = [[groups[i] for i in indices] for indices in assign_to_ranks(costs, ranks)]
    plan = [split_micro_batches(share, token_budget, patch_weight) for share in shares]
    most = max(len(micro_batches) for micro_batches in plan)
    return [micro_batches + [[] for _ in range(most - len(micro_batches))] for micro_batches in plan]
