"""Reader of UCI HAR's Inertial Signals: smartphone motion at 50 Hz, windows of 128 readings that overlap by half.

Files: `body_acc_x_train.txt` ... (one window of 128 numbers a line), `y_train.txt` (1 to 6), and `subject_train.txt`
where the archive is complete; the same for test.

Invariants
- Train and test are the archive's own, by subject.
- `Split.groups` names the subject of a window, or without subject ids the run of windows with one label that it
  belongs to: neighbours overlap by half, so rows must not be dealt one by one.
- Every fault is a ValueError that names the file and the line (from 1).
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from verl.timeseries.readers import SPLITS, Archive, Split, tree_files, zip_members

if TYPE_CHECKING:
    from verl.timeseries.task import TaskSpec

PUBLISHED_WINDOWS = {"train": 7352, "test": 2947}
_INNER_ZIP = "UCI HAR Dataset.zip"
Files = Mapping[str, Path | zipfile.Path]


@dataclass(frozen=True)
class UciHarReader:
    """Windows of the named signals, one channel each."""

    signals: tuple[str, ...] = ("body_acc_x", "body_acc_y", "body_acc_z")

    def read(self, source: Path | None, task: TaskSpec) -> Archive:
        if source is None:
            raise ValueError(f"task={task.name} needs source=PATH: the folder or the zip of the UCI HAR Dataset")
        assert task.length is not None, f"task {task.name} declares no window length"
        files: Files = _zipped(source) if source.is_file() else tree_files(source)
        digests: dict[str, str] = {}
        by_subject = all(f"subject_{split}.txt" in files for split in SPLITS)
        splits = [self._split(files, split, source, task, digests, by_subject) for split in SPLITS]
        notes = [
            f"{len(found)} of {published} {name} windows are here"
            for found, (name, published) in zip(splits, PUBLISHED_WINDOWS.items(), strict=True)
            if len(found) != published
        ]
        if not by_subject:
            notes.append("no subject ids are here: fit and val are cut by runs of one activity, not by person")
        return Archive(splits[0], splits[1], digests, tuple(notes), "subject" if by_subject else "run of one activity")

    def _split(
        self, files: Files, split: str, source: Path, task: TaskSpec, digests: dict[str, str], by_subject: bool
    ) -> Split:
        assert task.length is not None
        names = [f"{signal}_{split}.txt" for signal in self.signals]
        columns = [_table(files, name, task.length, source, digests) for name in names]
        label_name = f"y_{split}.txt"
        codes = _table(files, label_name, 1, source, digests)
        for name, column in zip(names, columns, strict=True):
            if len(column) != len(codes):
                raise ValueError(
                    f"{source.name}/{name}: {len(column)} lines, but {label_name} has {len(codes)}: one is cut off"
                )
        labels = tuple(
            task.class_of(f"{code:g}", where=f"{source.name}/{label_name}, line {line}")
            for line, code in enumerate(codes[:, 0], start=1)
        )
        if by_subject:
            people = _table(files, f"subject_{split}.txt", 1, source, digests)
            if len(people) != len(codes):
                raise ValueError(
                    f"{source.name}/subject_{split}.txt: {len(people)} lines, but {label_name} has {len(codes)}"
                )
            groups = tuple(f"subject {person:g}" for person in people[:, 0])
        else:
            runs = enumerate(groupby(labels))
            groups = tuple(f"{split} run {number}" for number, (_, rows) in runs for _ in rows)
        return Split(tuple(np.stack(columns, axis=1)), labels, groups)


def _zipped(source: Path) -> Files:
    """Members of the zip; UCI's own download holds the archive as a second zip."""
    files = zip_members(source)
    if _INNER_ZIP not in files:
        return files
    inner = zipfile.ZipFile(io.BytesIO(files[_INNER_ZIP].read_bytes()))
    return {Path(name).name: zipfile.Path(inner, name) for name in inner.namelist() if not name.endswith("/")}


def _table(files: Files, name: str, columns: int, source: Path, digests: dict[str, str]) -> NDArray[np.float64]:
    """(lines, columns) of one file; adds its digest."""
    if name not in files:
        found = ", ".join(sorted(files)[:8]) or "nothing"
        raise ValueError(f"{source}: {name} is missing; found: {found}. Name the folder or the zip with source=PATH")
    raw = files[name].read_bytes()
    digests[name] = hashlib.sha256(raw).hexdigest()
    where = f"{source.name}/{name}"
    rows: list[NDArray[np.float64]] = []
    for number, line in enumerate(raw.decode("latin-1").splitlines(), start=1):
        cells = line.split()
        if len(cells) != columns:
            raise ValueError(f"{where}, line {number}: {len(cells)} values where {columns} belong; the file is cut off")
        try:
            rows.append(np.array(cells, dtype=np.float64))
        except ValueError as error:
            raise ValueError(f"{where}, line {number}: {error}") from error
    if not rows:
        raise ValueError(f"{where}: no lines; the file is empty")
    table = np.stack(rows)
    if not np.isfinite(table).all():
        bad = int(np.argwhere(~np.isfinite(table))[0][0]) + 1
        raise ValueError(f"{where}, line {bad}: a value is not finite; only finite values can be plotted")
    return table
