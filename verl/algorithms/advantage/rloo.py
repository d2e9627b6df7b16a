"""RLOO (arXiv 2402.14740): a reward against the mean of the other answers of its group.

Invariants: those of `base.py`, and over the kept answers the advantages sum to 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from verl.algorithms.advantage.base import Advantages
from verl.protocol import Score

_EQUAL = 1e-6  # as in grpo.py: rewards this close are equal


def rloo_advantage(scores: Sequence[Score], *, norm_by_std: bool = True) -> Advantages:
    """Advantages of the n answers of one prompt: total - mean of the others. There is no division by the spread."""
    ok = np.array([score.is_ok for score in scores], dtype=bool)
    values = np.zeros(len(scores), dtype=np.float32)
    count = int(ok.sum())
    if count < 2:
        return Advantages(values, np.zeros_like(ok))
    totals = np.array([score.total for score in scores if score.is_ok], dtype=np.float64)
    if np.ptp(totals) > _EQUAL * np.abs(totals).max():
        values[ok] = (totals - totals.mean()) * count / (count - 1)
    return Advantages(values, ok)
