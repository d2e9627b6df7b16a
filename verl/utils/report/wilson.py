"""The standard error of a share, also at 0 and 1 (pure)."""

from __future__ import annotations

import math


def wilson_half_width(share: float, n: int) -> float:
    """Half the width of Wilson's score interval at one standard error (z = 1), of a share in [0, 1] of n >= 1 rows.

    z / (1 + z^2 / n) * sqrt(p (1 - p) / n + z^2 / (4 n^2)): E. B. Wilson, Probable inference, the law of succession,
    and statistical inference, JASA 22 (1927), 209-212. Far from 0 and 1 it is sqrt(p (1 - p) / n) but for 1 / n of it;
    at 0 and 1, where that formula claims certainty, it is about 1 / (2 n).
    """
    return math.sqrt(share * (1 - share) / n + 1 / (4 * n * n)) / (1 + 1 / n)
