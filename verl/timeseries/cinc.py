"""Reader of the PhysioNet/CinC Challenge 2017 training set: single-lead ECG at 300 Hz, one MATLAB v4 file a record.

Files: `A00001.mat` ... (variable `val`, int16, 1 x N, 1000 units a mV), flat or in sub-folders, and `REFERENCE-v3.csv`
or `REFERENCE.csv` without a header: `A00001,N` or `A00/A00001,N`.

Invariants
- Every record of the reference has one file and every file stands in the reference, or the error names it.
- Windows do not overlap; what is left of a record after its last whole window is not used.
- All windows of a record are in train or all are in test (`Split.groups` names the record).
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from verl.timeseries.readers import Archive, Series, Split, tree_files, zip_members
from verl.timeseries.split import cut_split, take

if TYPE_CHECKING:
    from verl.timeseries.task import TaskSpec

REFERENCES = ("REFERENCE-v3.csv", "REFERENCE.csv")
"""The corrected labels first."""
PUBLISHED_RECORDS = 8528
UNITS_PER_MV = 1000.0


@dataclass(frozen=True)
class CincReader:
    """Windows of the task's length; the set has no test part, so one is cut by record, the same for everyone."""

    test_fraction: float = 0.2
    test_seed: int = 2017

    def read(self, source: Path | None, task: TaskSpec) -> Archive:
        if source is None:
            raise ValueError(f"task={task.name} needs source=PATH: the folder or the zip of training2017")
        assert task.length is not None, f"task {task.name} declares no window length"
        files = zip_members(source) if source.is_file() else tree_files(source)
        name = next((name for name in REFERENCES if name in files), None)
        if name is None:
            found = ", ".join(sorted(files)[:8]) or "nothing"
            raise ValueError(f"{source}: no {' or '.join(REFERENCES)} there; found: {found}. Name it with source=PATH")
        raw = files[name].read_bytes()
        labels = _reference(raw.decode("utf-8", errors="replace"), f"{source.name}/{name}", task)
        _check_complete(labels, files, f"{source.name}/{name}")
        content = hashlib.sha256()
        series: list[Series] = []
        rows: list[tuple[str, str]] = []
        for record, label in labels.items():
            data = files[f"{record}.mat"].read_bytes()
            content.update(record.encode() + hashlib.sha256(data).digest())
            values = read_record(data, f"{source.name}/{record}.mat")
            count = len(values) // task.length
            series += [values[None, i * task.length : (i + 1) * task.length] for i in range(count)]
            rows += [(label, record)] * count
        if not rows:
            raise ValueError(f"{source}: no record is as long as one window ({task.length} samples)")
        every = Split(tuple(series), tuple(label for label, _ in rows), tuple(record for _, record in rows))
        test, train = cut_split(every, round(self.test_fraction * len(every)), self.test_seed)
        digests = {name: hashlib.sha256(raw).hexdigest(), f"{len(labels)} .mat files": content.hexdigest()}
        notes = () if len(labels) == PUBLISHED_RECORDS else (f"{len(labels)} of {PUBLISHED_RECORDS} records are here",)
        return Archive(take(every, train), take(every, test), digests, notes, "record")


def _reference(text: str, where: str, task: TaskSpec) -> dict[str, str]:
    """Record -> class name, in the order of the file."""
    labels: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip("\ufeff \t\r"):
            continue
        place = f"{where}, line {number}"
        cells = [cell.strip("\ufeff \t\r'\"") for cell in line.split(",")]
        if len(cells) != 2:
            raise ValueError(f"{place}: expected `record,label`, got {line[:40]!r}")
        record = cells[0].rsplit("/", 1)[-1]
        if record in labels:
            raise ValueError(f"{place}: record {record} is listed twice")
        labels[record] = task.class_of(cells[1], where=place)
    if not labels:
        raise ValueError(f"{where}: lists no record")
    return labels


def _check_complete(labels: dict[str, str], files: dict[str, Path | zipfile.Path], where: str) -> None:
    there = {name.removesuffix(".mat") for name in files if name.endswith(".mat")}
    for records, what in ((labels.keys() - there, "without a .mat file"), (there - labels.keys(), "without a label")):
        if records:
            some = ", ".join(sorted(records)[:5])
            raise ValueError(f"{where}: {len(records)} records {what}: {some}; the archive is incomplete")


def read_record(data: bytes, where: str) -> NDArray[np.float64]:
    """(length,) in mV of one .mat file. Raises ValueError naming `where`."""
    try:
        found = loadmat(io.BytesIO(data)).get("val")
    except (MatReadError, ValueError, TypeError, OSError, EOFError, NotImplementedError) as error:
        raise ValueError(f"{where}: not a MATLAB file ({error}); download it again") from error
    if found is None or found.ndim != 2 or found.shape[0] != 1 or not np.issubdtype(found.dtype, np.integer):
        shape = "no variable val" if found is None else f"val is {found.dtype} of shape {found.shape}"
        raise ValueError(f"{where}: {shape}, expected int16 of shape (1, N)")
    return found[0].astype(np.float64) / UNITS_PER_MV
