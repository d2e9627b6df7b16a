"""Readers of UCR / UEA archives (.ts, .arff, .tsv, .txt) from a folder, the original zip, or the files inside sktime.

Formats: https://www.sktime.net/en/stable/api_reference/file_specifications/ts.html (.ts), Weka's ARFF, and the UCR 2018
archive's label-first rows (.tsv, .txt). We parse the rows here, because sktime 1.2's loaders take 5 s to import, accept
a cut-off file, an undeclared label and a missing value without a word, and never name the row; the tests hold our
values against theirs.

Invariants
- Values are the floats that Python's `float` gives for the text: two formats with the same text give the same array.
- Every fault is a ValueError that names the file, the row (from 0, as in `extra_info.index`) and the line (from 1).
- A zip is read in place: nothing is unpacked.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from verl.timeseries.task import TaskSpec

Series = NDArray[np.float64]
"""(channels, length)"""

SPLITS = ("train", "test")
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
"""What `zipfile` raises on a file that is cut, damaged, encrypted or packed in another way."""


@dataclass(frozen=True)
class Split:
    """Series (channels, length) and class names of one split, in the order of the archive."""

    series: tuple[Series, ...]
    labels: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    """What each row was cut from (a record, a person, a run), which never goes apart. None: rows stand alone."""

    def __len__(self) -> int:
        return len(self.series)


@dataclass(frozen=True)
class Archive:
    """Both splits of an archive and the SHA-256 of every file they came from, by file name."""

    train: Split
    test: Split
    digests: Mapping[str, str]
    notes: tuple[str, ...] = ()
    """What a reader of results must know of these files, beside the task's own warnings."""
    group_kind: str = "row"
    """What `Split.groups` names, in the singular."""


class Reader(Protocol):
    """What a task needs of its reader."""

    def read(self, source: Path | None, task: TaskSpec) -> Archive:
        """Read both splits; `source` None means data that an installed library brings. ValueError on bad input."""
        ...


@dataclass(frozen=True)
class UcrReader:
    """Files `<problem>_TRAIN.<ext>` and `<problem>_TEST.<ext>`, both of the first format that is there."""

    problem: str
    formats: tuple[str, ...] = ("ts", "arff", "tsv", "txt")
    bundled: bool = False
    """True: without a source, take the copy inside the installed sktime."""

    def read(self, source: Path | None, task: TaskSpec) -> Archive:
        if source is None:
            source = self._bundled_folder(task)
        files = zip_members(source) if source.is_file() else folder_files(source, self.problem)
        for extension in self.formats:
            names = [f"{self.problem}_{split.upper()}.{extension}" for split in SPLITS]
            present = [name for name in names if name in files]
            if len(present) == 1:
                missing = next(name for name in names if name not in files)
                raise ValueError(f"{source}: found {present[0]} but not {missing}; both files are needed")
            if present:
                return _read_pair([(name, files[name]) for name in names], source, task)
        wanted = ", ".join(f".{extension}" for extension in self.formats)
        raise ValueError(
            f"{source}: no {self.problem}_TRAIN and {self.problem}_TEST there (formats: {wanted}); "
            f"found: {', '.join(sorted(files)[:8]) or 'nothing'}. Name the folder or the zip with source=PATH"
        )

    def _bundled_folder(self, task: TaskSpec) -> Path:
        if not self.bundled:
            raise ValueError(f"task={task.name} needs source=PATH: the folder or the zip of the {self.problem} archive")
        spec = importlib.util.find_spec("sktime")
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"task={task.name} reads a data set that sktime brings: `pip install sktime`, or source=PATH"
            )
        return Path(spec.submodule_search_locations[0], "datasets", "data", self.problem)


def folder_files(folder: Path, problem: str | None = None) -> dict[str, Path | zipfile.Path]:
    """Files of the folder, and of its sub-folder named after the problem, by name. ValueError when there is none."""
    if not folder.is_dir():
        raise ValueError(f"source={folder} does not exist; name a folder or a zip")
    inner = None if problem is None else folder / problem
    places = [folder, inner] if inner is not None and inner.is_dir() else [folder]
    return {path.name: path for place in places for path in place.iterdir() if path.is_file()}


def tree_files(folder: Path) -> dict[str, Path | zipfile.Path]:
    """Files of the folder and of all its sub-folders, by name, without those that an operating system adds. ValueError
    when a name occurs twice."""
    found: dict[str, Path | zipfile.Path] = {}
    if not folder.is_dir():
        raise ValueError(f"source={folder} does not exist; name a folder or a zip")
    for path in sorted(folder.rglob("*")):
        # Only below the folder: its own path may well lead through a hidden one.
        if path.is_file() and not _is_hidden(path.relative_to(folder)):
            if path.name in found:
                raise ValueError(f"{folder}: {path.name} lies in {found[path.name]} and in {path}; name one folder")
            found[path.name] = path
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def zip_members(path: Path) -> dict[str, Path | zipfile.Path]:
    """Files inside a zip by base name, without those that an operating system adds. Raises ValueError when the zip is
    damaged or holds one name twice."""
    try:
        archive = zipfile.ZipFile(path)
        damaged = archive.testzip()
    except (OSError, *ZIP_ERRORS) as error:
        raise ValueError(f"{path}: not a complete zip ({error}); delete it and download it again") from error
    if damaged is not None:
        raise ValueError(f"{path}: member {damaged} is damaged (checksum); delete the zip and download it again")
    found: dict[str, Path | zipfile.Path] = {}
    for name in archive.namelist():
        base = Path(name).name
        if name.endswith("/") or base.startswith(".") or name.startswith("__MACOSX/"):
            continue
        if base in found:
            raise ValueError(f"{path}: {base} is in it twice; unpack it and name one folder")
        found[base] = zipfile.Path(archive, name)
    return found


def _read_pair(files: list[tuple[str, Path | zipfile.Path]], source: Path, task: TaskSpec) -> Archive:
    splits: list[Split] = []
    digests: dict[str, str] = {}
    notes: list[str] = []
    for (name, file), rows in zip(files, task.rows or (None, None), strict=True):
        raw = file.read_bytes()
        where = f"{source.name}/{name}"
        digests[name] = hashlib.sha256(raw).hexdigest()
        # Some headers hold Latin-1 names; a damaged data row still fails as "not a number".
        split = parse(raw.decode("utf-8", errors="replace"), name.rsplit(".", 1)[1], where, task)
        if rows is not None and len(split) != rows:
            if not task.partial:
                raise ValueError(
                    f"{where}: has {len(split)} rows, but the archive has {rows}: the file is cut off or edited"
                )
            notes.append(f"{name} has {len(split)} rows, the archive is reported to have {rows}")
        splits.append(split)
    return Archive(splits[0], splits[1], digests, tuple(notes))


def parse(text: str, extension: str, where: str, task: TaskSpec) -> Split:
    """Parse one file's text. `where` names the file in errors. Raises ValueError naming file, row and line."""
    series: list[Series] = []
    labels: list[str] = []
    for index, row in enumerate(_ROWS[extension](text, where)):
        place = f"{where}, row {index} (line {row.line})"
        if not row.channels:
            raise ValueError(f"{place}: values or label missing; the row is cut off")
        series.append(_values(row.channels, place, task))
        if row.declared and row.label not in row.declared:
            raise ValueError(f"{place}: label {row.label!r} is not declared in the file's header: {row.declared}")
        labels.append(task.class_of(row.label, where=place))
    if not series:
        raise ValueError(f"{where}: no data rows; the file is cut off")
    return Split(tuple(series), tuple(labels))


def _values(channels: list[list[str]], place: str, task: TaskSpec) -> Series:
    """(channels, length) of one row, complete and finite."""
    if len(channels) != task.channels:
        raise ValueError(f"{place}: {len(channels)} channels, task {task.name} has {task.channels}")
    lengths = {len(channel) for channel in channels}
    wanted = task.length if task.length is not None else len(channels[0])
    if lengths != {wanted} or not wanted:
        raise ValueError(f"{place}: ragged series, {sorted(lengths)} values where {wanted} belong")
    values = np.empty((len(channels), wanted))
    for c, channel in enumerate(channels):
        for i, cell in enumerate(channel):
            try:
                values[c, i] = float(cell)
            except ValueError:
                kind = "missing" if cell.strip() in ("?", "") else "not a number"
                raise ValueError(f"{place}: value {i} of channel {c} is {kind}: {cell.strip()[:20]!r}") from None
    if not np.isfinite(values).all():
        c, i = (int(k) for k in np.argwhere(~np.isfinite(values))[0])
        raise ValueError(f"{place}: value {i} of channel {c} is {values[c, i]}; only finite values can be plotted")
    return values


@dataclass(frozen=True)
class _Row:
    line: int
    """From 1."""
    channels: list[list[str]]
    """Cells of each channel; empty when the row ends before its label."""
    label: str
    declared: tuple[str, ...] = ()
    """Labels that the file's own header declares."""


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip("\ufeff \t\r")
        if line:
            yield number, line


def _ts_rows(text: str, where: str) -> Iterator[_Row]:
    declared: tuple[str, ...] = ()
    in_data = False
    for number, line in _lines(text):
        if line.startswith("#"):
            continue
        if in_data:
            *channels, label = line.split(":")
            yield _Row(number, [channel.split(",") for channel in channels], label.strip(), declared)
            continue
        key, *rest = line.split()
        if key.lower() == "@data":
            in_data = True
        elif key.lower() == "@classlabel":
            declared = tuple(rest[1:])
        elif key.lower() == "@timestamps" and rest and rest[0].lower() == "true":
            raise ValueError(f"{where}, line {number}: series with time stamps are not supported")
    if not in_data:
        raise ValueError(f"{where}: no @data line; the file is cut off or not a .ts file")


def _arff_rows(text: str, where: str) -> Iterator[_Row]:
    declared: tuple[str, ...] = ()
    in_data = False
    for number, line in _lines(text):
        if line.startswith("%"):
            continue
        if in_data:
            *values, label = line.split(",")
            yield _Row(number, [values] if values else [], label.strip(" '\""), declared)
            continue
        key = line.split(None, 1)[0].lower()
        if key == "@data":
            in_data = True
        elif key == "@attribute" and "relational" in line.lower():
            raise ValueError(f"{where}, line {number}: multivariate .arff is not supported, use the .ts file")
        elif key == "@attribute" and line.endswith("}"):
            declared = tuple(item.strip(" '\"") for item in line[line.index("{") + 1 : -1].split(","))
    if not in_data:
        raise ValueError(f"{where}: no @data line; the file is cut off or not an .arff file")


def _label_first_rows(text: str, where: str) -> Iterator[_Row]:
    del where
    for number, line in _lines(text):
        label, *values = line.split()
        # The 2015 archive writes labels as floats, e.g. 1.0000000e+00.
        with contextlib.suppress(ValueError, OverflowError):
            if float(label) == int(float(label)):
                label = str(int(float(label)))
        yield _Row(number, [values] if values else [], label)


_ROWS = {"ts": _ts_rows, "arff": _arff_rows, "tsv": _label_first_rows, "txt": _label_first_rows}
