"""Made-up recordings in emgdb's format: header, 16-bit `.dat` that wraps around, `.txt` with unreadable lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

GAIN = 10_000
"""Units per mV, as in emgdb; a `.dat` wraps beyond 3.2767 mV."""

PEAK = {"emg_healthy": 0.4, "emg_myopathy": 1.0, "emg_neuropathy": 5.0}
"""mV."""


def signal(record: str, samples: int) -> NDArray[np.float64]:
    """(samples,) in mV, on the grid of 0.0001 mV: a slow wave, so that neighbours are close, and a little noise."""
    rng = np.random.default_rng(len(record))
    period = {"emg_healthy": 80, "emg_myopathy": 40, "emg_neuropathy": 160}[record]
    wave = PEAK[record] * np.sin(2 * np.pi * np.arange(samples) / period)
    return np.round(wave + rng.normal(scale=0.01, size=samples), 4)


def write_emgdb(
    folder: Path, samples: Mapping[str, int], damaged: Mapping[str, Mapping[int, bytes]] | None = None
) -> dict[str, NDArray[np.float64]]:
    """Write three files a record and return the true values. `damaged` replaces lines (from 1) of a record's `.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {record: signal(record, count) for record, count in samples.items()}
    for record, values in made.items():
        units = np.round(values * GAIN).astype(np.int64)
        (folder / f"{record}.dat").write_bytes(units.astype("<u2").tobytes())
        # Two of the three published headers write mV, one writes mv.
        unit = "mv" if record == "emg_myopathy" else "mV"
        (folder / f"{record}.hea").write_text(
            f"{record} 1 4000 {len(values)}\n{record}.dat 16 {GAIN}/{unit} 16 0 {units[0]} 0 0 EMG\n# <age>: 44\n"
        )
        lines = [f"{(i + 1) / 4000:g} {value:.4f}".encode() for i, value in enumerate(values)]
        for number, text in (damaged or {}).get(record, {}).items():
            lines[number - 1] = text
        # One published file has no newline at its end.
        end = b"" if record == "emg_healthy" else b"\n"
        (folder / f"{record}.txt").write_bytes(b"\n".join(lines) + end)
    return made
