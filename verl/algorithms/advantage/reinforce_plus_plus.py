"""REINFORCE++ (arXiv 2501.03262) for rewards on the last token and no discount: rewards in units of the whole step.

Invariants
- A failed score is not kept; a group of one answer is.
- Over the kept tokens of a step the advantages have mean 0 and variance 1 (all 0 where all rewards are equal).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from verl.algorithms.advantage.base import Advantages
from verl.protocol import Score

_EQUAL = 1e-6  # as in grpo.py: rewards this close are equal


def reinforce_plus_plus_advantages(
    groups: Sequence[Sequence[Score]], lengths: Sequence[Sequence[int]]
) -> list[Advantages]:
    """Advantages of all groups of a step; `lengths` are the answers' tokens: each counts in mean and spread."""
    ok = [np.array([score.is_ok for score in scores], dtype=bool) for scores in groups]
    values = [np.zeros(len(scores), dtype=np.float32) for scores in groups]
    totals = np.array([s.total for scores in groups for s in scores if s.is_ok], dtype=np.float64)
    tokens = np.concatenate([np.asarray(sizes)[kept] for sizes, kept in zip(lengths, ok, strict=True)] or [totals])
    if len(totals) > 1 and np.ptp(totals) > _EQUAL * np.abs(totals).max():
        mean = np.average(totals, weights=tokens)
        spread = np.sqrt(np.average((totals - mean) ** 2, weights=tokens))
        white = iter((totals - mean) / spread)
        for kept, of_group in zip(ok, values, strict=True):
            of_group[kept] = [next(white) for _ in range(int(kept.sum()))]
    return [Advantages(v, keep) for v, keep in zip(values, ok, strict=True)]
