"""Invariants of `verl.timeseries.readers` and `unpack`."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_archive import text_of, write_archive

from verl.timeseries import TaskSpec, get_task, task_names
from verl.timeseries.readers import Archive, Split, UcrReader
from verl.timeseries.task import Download
from verl.timeseries.unpack import main as unpack_main
from verl.timeseries.unpack import unpack_zip


def same(a: Split, b: Split) -> bool:
    return a.labels == b.labels and all(np.array_equal(x, y) for x, y in zip(a.series, b.series, strict=True))


def zip_of(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, prefix + file.name)
    return path


@pytest.mark.parametrize("extension", ["arff", "tsv", "txt"])
def test_every_format_gives_the_rows_of_the_ts_file(tiny_task: TaskSpec, tmp_path: Path, extension: str) -> None:
    expected = tiny_task.reader.read(write_archive(tmp_path / "a"), tiny_task)
    found = tiny_task.reader.read(write_archive(tmp_path / "b", extension), tiny_task)
    assert same(expected.train, found.train) and same(expected.test, found.test)
    assert expected.train.series[0].shape == (1, 12) and expected.train.series[0].dtype == np.float64
    assert expected.train.labels == ("Up",) * 10 + ("Down",) * 10


@pytest.mark.parametrize("prefix", ["", "Tiny/"])
def test_a_zip_gives_the_rows_of_its_folder(
    tiny_task: TaskSpec, tiny_folder: Path, tmp_path: Path, prefix: str
) -> None:
    path = zip_of(tiny_folder, tmp_path / "Tiny.zip", prefix)
    before = sorted(tmp_path.rglob("*"))
    found = tiny_task.reader.read(path, tiny_task)
    assert same(found.train, tiny_task.reader.read(tiny_folder, tiny_task).train)
    assert sorted(tmp_path.rglob("*")) == before, "reading a zip must not unpack it"


def read_computers(archives: Path, extension: str) -> Archive:
    task = replace(get_task("ctu"), reader=UcrReader("Computers", formats=(extension,)))
    return task.reader.read(archives / "ucr" / "Computers", task)


def test_computers_ts_and_arff_give_identical_rows(archives: Path) -> None:
    ts, arff = read_computers(archives, "ts"), read_computers(archives, "arff")
    assert same(ts.train, arff.train) and same(ts.test, arff.test)
    assert [ts.train.labels.count(c) for c in ("Desktop", "Laptop")] == [125, 125]


def test_values_equal_those_of_sktimes_own_loader() -> None:
    sktime = pytest.importorskip("sktime.datasets")
    for name in ("basic_motions", "gun_point"):
        task = get_task(name)
        assert isinstance(task.reader, UcrReader)
        expected, labels = sktime.load_UCR_UEA_dataset(task.reader.problem, split="train", return_type="numpy3D")
        found = task.reader.read(None, task).train
        assert np.array_equal(np.stack(found.series), expected), name
        # sktime lower-cases labels.
        names = {spec.file_label.lower(): spec.name for spec in task.class_specs}
        assert list(found.labels) == [names[label] for label in labels], name


def test_every_bundled_task_reads_and_holds_every_class() -> None:
    pytest.importorskip("sktime")
    for name in task_names():
        task = get_task(name)
        if isinstance(task.reader, UcrReader) and task.reader.bundled:
            archive = task.reader.read(None, task)
            assert set(archive.train.labels) == set(archive.test.labels) == set(task.classes), name


def edit_row(text: str, row: int, change: Callable[[str], str]) -> str:
    lines = text.splitlines()
    at = lines.index("@data") + 1 + row
    lines[at] = change(lines[at])
    return "\n".join(lines) + "\n"


def cell(line: str, value: str) -> str:
    parts = line.split(",")
    return ",".join([*parts[:4], value, *parts[5:]])


FAULTS: dict[str, tuple[Callable[[str], str], str]] = {
    "cut inside a row": (lambda t: t[: t.rindex(",")], r"Tiny_TRAIN\.ts, row 19 \(line 26\).*cut off"),
    "cut between rows": (lambda t: "\n".join(t.splitlines()[:-3]), r"Tiny_TRAIN\.ts: has 17 rows, but .* has 20"),
    "cut inside the header": (lambda t: t[:40], r"Tiny_TRAIN\.ts: no @data line"),
    "no rows": (lambda t: t[: t.index("@data") + 6], r"Tiny_TRAIN\.ts: no data rows"),
    "empty file": (lambda t: "", r"Tiny_TRAIN\.ts: no @data line"),
    "undeclared label": (
        lambda t: edit_row(t, 3, lambda r: r[:-1] + "7"),
        r"Tiny_TRAIN\.ts, row 3 .*label '7' is not decl",
    ),
    "label the task lacks": (
        lambda t: edit_row(t, 3, lambda r: r[:-1] + "7").replace("true 1 2", "true 1 2 7"),
        r"row 3 .*label '7' is not declared by task tiny; declared: 1 \(Up\), 2 \(Down\)",
    ),
    "ragged": (
        lambda t: edit_row(t, 5, lambda r: r.split(",", 1)[1]),
        r"row 5 .*ragged series, \[11\] values where 12",
    ),
    "nan": (lambda t: edit_row(t, 6, lambda r: cell(r, "NaN")), r"row 6 .*value 4 of channel 0 is nan"),
    "infinite": (lambda t: edit_row(t, 6, lambda r: cell(r, "-inf")), r"row 6 .*value 4 of channel 0 is -inf"),
    "missing": (lambda t: edit_row(t, 7, lambda r: cell(r, "?")), r"row 7 .*value 4 of channel 0 is missing: '\?'"),
    "not a number": (lambda t: edit_row(t, 8, lambda r: cell(r, "1,x")[:-2] + ":1"), r"row 8 "),
    "two channels": (lambda t: edit_row(t, 9, lambda r: r.replace(":", ":1,2:")), r"row 9 .*2 channels.* has 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_error_naming_file_and_row(tiny_task: TaskSpec, tiny_folder: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    path = tiny_folder / "Tiny_TRAIN.ts"
    path.write_text(change(text_of("ts", "TRAIN")), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        tiny_task.reader.read(tiny_folder, tiny_task)


def test_a_missing_archive_is_an_error_naming_the_path(tiny_task: TaskSpec, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source=.*nowhere does not exist"):
        tiny_task.reader.read(tmp_path / "nowhere", tiny_task)
    (tmp_path / "other.txt").touch()
    with pytest.raises(ValueError, match=r"no Tiny_TRAIN and Tiny_TEST there.*found: other\.txt"):
        tiny_task.reader.read(tmp_path, tiny_task)
    with pytest.raises(ValueError, match="task=tiny needs source=PATH"):
        tiny_task.reader.read(None, tiny_task)


def test_a_missing_half_is_an_error_naming_it(tiny_task: TaskSpec, tiny_folder: Path) -> None:
    (tiny_folder / "Tiny_TEST.ts").unlink()
    with pytest.raises(ValueError, match=r"found Tiny_TRAIN\.ts but not Tiny_TEST\.ts"):
        tiny_task.reader.read(tiny_folder, tiny_task)


@pytest.mark.parametrize("damage", ["truncated", "flipped byte", "not a zip"])
def test_a_damaged_zip_is_an_error_naming_it(
    tiny_task: TaskSpec, tiny_folder: Path, tmp_path: Path, damage: str
) -> None:
    path = zip_of(tiny_folder, tmp_path / "Tiny.zip")
    raw = bytearray(path.read_bytes())
    if damage == "truncated":
        raw = raw[: len(raw) // 2]
    elif damage == "flipped byte":
        raw[len(raw) // 3] ^= 0xFF
    else:
        raw = bytearray(b"<html>not found</html>")
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"Tiny\.zip"):
        tiny_task.reader.read(path, tiny_task)
    with pytest.raises(ValueError, match=r"Tiny\.zip"):
        unpack_zip(path, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_damage_at_any_place_of_a_packed_zip_is_an_error_naming_it(
    tiny_task: TaskSpec, tiny_folder: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(tiny_folder.iterdir()):
            archive.write(file, file.name)
    raw, path, missed = whole.read_bytes(), tmp_path / "Tiny.zip", []
    for start in range(64, len(raw) - 512, 97):  # the zip's own table at the end is another test's
        path.write_bytes(raw[:start] + bytes(b ^ 0xA5 for b in raw[start : start + 32]) + raw[start + 32 :])
        for what in (lambda: tiny_task.reader.read(path, tiny_task), lambda: unpack_zip(path, tmp_path / "out")):
            try:
                what()
                missed.append(f"{start}: no error")
            except ValueError as error:
                if "Tiny.zip" not in str(error):
                    missed.append(f"{start}: {error}")
    assert not missed


def test_a_zip_that_holds_one_name_twice_is_refused(tiny_task: TaskSpec, tiny_folder: Path, tmp_path: Path) -> None:
    path = zip_of(tiny_folder, tmp_path / "Tiny.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/Tiny_TRAIN.ts", "added by an operating system")
    tiny_task.reader.read(path, tiny_task)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("older/Tiny_TRAIN.ts", "another file")
    with pytest.raises(ValueError, match=r"Tiny\.zip: Tiny_TRAIN\.ts is in it twice"):
        tiny_task.reader.read(path, tiny_task)


@pytest.mark.parametrize(
    "name", ["../evil.txt", "/tmp/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:/evil.txt", ".", "link"]
)
def test_a_zip_that_would_leave_its_folder_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    path, into = tmp_path / "bad.zip", tmp_path / "deep" / "into"
    info = zipfile.ZipInfo(name)
    if name == "link":
        info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("Tiny_TRAIN.ts", "fine")
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match=r"bad\.zip: member .* would leave the folder"):
        unpack_zip(path, into)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["bad.zip"]


def test_an_archive_with_other_bytes_than_published_is_refused(
    tiny_task: TaskSpec, tiny_folder: Path, tmp_path: Path
) -> None:
    task = replace(tiny_task, download=Download("https://example.org/Tiny.zip", {"Tiny_TRAIN.ts": "0" * 64}))
    with pytest.raises(
        ValueError, match=r"Tiny\.zip: member Tiny_TRAIN\.ts: sha256 is [0-9a-f]{64}, the published file has 0{64}"
    ):
        unpack_zip(zip_of(tiny_folder, tmp_path / "Tiny.zip"), tmp_path / "out", task)
    assert not list((tmp_path / "out").iterdir())


def test_the_real_archive_passes_the_checksum(archives: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert unpack_main(["task=ctu", f"into={archives / 'ucr' / 'Computers'}"]) == 0
    assert unpack_main(["task=ctu", f"into={archives / 'ucr' / 'Lightning7'}"]) == 2
    assert "Computers_TRAIN.arff is missing" in capsys.readouterr().err
