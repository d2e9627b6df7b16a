"""The numeric modality: a series as digits in the prompt, in place of its plot.

Invariants
- The text is a function of series, format and channel names; the answer format and the class names stay the plot's.
- No number is written as a negative zero.
- What was lost (rounding, averaging) is stated in the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verl.timeseries.readers import Series


@dataclass(frozen=True, kw_only=True)
class NumericFormat:
    """How many decimals, what stands between numbers, and how long series are shortened.

    Raises ValueError on values that cannot be written or read back.
    """

    decimals: int = 2
    separator: str = " "
    points: int | None = None
    """Longer series become at most that many means of equal blocks; None: every point is written."""

    def __post_init__(self) -> None:
        if not 0 <= self.decimals <= 8:
            raise ValueError(f"numeric.decimals={self.decimals} must lie in 0 to 8")
        if not self.separator or any(c.isdigit() or c in "+-.<>" for c in self.separator):
            raise ValueError(f"numeric.separator={self.separator!r} must hold no digit, sign, point or angle bracket")
        if self.points is not None and self.points < 2:
            raise ValueError(f"numeric.points={self.points} must be at least 2, or null")

    def block(self, length: int) -> int:
        """Readings that one written number stands for."""
        return 1 if self.points is None else -(-length // self.points)


def shorten(series: Series, form: NumericFormat) -> Series:
    """(channels, length) -> (channels, written): means of equal blocks; the last block may be shorter."""
    size, length = form.block(series.shape[1]), series.shape[1]
    if size == 1:
        return series
    starts = np.arange(0, length, size)
    return np.add.reduceat(series, starts, axis=1) / np.diff(np.append(starts, length))


def digits(series: Series, form: NumericFormat, names: Sequence[str] = ()) -> str:
    """The digits of a series, one line a channel, each led by its name where there are several.

    Example: `digits(np.array([[0.5, -0.001]]), NumericFormat()) == "0.50 0.00"`
    """
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    rounded = np.round(shorten(series, form), form.decimals) + 0.0
    lines = [form.separator.join(f"{value:.{form.decimals}f}" for value in channel) for channel in rounded]
    if len(lines) == 1:
        return lines[0]
    labels = [names[i] if i < len(names) else f"channel {i + 1}" for i in range(len(lines))]
    return "\n".join(f"{label}: {line}" for label, line in zip(labels, lines, strict=True))


def statement(length: int, form: NumericFormat) -> str:
    """One sentence on what the numbers are."""
    size = form.block(length)
    what = "one reading" if size == 1 else f"the mean of {size} readings in a row"
    return f"Each number is {what}, rounded to {form.decimals} decimals."
