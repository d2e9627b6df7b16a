"""GRPO (arXiv 2402.03300, outcome supervision): a reward against the mean of its group, in units of the group's spread.

Invariants: those of `base.py`, and
- Over the kept answers the advantages sum to 0.
- The mean and the standard deviation (ddof 1) are over the ok scores only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from verl.algorithms.advantage.base import Advantages
from verl.protocol import Score

# Rewards that differ by less than float32 rounding are equal: noise divided by a tiny spread is not a signal.
_EQUAL = 1e-6


def grpo_advantage(scores: Sequence[Score], *, norm_by_std: bool = True, eps: float = 1e-6) -> Advantages:
    """Advantages of the n answers of one prompt: (total - mean) / (std + eps).

    `norm_by_std=False` leaves the division out (Dr. GRPO, arXiv 2503.20783).
    """
    ok = np.array([score.is_ok for score in scores], dtype=bool)
    values = np.zeros(len(scores), dtype=np.float32)
    if ok.sum() < 2:
        return Advantages(values, np.zeros_like(ok))
    totals = np.array([score.total for score in scores if score.is_ok], dtype=np.float64)
    if np.ptp(totals) > _EQUAL * np.abs(totals).max():
        centred = totals - totals.mean()
        values[ok] = centred / (totals.std(ddof=1) + eps) if norm_by_std else centred
    return Advantages(values, ok)
