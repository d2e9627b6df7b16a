"""A task made from a folder of CSV files: a data set of one's own, without code.

Two layouts, both with a header line:
- files: `labels.csv` (columns `file`, `label`, and where wanted `split`, `group`) beside one CSV file a series, with a
  row a time step and a column a channel;
- rows: every other folder. Each row is one series: a label column, and one column a time step.

Invariants
- Every fault is a ValueError that names the file and the line (from 1).
- No file outside the folder is read.
- Without a split of its own (`split` column, or files whose names begin with train and test), a fixed stratified part
  becomes the test part; rows with the same `group` stay together.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from verl.timeseries.readers import SPLITS, Archive, Series, Split
from verl.timeseries.spectrogram import SHORTEST, Spectrogram
from verl.timeseries.split import cut_split, take
from verl.timeseries.style import GRID, LINE, LINES, PlotStyle, spectrogram_style
from verl.timeseries.task import ClassSpec, TaskSpec
from verl.timeseries.tasks import find_by_data_source, task_names

if TYPE_CHECKING:
    from collections.abc import Iterator

LABELS = "labels.csv"
STYLES = ("line", "lines", "grid", "spectrogram")
_TEST_SEED = 2026


@dataclass(frozen=True, kw_only=True)
class CsvOptions:
    """The `csv.*` arguments of the data step."""

    name: str | None = None
    """Name of the task; null: the folder's. Rows carry the data source `<name>_dataset`."""
    question: str | None = None
    """What the model is asked, a sentence or two; null: a plain question that names the classes."""
    classes: list[str] = field(default_factory=list)
    """Labels in id order; empty: those found, sorted."""
    label: str = "label"
    """Name of the label column."""
    group: str = "group"
    """Name of the column that says which rows belong together (a person, a machine), if there is one."""
    split: str = "split"
    """Name of the column that says train or test, if there is one."""
    drop: list[str] = field(default_factory=list)
    """Columns that are no values, such as time or an id."""
    test_fraction: float = 0.2
    """Share of the test part where the data set has none."""
    plot: str | None = None
    """line, lines, grid or spectrogram; null: line for one channel, lines for up to four, else grid."""
    rate: float | None = None
    """Samples a second."""
    unit: str = ""
    """Unit of the values."""
    title: str = ""
    x_label: str = "Timestamp"
    y_label: str | None = None
    """Null: Value, with the unit."""


@dataclass(frozen=True)
class _Found:
    """One series as read."""

    series: Series
    label: str
    split: str | None
    group: str | None
    where: str


@dataclass(frozen=True)
class LoadedReader:
    """Hands out an archive that is already read."""

    archive: Archive

    def read(self, source: Path | None, task: TaskSpec) -> Archive:
        del source, task
        return self.archive


def parse_options(values: Mapping[str, Any]) -> CsvOptions:
    """Raises ValueError on an unknown key or a value of another type."""
    known = {f.name: str(f.type) for f in fields(CsvOptions)}
    given = dict(values)
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"unknown key csv.{name}; known: {', '.join(known)}")
        kind = known[name]
        if kind.startswith("list"):
            given[name] = value = [str(item) for item in (value if isinstance(value, list) else [value])]
        elif kind.startswith("str") and isinstance(value, int | float) and not isinstance(value, bool):
            given[name] = value = str(value)
        fits = {"s": str, "l": list, "f": int | float}[kind[0]]
        if not isinstance(value, fits) and not (value is None and kind.endswith("None")):
            raise ValueError(f"csv.{name}={value!r} must be of type {kind}")
    options = CsvOptions(**given)
    if not 0 < options.test_fraction < 1:
        raise ValueError(f"csv.test_fraction={options.test_fraction} must lie in (0, 1)")
    if options.plot is not None and options.plot not in STYLES:
        raise ValueError(f"csv.plot={options.plot!r}: use one of {', '.join(STYLES)}")
    if options.plot == "spectrogram" and options.rate is None:
        raise ValueError("csv.plot=spectrogram needs csv.rate, the samples a second")
    return options


def csv_task(source: str | None, values: Mapping[str, Any]) -> TaskSpec:
    """The task of a folder, its archive read. Raises ValueError naming file and line, or the key to change."""
    options = parse_options(values)
    folder = Path(source or "").expanduser()
    if source is None or not folder.is_dir():
        raise ValueError(f"task=csv needs source=FOLDER with CSV files, got {source}")
    name = options.name or Path(os.path.abspath(folder)).name
    _check_name(name, folder)
    digests: dict[str, str] = {}
    listed = (folder / LABELS).is_file()
    found, names = (_read_files if listed else _read_rows)(folder, options, digests)
    if not found:
        raise ValueError(f"{folder}: no series found in its CSV files")
    classes = _classes(found, options)
    archive = _archive(found, options, digests)
    channels = found[0].series.shape[0]
    lengths = {one.series.shape[1] for one in found}
    _check_unit(options, names)
    listing = f"{', '.join(classes[:-1])} or {classes[-1]}"
    question = options.question or f"The plot shows one recording of {name}. Which class is it?"
    return TaskSpec(
        name=name,
        data_source=f"{name}_dataset",
        class_specs=tuple(ClassSpec(label, label) for label in classes),
        question=question,
        answer_format=(
            f"First reason step by step inside <think> </think>. Then give exactly one label, {listing}, inside "
            "<class> </class>, and nothing after it."
        ),
        reader=LoadedReader(archive),
        plot=_style(options, channels, names, _shortest(found, options)),
        channels=channels,
        length=lengths.pop() if len(lengths) == 1 else None,
        rows=None,
        declared=False,
        time_step=None if options.rate is None else 1 / options.rate,
        unit=options.unit,
        licence="the data set's own",
    )


def _check_name(name: str, folder: Path) -> None:
    """A task of the program keeps its name: its data folder and the reward of its rows are found by it."""
    taken = {known.casefold() for known in task_names()}
    source = f"{name.casefold()}_dataset"
    if name.casefold() in taken or find_by_data_source(source) is not None:
        raise ValueError(
            f"source={folder}: {name!r} is the name of a task or data source of the program, whose data it would "
            f"replace: choose another with csv.name=my_{name}"
        )


def _check_unit(options: CsvOptions, names: Sequence[str]) -> None:
    """The unit goes to the axis and into the texts about every channel, so no column may name another."""
    for name in names if options.unit else ():
        own = re.search(r"[\[(]([^\])]+)[\])]\s*$", name)
        if own is not None and own[1].strip() != options.unit:
            raise ValueError(
                f"csv.unit={options.unit} is the unit of all channels, but column {name!r} names its own: "
                "leave csv.unit out, or the column's unit"
            )


def _shortest(found: Sequence[_Found], options: CsvOptions) -> int:
    """Points of the shortest series. Raises ValueError where they are too few for the plot that is asked for."""
    shortest = min(found, key=lambda one: one.series.shape[1])
    points = shortest.series.shape[1]
    if options.plot == "spectrogram" and points < SHORTEST:
        raise ValueError(
            f"{shortest.where}: a series of {points} points is too short for csv.plot=spectrogram, which needs "
            f"{SHORTEST}: use line, lines or grid"
        )
    return points


def _style(options: CsvOptions, channels: int, names: Sequence[str], shortest: int) -> PlotStyle:
    kind = options.plot or ("line" if channels == 1 else "lines" if channels <= 4 else "grid")
    y_label = options.y_label
    if y_label is None:
        y_label = f"Value ({options.unit})" if options.unit else "Value"
    channel_names = tuple(names) if channels > 1 else ()
    if kind == "spectrogram":
        assert options.rate is not None, "checked with the options"
        style = spectrogram_style(Spectrogram.fitting(options.rate, shortest))
        if channels > 1:
            columns = 1 if channels <= 3 else 2
            # 100 pixels a row, in whole vision tokens; the names stand in the gaps.
            height = -(-(74 + 100 * -(-channels // columns)) // 28) * 28
            top = 36 if options.title else style.top
            style = replace(style, height=max(style.height, height), columns=columns, gap=20, top=top)
        return replace(style, title=options.title, channel_names=channel_names)
    style = {"line": LINE, "lines": LINES, "grid": GRID}[kind]
    if kind == "grid":
        rows = -(-channels // style.columns)
        # 112 pixels a row, in whole vision tokens.
        style = replace(style, height=max(style.height, -(-(74 + 112 * rows) // 28) * 28))
    return replace(style, title=options.title, channel_names=channel_names, x_label=options.x_label, y_label=y_label)


def _classes(found: Sequence[_Found], options: CsvOptions) -> list[str]:
    seen = sorted({one.label for one in found})
    written: dict[str, _Found] = {}
    for one in found:
        first = written.setdefault(one.label.casefold(), one)
        if first.label != one.label:
            raise ValueError(
                f"{one.where}: label {one.label!r} is {first.label!r} elsewhere ({first.where}): write it one way"
            )
    if not options.classes:
        if len(seen) < 2:
            raise ValueError(f"only one label occurs ({seen[0]!r}): two or more classes are needed")
        return seen
    for one in found:
        if one.label not in options.classes:
            raise ValueError(f"{one.where}: label {one.label!r} is not in csv.classes ({', '.join(options.classes)})")
    return list(options.classes)


def _archive(found: Sequence[_Found], options: CsvOptions, digests: Mapping[str, str]) -> Archive:
    def split_of(rows: Sequence[_Found]) -> Split:
        grouped = any(one.group is not None for one in rows)
        for one in rows:
            if grouped and one.group is None:
                raise ValueError(f"{one.where}: no {options.group!r}, but other rows have one")
        groups = tuple(one.group or "" for one in rows) if grouped else None
        return Split(tuple(one.series for one in rows), tuple(one.label for one in rows), groups)

    kind = options.group if any(one.group is not None for one in found) else "row"
    parts = {name: [one for one in found if one.split == name] for name in SPLITS}
    if any(parts.values()):
        for one in found:
            if one.split is None:
                raise ValueError(f"{one.where}: belongs to neither train nor test, but other rows do")
        for name, rows in parts.items():
            if not rows:
                raise ValueError(f"no row belongs to {name}: give both, or neither")
        return Archive(split_of(parts["train"]), split_of(parts["test"]), digests, (), kind)
    every = split_of(found)
    test, train = cut_split(every, max(1, round(options.test_fraction * len(every))), _TEST_SEED)
    note = f"the data set has no test part: {len(test)} rows were cut, by {kind}, the same every time"
    return Archive(take(every, train), take(every, test), digests, (note,), kind)


# --- files ----------------------------------------------------------------------------------------------------------


def _lines(path: Path, digests: dict[str, str], root: Path) -> Iterator[tuple[str, list[str]]]:
    """(file and line, cells) of every line that is not blank; the header is first."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    shown = str(path.relative_to(root))
    digests[shown] = hashlib.sha256(raw).hexdigest()
    lines = text.splitlines()
    delimiter = max(",;\t", key=(lines[0] if lines else "").count)
    for number, cells in enumerate(csv.reader(lines, delimiter=delimiter), start=1):
        if any(cell.strip() for cell in cells):
            yield f"{root.name}/{shown}, line {number}", [cell.strip() for cell in cells]


def _columns(header: Sequence[str], where: str, known: Sequence[str], options: CsvOptions) -> list[int]:
    """Places of the value columns."""
    if missing := [name for name in options.drop if name not in header]:
        raise ValueError(f"{where}: csv.drop names {missing[0]!r}, but the columns are {', '.join(header[:12])}")
    places = [i for i, name in enumerate(header) if name not in (*known, *options.drop)]
    if not places:
        raise ValueError(f"{where}: no value column beside {', '.join(header[:12])}")
    return places


def _number(cell: str, where: str, column: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        what = "missing" if not cell else f"not a number: {cell[:20]!r}"
        raise ValueError(f"{where}: the value of column {column!r} is {what}") from None
    if not np.isfinite(value):
        raise ValueError(f"{where}: the value of column {column!r} is {value}; only finite values can be used")
    return value


def _cell(cells: Sequence[str], header: Sequence[str], name: str) -> str | None:
    return cells[header.index(name)] or None if name in header else None


def _split_name(value: str | None, where: str) -> str | None:
    if value is not None and value.lower() not in SPLITS:
        raise ValueError(f"{where}: split is {value!r}; use train or test")
    return None if value is None else value.lower()


def _label(cells: Sequence[str], header: Sequence[str], options: CsvOptions, where: str) -> str:
    label = _cell(cells, header, options.label)
    if label is None:
        raise ValueError(f"{where}: the label is empty")
    return label


def _read_rows(folder: Path, options: CsvOptions, digests: dict[str, str]) -> tuple[list[_Found], list[str]]:
    """Each row of each file is one series of one channel."""
    found: list[_Found] = []
    # A hidden one is no data: macOS writes ._train.csv beside train.csv on foreign disks.
    paths = sorted(path for path in folder.glob("*.csv") if path.is_file() and not path.name.startswith("."))
    if not paths:
        raise ValueError(f"{folder}: no .csv file there, and no {LABELS}")
    for path in paths:
        by_name = next((split for split in SPLITS if path.stem.lower().startswith(split)), None)
        lines = _lines(path, digests, folder)
        where, header = next(lines, (f"{folder.name}/{path.name}, line 1", []))
        if options.label not in header:
            raise ValueError(
                f"{where}: no column {options.label!r} in {', '.join(header[:12]) or 'an empty file'}; name the label "
                f"column with csv.label=NAME, or write a {LABELS} with columns file,label"
            )
        places = _columns(header, where, (options.label, options.group, options.split), options)
        if len(places) < 8:
            raise ValueError(
                f"{where}: {len(places)} value columns make no series; a row is one series here. If a file is one "
                f"series, write a {LABELS} with columns file,label beside the files"
            )
        for place, cells in lines:
            if len(cells) != len(header):
                raise ValueError(f"{place}: {len(cells)} cells, the header has {len(header)}")
            values = np.array([[_number(cells[i], place, header[i]) for i in places]])
            split = _split_name(_cell(cells, header, options.split), place) or by_name
            group = _cell(cells, header, options.group)
            found.append(_Found(values, _label(cells, header, options, place), split, group, place))
    widths = {one.series.shape[1] for one in found}
    if len(widths) > 1:
        raise ValueError(f"{folder}: the files have {sorted(widths)} value columns; rows of one data set share them")
    return found, []


def _read_files(folder: Path, options: CsvOptions, digests: dict[str, str]) -> tuple[list[_Found], list[str]]:
    """`labels.csv` lists the files; each is one series."""
    found: list[_Found] = []
    names: list[str] = []
    lines = _lines(folder / LABELS, digests, folder)
    where, header = next(lines, (f"{folder.name}/{LABELS}, line 1", []))
    for name in ("file", options.label):
        if name not in header:
            raise ValueError(f"{where}: no column {name!r} in {', '.join(header[:12]) or 'an empty file'}")
    seen: set[str] = set()
    for place, cells in lines:
        if len(cells) != len(header):
            raise ValueError(f"{place}: {len(cells)} cells, the header has {len(header)}")
        file = _cell(cells, header, "file") or ""
        path = folder / file
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{place}: file {file!r} lies outside the folder")
        if file in seen or not path.is_file():
            raise ValueError(f"{place}: file {file!r} {'is listed twice' if file in seen else 'does not exist'}")
        seen.add(file)
        series, columns = _read_series(path, folder, options, digests)
        names = names or columns
        if columns != names:
            raise ValueError(f"{folder.name}/{file}, line 1: columns {columns}, other files have {names}")
        split, group = _split_name(_cell(cells, header, options.split), place), _cell(cells, header, options.group)
        found.append(_Found(series, _label(cells, header, options, place), split, group, place))
    return found, names


def _read_series(path: Path, folder: Path, options: CsvOptions, digests: dict[str, str]) -> tuple[Series, list[str]]:
    """(channels, length) and the channels' names."""
    lines = _lines(path, digests, folder)
    where, header = next(lines, (f"{folder.name}/{path.relative_to(folder)}, line 1", []))
    places = _columns(header, where, (), options)
    rows = []
    for place, cells in lines:
        if len(cells) != len(header):
            raise ValueError(f"{place}: {len(cells)} cells, the header has {len(header)}")
        rows.append([_number(cells[i], place, header[i]) for i in places])
    if len(rows) < 2:
        raise ValueError(f"{where}: {len(rows)} rows of values; a series has two or more")
    return np.array(rows).T.copy(), [header[i] for i in places]
