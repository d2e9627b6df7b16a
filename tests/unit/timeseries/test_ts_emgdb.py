"""Invariants of `verl.timeseries.emgdb`, on made-up recordings and on the real ones."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from emgdb_fixture import GAIN, write_emgdb

from verl.timeseries import TaskSpec, get_task, tasks
from verl.timeseries.build import BuildConfig, build
from verl.timeseries.from_arrow import write_tables
from verl.timeseries.readers import Archive, Split

LENGTH = 40
SAMPLES = {"emg_healthy": 5 * LENGTH + 13, "emg_myopathy": 10 * LENGTH, "emg_neuropathy": 10 * LENGTH + 39}
DAMAGED = {
    "emg_healthy": {7: b"0.00175 -0.03\xef\xbf\xbd0.0350", 8: b"0.002 0.01/"},
    "emg_myopathy": {1: b"", 400: b"0.1 0.2 0.3"},
    # The wave is beyond 3.2767 mV around sample 40 and below -3.2767 mV around sample 120.
    "emg_neuropathy": {41: b"0.01025 5.0,0000", 121: b"nonsense"},
}
COUNTS = {"Healthy": (20, 7), "Myopathy": (44, 14), "Neuropathy": (58, 20)}
"""Windows of fit and val."""
RECORD_OF = {"Healthy": "emg_healthy", "Myopathy": "emg_myopathy", "Neuropathy": "emg_neuropathy"}


@pytest.fixture
def task() -> TaskSpec:
    """The EMG task with windows of 40 samples, 20 for training and 5 for the test."""
    return replace(get_task("emg"), length=LENGTH, rows=(20, 5))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_emgdb(tmp_path / "emgdb", SAMPLES, DAMAGED)
    return tmp_path / "emgdb"


def windows(archive: Archive) -> dict[str, list[np.ndarray]]:
    """Training then test windows of each class."""
    found: dict[str, list[np.ndarray]] = {}
    for split in (archive.train, archive.test):
        for series, label in zip(split.series, split.labels, strict=True):
            found.setdefault(label, []).append(series)
    return found


def joined(archive: Archive, label: str) -> np.ndarray:
    return np.concatenate([window[0] for window in windows(archive)[label]])


@pytest.mark.parametrize("label", RECORD_OF)
def test_every_sample_comes_back_also_from_unreadable_lines_and_beyond_the_wrap(
    task: TaskSpec, folder: Path, tmp_path: Path, label: str
) -> None:
    made = write_emgdb(tmp_path / "whole", SAMPLES)[RECORD_OF[label]]
    found = joined(task.reader.read(folder, task), label)
    np.testing.assert_allclose(found, made[: len(found)], rtol=0, atol=1e-9)
    assert len(made) - len(found) < LENGTH


def test_the_made_up_neuropathy_wraps_at_its_unreadable_lines(folder: Path) -> None:
    # Without this the test above could pass without a wrap to undo.
    stored = np.frombuffer((folder / "emg_neuropathy.dat").read_bytes(), "<i2") / GAIN
    made = write_emgdb(folder.parent / "again", SAMPLES)["emg_neuropathy"]
    turns = np.round((made - stored) * GAIN / 2**16)
    assert [turns[line - 1] for line in DAMAGED["emg_neuropathy"]] == [1, -1]


def test_windows_are_one_channel_and_the_first_are_train_the_last_test(task: TaskSpec, folder: Path) -> None:
    archive = task.reader.read(folder, task)
    assert {series.shape for split in (archive.train, archive.test) for series in split.series} == {(1, LENGTH)}
    assert Counter(archive.train.labels) == {"Healthy": 4, "Myopathy": 8, "Neuropathy": 8}
    assert Counter(archive.test.labels) == {"Healthy": 1, "Myopathy": 2, "Neuropathy": 2}


def rows_of(folder: Path, table: str) -> dict[str, list[int]]:
    """Class -> rows of the archive's train part."""
    found: dict[str, list[int]] = {}
    for row in pq.read_table(folder / f"{table}.parquet", columns=["extra_info"])["extra_info"].to_pylist():
        found.setdefault(row["answer"], []).append(row["index"])
    return found


@pytest.mark.parametrize("seed", [1, 2])
def test_val_is_the_last_windows_of_each_recordings_train_part(
    task: TaskSpec, folder: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks._TASKS, "emg", task)
    out = tmp_path / "out"
    build(BuildConfig(task="emg", source=str(folder), output=str(out), workers=1, cache=None, seed=seed))
    # Train holds 4, 8 and 8 windows, a quarter of them is val.
    assert rows_of(out, "val") == {"Healthy": [3], "Myopathy": [10, 11], "Neuropathy": [18, 19]}
    assert rows_of(out, "fit") == {"Healthy": [0, 1, 2], "Myopathy": [*range(4, 10)], "Neuropathy": [*range(12, 18)]}
    card = json.loads((out / "data_card.json").read_text())
    assert card["val_cut"] == "the last rows of each class in train"
    before = {name: (out / f"{name}.parquet").read_bytes() for name in ("fit", "val")}
    write_tables(out, task, seed=seed)
    assert {name: (out / f"{name}.parquet").read_bytes() for name in before} == before


def test_a_zip_gives_the_rows_and_digests_of_its_folder(task: TaskSpec, folder: Path) -> None:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.iterdir():
            archive.write(file, f"emgdb-1.0.0/{file.name}")
    expected, found = task.reader.read(folder, task), task.reader.read(path, task)
    assert found.digests == expected.digests and len(found.digests) == 9
    assert found.digests["emg_healthy.txt"] == hashlib.sha256((folder / "emg_healthy.txt").read_bytes()).hexdigest()
    for a, b in ((expected.train, found.train), (expected.test, found.test)):
        assert same(a, b)


def same(a: Split, b: Split) -> bool:
    return a.labels == b.labels and all(np.array_equal(x, y) for x, y in zip(a.series, b.series, strict=True))


def text_edit(record: str, extension: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / f"{record}.{extension}"
        path.write_bytes(change(path.read_bytes()))

    return apply


def line_edit(number: int, text: bytes) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        lines = raw.split(b"\n")
        lines[number - 1] = text
        return b"\n".join(lines)

    return change


def cut_lines(raw: bytes) -> bytes:
    return b"\n".join(raw.split(b"\n")[:-4]) + b"\n"


def damage_eleven(raw: bytes) -> bytes:
    lines = raw.split(b"\n")
    return b"\n".join([*lines[:100], *[b"?"] * 11, *lines[111:]])


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing file": (
        lambda folder: (folder / "emg_myopathy.dat").unlink(),
        r"emgdb: emg_myopathy\.dat is missing; found: emg_.*source=PATH",
    ),
    "cut dat": (
        text_edit("emg_healthy", "dat", lambda raw: raw[:-2]),
        r"emgdb/emg_healthy\.dat: 424 bytes, the header says 213 samples",
    ),
    "cut txt": (
        text_edit("emg_myopathy", "txt", cut_lines),
        r"emg_myopathy\.txt: 397 lines, the header says 400",
    ),
    "many unreadable lines": (
        text_edit("emg_neuropathy", "txt", damage_eleven),
        r"emg_neuropathy\.txt: 13 lines cannot be read, the first is line 41",
    ),
    "txt and dat disagree": (
        text_edit("emg_healthy", "txt", line_edit(30, b"0.0075 1.0000")),
        r"emg_healthy\.txt, line 30: 1\.0 mV, but the \.dat has 0\..* \(also at 0 others\)",
    ),
    "not a header": (text_edit("emg_healthy", "hea", lambda _: b"<html>"), r"emg_healthy\.hea: not a header"),
    "other storage format": (
        text_edit("emg_healthy", "hea", lambda raw: raw.replace(b".dat 16 ", b".dat 212 ")),
        r"emg_healthy\.hea: not a header of one 16-bit signal in mV \(1 signals, format 212",
    ),
    "other unit": (
        text_edit("emg_healthy", "hea", lambda raw: raw.replace(b"/mV", b"/uV")),
        r"emg_healthy\.hea: .*gain 10000/uV",
    ),
    "two signals": (
        text_edit("emg_healthy", "hea", lambda raw: raw.replace(b"emg_healthy 1 ", b"emg_healthy 2 ")),
        r"emg_healthy\.hea: .*2 signals",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_an_error_naming_file_and_line(task: TaskSpec, folder: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    change(folder)
    with pytest.raises(ValueError, match=message):
        task.reader.read(folder, task)


def test_recordings_of_another_size_are_no_whole_archive(task: TaskSpec, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"emgdb: 25 windows, but the archive has 26: a recording is cut off"):
        task.reader.read(folder, replace(task, rows=(21, 5)))


def test_without_a_source_the_error_says_what_to_name(task: TaskSpec) -> None:
    with pytest.raises(ValueError, match="task=emg needs source=PATH"):
        task.reader.read(None, task)


@pytest.fixture(scope="module")
def real(archives: Path) -> Archive:
    task = get_task("emg")
    return task.reader.read(archives / "physionet_emgdb", task)


def test_the_real_recordings_are_the_published_files_in_the_published_counts(real: Archive) -> None:
    task = get_task("emg")
    assert task.download is not None and dict(real.digests) == dict(task.download.sha256)
    assert (len(real.train), len(real.test)) == task.rows == (163, 41)
    total = Counter(real.train.labels) + Counter(real.test.labels)
    assert total == {"Healthy": 33, "Myopathy": 73, "Neuropathy": 98}


def test_the_real_val_has_tf_cs_counts_and_lies_between_fit_and_test(archives: Path, tmp_path: Path) -> None:
    source, out = archives / "physionet_emgdb", tmp_path / "out"
    done = build(BuildConfig(task="emg", source=str(source), output=str(out), modality="numeric"))
    assert [done.rows[name] for name in ("fit", "val", "test")] == [122, 41, 41]
    fit, val = rows_of(out, "fit"), rows_of(out, "val")
    assert {label: (len(fit[label]), len(val[label])) for label in RECORD_OF} == COUNTS
    assert all(max(fit[label]) < min(val[label]) for label in RECORD_OF)


def test_the_real_values_are_finite_and_have_the_published_range(real: Archive) -> None:
    values = {label: joined(real, label) for label in RECORD_OF}
    assert all(np.isfinite(of).all() for of in values.values())
    # The .dat alone would end at -3.2768.
    assert values["Neuropathy"].min() == pytest.approx(-7.30, abs=0.01)
    assert values["Neuropathy"].max() == pytest.approx(3.26, abs=0.01)


@pytest.mark.parametrize(
    ("label", "lines"),
    [("Healthy", (639, 41464)), ("Myopathy", (64468, 93751)), ("Neuropathy", (71194, 84054))],
)
def test_the_real_unreadable_lines_hold_the_value_of_the_dat(
    real: Archive, archives: Path, label: str, lines: tuple[int, int]
) -> None:
    raw = (archives / "physionet_emgdb" / f"{RECORD_OF[label]}.dat").read_bytes()
    stored, values = np.frombuffer(raw, "<i2") / GAIN, joined(real, label)
    assert [values[line - 1] for line in lines] == [stored[line - 1] for line in lines]
    jumps = max(abs(b - a) for line in lines for a, b in pairwise(values[line - 2 : line + 1]))
    assert jumps < 1.0, f"a jump of {jumps} mV at an unreadable line: a missed turn of the .dat would be 6.55"
