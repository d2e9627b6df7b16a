"""Short-time power of a series as a picture's values.

Invariants
- Values lie in [0, 1]: 1 is the loudest cell, 0 is `decibels` below it or less, so scaling a series changes nothing.
- Row 0 is the lowest frequency kept, column 0 the beginning.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHORTEST = 32
"""Points; in fewer, no window shows both time and frequency."""


@dataclass(frozen=True, kw_only=True)
class Spectrogram:
    """Window and hop in samples, frequencies in Hz on a linear axis. Raises ValueError on values that cannot work."""

    rate: float
    """Samples per second."""
    window: int = 256
    """Hann window; frequency cells are `rate / window` high."""
    hop: int = 32
    low: float = 0.0
    high: float | None = None
    """None: half the rate."""
    decibels: float = 50.0
    """Range from the darkest to the brightest color."""
    colormap: str = "viridis"

    def __post_init__(self) -> None:
        if self.rate <= 0 or self.window < 8 or not 0 < self.hop <= self.window or self.decibels <= 0:
            raise ValueError(
                f"style.spectrogram: needs rate > 0, window >= 8, 0 < hop <= window and decibels > 0, got {self}"
            )
        if not 0 <= self.low < self.top <= self.rate / 2:
            raise ValueError(f"style.spectrogram: needs 0 <= low < high <= {self.rate / 2:g} Hz, got {self}")

    @classmethod
    def fitting(cls, rate: float, length: int) -> Spectrogram:
        """For series of `length` points or more: the window is a power of two of at most a quarter of it and 256, and
        the picture has 16 columns or more.

        Raises ValueError below 32 points.
        """
        if length < SHORTEST:
            raise ValueError(f"a spectrogram needs series of {SHORTEST} points or more, got {length}")
        window = min(256, 1 << ((length // 4).bit_length() - 1))
        return cls(rate=rate, window=window, hop=min(window // 8, (length - window) // 15))

    @property
    def top(self) -> float:
        """Highest frequency shown, in Hz."""
        return self.rate / 2 if self.high is None else self.high


def power(channel: NDArray[np.float64], of: Spectrogram) -> NDArray[np.float64]:
    """(frequencies, frames) in [0, 1] of one channel (length,). A channel shorter than the window is padded."""
    # A constant less its mean is rounding noise, which would be drawn at full scale.
    centred = np.zeros_like(channel) if np.ptp(channel) == 0 else channel - channel.mean()
    values = np.pad(centred, (0, max(0, of.window - len(channel))))
    frames = np.lib.stride_tricks.sliding_window_view(values, of.window)[:: of.hop]
    density = np.abs(np.fft.rfft(frames * np.hanning(of.window), axis=1)).T ** 2
    frequencies = np.fft.rfftfreq(of.window, 1 / of.rate)
    kept = density[(frequencies >= of.low) & (frequencies <= of.top)]
    loudest = kept.max()
    if loudest <= 0.0:
        return np.zeros_like(kept)
    floor = loudest * 10 ** (-of.decibels / 10)
    return 1 + 10 * np.log10(np.maximum(kept, floor) / loudest) / of.decibels
