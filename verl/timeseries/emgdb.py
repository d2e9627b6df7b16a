"""Reader of PhysioNet's "Examples of Electromyograms" (emgdb 1.0.0): three recordings, one person per class.

Values come from the `.txt` files (seconds and mV): the neuropathy `.dat` wraps around its 16 bits beyond +-3.277 mV.
A `.txt` line that is no pair of numbers (two in each published file) takes its value from the `.dat`.

Invariants
- Every sample is finite. The `.dat` agrees, up to its wrap, with every line that can be read, or the error names it.
- Windows do not overlap. Of each recording the first windows are train and the last are test, so that no test window
  lies between two train windows; the task's val is cut from the end of train in the same way.
- Every fault is a ValueError that names the file, and the line (from 1) where there is one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from verl.timeseries.readers import Archive, Series, Split, folder_files, zip_members
from verl.timeseries.split import shares

if TYPE_CHECKING:
    from verl.timeseries.task import TaskSpec

_WRAP = 2**16
_TOLERANCE_MV = 0.002
"""The `.txt` is rounded to 0.0001 mV, and in places to the recorder's own step."""


@dataclass(frozen=True)
class EmgdbReader:
    """Windows of the task's length from the recordings that its file labels name."""

    most_damaged: int = 10
    """More unreadable lines than that in one file mean another file."""

    def read(self, source: Path | None, task: TaskSpec) -> Archive:
        if source is None:
            raise ValueError(f"task={task.name} needs source=PATH: the folder or the zip of the emgdb files")
        assert task.length is not None, f"task {task.name} declares no window length"
        files = zip_members(source) if source.is_file() else folder_files(source)
        digests: dict[str, str] = {}
        windows: dict[str, list[Series]] = {}
        for spec in task.class_specs:
            names = [f"{spec.file_label}.{extension}" for extension in ("hea", "dat", "txt")]
            missing = [name for name in names if name not in files]
            if missing:
                found = ", ".join(sorted(files)[:8]) or "nothing"
                raise ValueError(f"{source}: {', '.join(missing)} is missing; found: {found}. Name it with source=PATH")
            raw = {name.rsplit(".", 1)[1]: files[name].read_bytes() for name in names}
            digests |= {name: hashlib.sha256(raw[name.rsplit(".", 1)[1]]).hexdigest() for name in names}
            values = self._recording(raw, f"{source.name}/{spec.file_label}")
            count = len(values) // task.length
            windows[spec.name] = [values[None, i * task.length : (i + 1) * task.length] for i in range(count)]
        return _split(windows, digests, source, task)

    def _recording(self, raw: Mapping[str, bytes], where: str) -> NDArray[np.float64]:
        """(length,) in mV."""
        length, gain = _header(raw["hea"].decode("latin-1"), f"{where}.hea")
        if len(raw["dat"]) != 2 * length:
            raise ValueError(f"{where}.dat: {len(raw['dat'])} bytes, the header says {length} samples of 2 bytes")
        stored = np.frombuffer(raw["dat"], dtype="<i2").astype(np.int64)
        lines = raw["txt"].decode("latin-1").split("\n")
        lines = lines[:-1] if lines[-1] == "" else lines
        if len(lines) != length:
            raise ValueError(
                f"{where}.txt: {len(lines)} lines, the header says {length}: the file is cut off or edited"
            )
        values = np.array([_value(line) for line in lines])
        damaged = np.flatnonzero(~np.isfinite(values))
        if len(damaged) > self.most_damaged:
            raise ValueError(f"{where}.txt: {len(damaged)} lines cannot be read, the first is line {damaged[0] + 1}")
        _check_agreement(values, stored, gain, where)
        for sample in damaged:
            near = values[max(0, sample - 5) : sample + 6]
            expected = float(np.nanmean(near)) * gain
            turns = round((expected - stored[sample]) / _WRAP)
            values[sample] = (stored[sample] + turns * _WRAP) / gain
        return values


def _header(text: str, where: str) -> tuple[int, float]:
    """Samples and units per mV of a one-signal WFDB header (https://physionet.org/physiotools/wag/header-5.htm)."""
    try:
        record, signal = (line.split() for line in text.splitlines()[:2])
        signals, length = int(record[1]), int(record[3])
        gain, _, unit = signal[2].partition("/")
        if signals != 1 or signal[1] != "16" or unit.lower() != "mv" or float(gain) <= 0:
            raise ValueError(f"{signals} signals, format {signal[1]}, gain {signal[2]}")
        return length, float(gain)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{where}: not a header of one 16-bit signal in mV ({error})") from error


def _value(line: str) -> float:
    """The second number of a line of two; NaN for anything else."""
    cells = line.split()
    try:
        float(cells[0])
        return float(cells[1]) if len(cells) == 2 else float("nan")
    except (ValueError, IndexError):
        return float("nan")


def _check_agreement(values: NDArray[np.float64], stored: NDArray[np.int64], gain: float, where: str) -> None:
    apart = values * gain - stored
    apart = np.abs(apart - _WRAP * np.round(apart / _WRAP)) / gain
    off = np.flatnonzero(apart > _TOLERANCE_MV)
    if len(off):
        line, there = off[0] + 1, stored[off[0]] / gain
        raise ValueError(
            f"{where}.txt, line {line}: {values[off[0]]} mV, but the .dat has {there} (also at {len(off) - 1} others)"
        )


def _split(windows: Mapping[str, list[Series]], digests: Mapping[str, str], source: Path, task: TaskSpec) -> Archive:
    assert task.rows is not None, f"task {task.name} declares no row counts"
    total = sum(len(of) for of in windows.values())
    if total != sum(task.rows):
        raise ValueError(f"{source}: {total} windows, but the archive has {sum(task.rows)}: a recording is cut off")
    quota = shares({name: len(of) for name, of in windows.items()}, task.rows[1])
    train = [(w, name) for name, of in windows.items() for w in of[: len(of) - quota[name]]]
    test = [(w, name) for name, of in windows.items() for w in of[len(of) - quota[name] :]]
    parts = [Split(tuple(w for w, _ in rows), tuple(name for _, name in rows)) for rows in (train, test)]
    return Archive(parts[0], parts[1], digests)
