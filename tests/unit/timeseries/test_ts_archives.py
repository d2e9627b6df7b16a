"""Readers and builds of ECG, HAR, RCW and TEE: on small made-up archives, and on the real ones where they are."""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat
from small_archives import WINDOW, write_cinc, write_har, write_whales, zipped

from verl.timeseries import get_task
from verl.timeseries.build import BuildConfig, build, main
from verl.timeseries.from_arrow import write_tables
from verl.timeseries.readers import Archive

ECG, HAR, RCW = get_task("ecg"), get_task("har"), get_task("rcw")


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def built(task: str, source: Path, folder: Path, **options: Any) -> dict[str, Any]:
    """The data card of a build."""
    build(BuildConfig(task=task, source=str(source), output=str(folder), workers=1, cache=None, **options))
    return json.loads((folder / "data_card.json").read_text())


def same(a: Archive, b: Archive) -> bool:
    return all(
        x.labels == y.labels and x.groups == y.groups and np.array_equal(np.stack(x.series), np.stack(y.series))
        for x, y in ((a.train, b.train), (a.test, b.test))
    )


# --- ECG ------------------------------------------------------------------------------------------------------------


def test_ecg_windows_are_whole_do_not_overlap_and_keep_their_records_label(tmp_path: Path) -> None:
    listed = write_cinc(tmp_path)
    archive = ECG.reader.read(tmp_path, ECG)
    names = dict(zip("NAO~", ECG.classes, strict=True))
    found: Counter[tuple[str, str]] = Counter()
    for part in (archive.train, archive.test):
        assert part.groups is not None
        assert all(series.shape == (1, WINDOW) for series in part.series)
        found.update(zip(part.groups, part.labels, strict=True))
    assert found == {(record, names[label]): windows for record, (label, windows) in listed.items()}


def test_ecg_values_are_in_millivolt(tmp_path: Path) -> None:
    write_cinc(tmp_path)
    savemat(tmp_path / "A00001.mat", {"val": np.full((1, WINDOW), 1250, np.int16)}, format="4")
    archive = ECG.reader.read(tmp_path, ECG)
    parts = (archive.train, archive.test)
    (window,) = [s for p in parts for s, g in zip(p.series, p.groups or (), strict=True) if g == "A00001"]
    assert np.all(window == 1.25)


def test_ecg_spellings_of_the_reference_and_a_zip_give_the_same_rows(tmp_path: Path) -> None:
    write_cinc(tmp_path / "flat")
    write_cinc(tmp_path / "deep" / "training2017", reference="REFERENCE.csv", nested=True)
    expected = ECG.reader.read(tmp_path / "flat", ECG)
    assert same(ECG.reader.read(tmp_path / "deep", ECG), expected)
    assert same(ECG.reader.read(zipped(tmp_path / "deep", tmp_path / "a.zip"), ECG), expected)


def test_ecg_prefers_the_corrected_reference(tmp_path: Path) -> None:
    write_cinc(tmp_path)
    (tmp_path / "REFERENCE.csv").write_text("A00001,~\n")
    assert "REFERENCE-v3.csv" in ECG.reader.read(tmp_path, ECG).digests


def test_no_ecg_record_is_on_two_sides(tmp_path: Path) -> None:
    write_cinc(tmp_path / "a")
    card = built("ecg", tmp_path / "a", tmp_path / "out", modality="numeric")
    assert card["groups_shared"] == {"train_and_test": 0, "fit_and_val": 0} and card["group_kind"] == "record"
    assert card["groups"]["train"] + card["groups"]["test"] == 24
    assert card["groups"]["fit"] + card["groups"]["val"] == card["groups"]["train"]
    assert "24 of 8528 records are here" in card["warnings"]


def test_tables_of_grouped_rows_are_not_cut_again_by_row(tmp_path: Path) -> None:
    write_cinc(tmp_path / "a")
    built("ecg", tmp_path / "a", tmp_path / "out", modality="numeric")
    with pytest.raises(ValueError, match="task ecg are cut by record, which the Arrow folders do not hold"):
        write_tables(tmp_path / "out", ECG)


def lines(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


ECG_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a record without a file": (lambda f: (f / "A00003.mat").unlink(), r"1 records without a \.mat file: A00003"),
    "a file without a label": (
        lambda f: lines(f / "REFERENCE-v3.csv", lambda rows: rows[:-2]),
        r"2 records without a label: A00023, A00024",
    ),
    "no reference": (lambda f: (f / "REFERENCE-v3.csv").unlink(), r"no REFERENCE-v3\.csv or REFERENCE\.csv there"),
    "twice": (
        lambda f: lines(f / "REFERENCE-v3.csv", lambda rows: [*rows, rows[0]]),
        r"line 25: record A00001 is listed twice",
    ),
    "unknown label": (
        lambda f: lines(f / "REFERENCE-v3.csv", lambda rows: ["A00001,Q", *rows[1:]]),
        r"line 1: label 'Q' is not declared by task ecg",
    ),
    "no comma": (
        lambda f: lines(f / "REFERENCE-v3.csv", lambda rows: ["A00001", *rows[1:]]),
        r"line 1: expected `record,label`, got 'A00001'",
    ),
    "damaged": (
        lambda f: (f / "A00004.mat").write_bytes((f / "A00004.mat").read_bytes()[:100]),
        r"A00004\.mat: not a MATLAB file",
    ),
    "not a mat": (lambda f: (f / "A00004.mat").write_bytes(b"<html>"), r"A00004\.mat: not a MATLAB file"),
    "other variable": (
        lambda f: savemat(f / "A00004.mat", {"x": np.ones((1, 5), np.int16)}, format="4"),
        r"A00004\.mat: no variable val",
    ),
    "two leads": (
        lambda f: savemat(f / "A00004.mat", {"val": np.ones((2, 5), np.int16)}, format="4"),
        r"A00004\.mat: val is int16 of shape \(2, 5\)",
    ),
}


@pytest.mark.parametrize("fault", ECG_FAULTS)
def test_a_fault_of_an_ecg_archive_is_one_error_naming_the_file(fault: str, tmp_path: Path) -> None:
    change, message = ECG_FAULTS[fault]
    write_cinc(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        ECG.reader.read(tmp_path, ECG)


# --- HAR ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subjects", [False, True], ids=["runs", "subjects"])
def test_har_fit_and_val_share_no_group_and_no_half_window(subjects: bool, tmp_path: Path) -> None:
    card = built("har", write_har(tmp_path / "a", subjects=subjects), tmp_path / "out", modality="numeric")
    assert card["groups_shared"] == {"train_and_test": 0, "fit_and_val": 0}
    assert card["overlapping_windows"] == {"train_and_test": 0, "fit_and_val": 0}
    assert card["group_kind"] == ("subject" if subjects else "run of one activity")
    assert 0 < card["rows"]["val"] < card["rows"]["fit"]


def test_har_windows_dealt_by_row_would_overlap_and_the_card_would_say_so(tmp_path: Path) -> None:
    from dataclasses import replace

    from verl.timeseries.card import find_overlaps, parts_of
    from verl.timeseries.split import stratified_cut

    archive = HAR.reader.read(write_har(tmp_path), HAR)
    train = replace(archive.train, groups=None)
    val, fit = stratified_cut(train.labels, len(train) // 5, seed=1)
    rows = {"train": range(len(train)), "test": range(len(archive.test)), "fit": fit, "val": val}
    found = find_overlaps(parts_of(replace(archive, train=train), rows), overlap=0.5)
    assert found.stretches["fit_and_val"] > 0
    assert any("overlap" in warning for warning in found.warnings("run"))


def test_har_reads_three_channels_in_order_and_names_its_groups(tmp_path: Path) -> None:
    archive = HAR.reader.read(write_har(tmp_path), HAR)
    first = np.loadtxt(tmp_path / "train" / "Inertial Signals" / "body_acc_z_train.txt")[7]
    assert np.array_equal(archive.train.series[7][2], first) and archive.train.series[7].shape == (3, 128)
    groups = archive.train.groups or ()
    changes = sum(a != b for a, b in pairwise(groups))
    assert (len(groups), len(set(groups)), changes) == (108, 18, 17)


def test_har_reads_the_zip_within_the_zip_that_uci_offers(tmp_path: Path) -> None:
    inner = zipped(write_har(tmp_path / "a"), tmp_path / "UCI HAR Dataset.zip")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.write(inner, inner.name)
    assert same(HAR.reader.read(tmp_path / "outer.zip", HAR), HAR.reader.read(tmp_path / "a", HAR))


HAR_FAULTS: dict[str, tuple[str, Callable[[list[str]], list[str]], str]] = {
    "cut between lines": (
        "body_acc_y",
        lambda rows: rows[:-3],
        r"body_acc_y_train\.txt: 105 lines, but y_train\.txt h",
    ),
    "cut inside a line": (
        "body_acc_y",
        lambda rows: [*rows[:-1], rows[-1][:40]],
        r"body_acc_y_train\.txt, line 108: \d values where 128 belong",
    ),
    "not a number": (
        "body_acc_x",
        lambda rows: ["x" + rows[0][10:], *rows[1:]],
        r"body_acc_x_train\.txt, line 1: ",
    ),
    "not finite": (
        "body_acc_x",
        lambda rows: [rows[0], "nan " + rows[1].split(" ", 1)[1], *rows[2:]],
        r"body_acc_x_train\.txt, line 2: a value is not finite",
    ),
}


@pytest.mark.parametrize("fault", HAR_FAULTS)
def test_a_fault_of_a_har_archive_is_one_error_naming_file_and_line(fault: str, tmp_path: Path) -> None:
    signal, change, message = HAR_FAULTS[fault]
    write_har(tmp_path)
    lines(tmp_path / "train" / "Inertial Signals" / f"{signal}_train.txt", change)
    with pytest.raises(ValueError, match=message):
        HAR.reader.read(tmp_path, HAR)


# --- RCW ------------------------------------------------------------------------------------------------------------


def test_rcw_builds_from_a_small_archive_of_the_same_format_and_says_that_rows_are_missing(tmp_path: Path) -> None:
    card = built("rcw", write_whales(tmp_path / "a"), tmp_path / "out")
    assert card["rows_per_class"]["train"] == {"RightWhale": 10, "NoWhale": 10}
    assert "RightWhaleCalls_TRAIN.arff has 20 rows, the archive is reported to have 10934" in card["warnings"]
    assert card["vision_tokens"] == 21 * 10
    png = table(tmp_path / "out", "train")[0]["images"][0]["bytes"]
    assert Image.open(io.BytesIO(png)).size == (588, 280)


def test_rcw_labels_of_both_formats_mean_the_same(tmp_path: Path) -> None:
    arff = RCW.reader.read(write_whales(tmp_path / "a", "arff"), RCW)
    assert same(arff, RCW.reader.read(write_whales(tmp_path / "b", "ts"), RCW))


# --- real archives --------------------------------------------------------------------------------------------------

REAL = {
    "tee": ("ucr/Lightning7", {"train": (8, 8, 8, 12, 5, 19, 10), "test": (10, 9, 6, 7, 10, 19, 12)}),
    "ctu": ("ucr/Computers", {"train": (125, 125), "test": (125, 125)}),
    "emg": ("physionet_emgdb", {"both": (33, 73, 98)}),
    "har": ("uci_har", {"train": (400, 350, 322, 420, 449, 459), "test": (50, 48, 43, 50, 54, 55)}),
    "ecg": ("cinc2017", {"both": (1582, 1525, 1628, 1065)}),
}
"""Task -> (folder, windows per class in id order), as the archives' README counts them."""


@pytest.mark.parametrize("name", REAL)
def test_a_real_archive_builds_with_the_class_table_of_its_readme(name: str, archives: Path, tmp_path: Path) -> None:
    folder, expected = REAL[name]
    output = tmp_path / "out"
    assert main([f"task={name}", f"source={archives / folder}", "modality=numeric", f"output={output}"]) == 0
    card = json.loads((output / "data_card.json").read_text())
    counts = {part: tuple(of.values()) for part, of in card["rows_per_class"].items()}
    counts["both"] = tuple(a + b for a, b in zip(counts["train"], counts["test"], strict=True))
    assert {part: counts[part] for part in expected} == expected
    assert card["series_in_train_and_test"] == 0 and not any(card["groups_shared"].values())
    assert not any(card["overlapping_windows"].values())
    assert card["rows"]["fit"] + card["rows"]["val"] == card["rows"]["train"] == sum(counts["train"])


def test_files_that_an_operating_system_adds_are_left_alone(tmp_path: Path) -> None:
    folder = write_har(tmp_path / ".cache" / "a")
    expected = HAR.reader.read(folder, HAR)
    for place in {path.parent for path in folder.rglob("*") if path.is_file()}:
        (place / ".DS_Store").write_bytes(b"\0")
        for name in (".ipynb_checkpoints", "__MACOSX"):
            (place / name).mkdir()
            (place / name / "y_train.txt").touch()
    assert same(HAR.reader.read(folder, HAR), expected)
