"""What every advantage estimator takes and gives.

Invariants of an estimator
- A failed score is not kept, and its advantage is 0.
- With fewer than two ok scores nothing of the group is kept.
- Equal scores give exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from verl.protocol import Score


@dataclass(frozen=True, slots=True)
class Advantages:
    """Of the n answers of one prompt: `values` (n,) float32, `keep` (n,) bool. `values` is 0 where not kept.

    Example: totals 1, 0 and a failed score give `values=[0.707, -0.707, 0]`, `keep=[True, True, False]`.
    """

    values: NDArray[np.float32]
    keep: NDArray[np.bool_]

    def __post_init__(self) -> None:
        assert self.values.shape == self.keep.shape, f"{self.values.shape} advantages but {self.keep.shape} keep flags"

    @property
    def dropped(self) -> bool:
        """The whole group leaves the step."""
        return not self.keep.any()


class AdvantageEstimator(Protocol):
    """One algorithm: the scores of one group to the advantages of its answers."""

    def __call__(self, scores: Sequence[Score], *, norm_by_std: bool = True) -> Advantages: ...
