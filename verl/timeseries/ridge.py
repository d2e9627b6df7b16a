"""What stands out in a spectrogram: a ridge, the loudest part, a steady band.

Invariants
- What is measured is `spectrogram.power`, the picture's own values; seconds are those of the picture's axis.
- Levels are in dB over others of the same picture, so scaling a series changes nothing.
- White noise has no ridge: the bounds were set on noise of 32 to 20,000 points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verl.timeseries.spectrogram import Spectrogram, power

Levels = NDArray[np.floating[Any]]
"""(frequencies, columns) in dB"""

_NEAR = 4
"""Rows to either side whose medians make a frequency's usual level: a tone that sounds for long is none of it."""
_OVER = 8.0
"""dB over the usual level of its frequency from which on a cell can belong to a ridge."""
_STEP = 2
"""Rows that a ridge may climb or fall from one column to the next."""
_WINDOWS = 2.2
"""A ridge is longer than that many windows: columns that share samples are loud together by chance."""
_SHARE = 0.1
"""And than that share of the picture."""
_STEADY = 8.0
"""dB of a frequency's median over that of all, from which on it is steadily loud."""


@dataclass(frozen=True)
class Ridge:
    """A line of loud cells from `start` to `end` (seconds), `start_hertz` to `end_hertz`, mean `level` in dB over the
    usual level of its frequencies."""

    start: float
    end: float
    start_hertz: float
    end_hertz: float
    level: float
    rises: int
    """1: it ends higher than it starts, by more than two rows of the picture; -1: lower; 0: level."""


@dataclass(frozen=True)
class Sound:
    """What stands out in one channel's spectrogram. Seconds, Hz, dB over the median of the picture."""

    ridge: Ridge | None
    loudest: float
    loudest_hertz: float
    loudest_level: float
    steady_hertz: float | None
    """The frequency that is loud all the time, if one is."""
    steady_level: float


def listen(channel: NDArray[np.float64], of: Spectrogram) -> Sound | None:
    """Measure one channel (length,), finite; None where it is silent (constant)."""
    levels = power(channel, of) * of.decibels
    if not levels.any():
        return None
    every = np.fft.rfftfreq(of.window, 1 / of.rate)
    hertz = every[(every >= of.low) & (every <= of.top)]
    columns = levels.shape[1]
    # The picture stretches its columns over the whole length.
    seconds = (np.arange(columns) + 0.5) * len(channel) / of.rate / columns
    row, column = np.unravel_index(int(levels.argmax()), levels.shape)
    medians = np.median(levels, axis=1)
    steady, steady_level = int(medians.argmax()), float(medians.max() - np.median(medians))
    return Sound(
        ridge=_ridge(levels - _usual(medians)[:, None], hertz, seconds, of),
        loudest=float(seconds[column]),
        loudest_hertz=float(hertz[row]),
        loudest_level=float(levels[row, column] - np.median(levels)),
        steady_hertz=float(hertz[steady]) if steady_level >= _STEADY else None,
        steady_level=steady_level,
    )


def _usual(medians: Levels) -> Levels:
    """Each frequency's level without a ridge, from the medians over time of its neighbours and itself.

    At either edge its own median: noise is steep there (loudest at the lowest frequencies) and would pass for a tone.
    """
    usual = medians.copy()
    size = 2 * _NEAR + 1
    if len(medians) > size:
        usual[_NEAR:-_NEAR] = np.median(np.lib.stride_tricks.sliding_window_view(medians, size), axis=1)
    return usual


def _ridge(over: Levels, hertz: Levels, seconds: Levels, of: Spectrogram) -> Ridge | None:
    first, rows = _loudest_path(over - _OVER)
    if len(rows) * of.hop <= _WINDOWS * of.window or len(rows) < _SHARE * over.shape[1]:
        return None
    last = first + len(rows) - 1
    # Of three columns at either end: the outermost cell may be a neighbour of the ridge.
    start, end = float(np.median(rows[:3])), float(np.median(rows[-3:]))
    return Ridge(
        start=float(seconds[first]),
        end=float(seconds[last]),
        start_hertz=float(hertz[int(start)]),
        end_hertz=float(hertz[int(end)]),
        level=float(over[rows, np.arange(first, last + 1)].mean()),
        rises=0 if abs(end - start) <= 2 else 1 if end > start else -1,
    )


def _loudest_path(gain: Levels) -> tuple[int, NDArray[np.int_]]:
    """First column and rows, one a column, of the path with the largest sum of gains (Viterbi, with free ends)."""
    height, width = gain.shape
    places = np.arange(height)
    total = gain.copy()
    came_from = np.full(gain.shape, -1)
    for column in range(1, width):
        before = np.pad(total[:, column - 1], _STEP, constant_values=-np.inf)
        near = np.lib.stride_tricks.sliding_window_view(before, 2 * _STEP + 1)
        best = near.argmax(axis=1)
        carried = near[places, best]
        # A path that has lost more than it gained is better begun anew.
        total[:, column] += np.maximum(carried, 0.0)
        came_from[:, column] = np.where(carried > 0, places + best - _STEP, -1)
    row, column = (int(place) for place in np.unravel_index(int(total.argmax()), total.shape))
    path = [row]
    while came_from[row, column] >= 0:
        row, column = int(came_from[row, column]), column - 1
        path.append(row)
    return column, np.array(path[::-1])
