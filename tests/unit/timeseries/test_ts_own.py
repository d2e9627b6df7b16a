"""Invariants of `verl.timeseries.own`: data sets of CSV files without code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from verl.protocol import Prompt
from verl.timeseries.build import main, parse_args
from verl.timeseries.own import csv_task
from verl.timeseries.plot import draw
from verl.timeseries.spectrogram import power
from verl.utils.reward_score import known_classes
from verl.workers.reward_manager.manager import RewardItem, RewardManager

RNG = np.random.default_rng(0)


def write_files(folder: Path, *, count: int = 20, group: bool = True, name: str = "pumps", steps: int = 30) -> Path:
    """labels.csv and `count` files of two channels and `steps` steps; two files a machine."""
    folder = folder / name
    folder.mkdir(parents=True)
    lines = ["file,label" + (",group" if group else "")]
    for i in range(count):
        values = RNG.normal(size=(steps, 2))
        rows = [f"{step * 0.01:.2f},{a:.3f},{b:.3f}" for step, (a, b) in enumerate(values)]
        (folder / f"s{i}.csv").write_text("time,pressure,flow\n" + "\n".join(rows) + "\n")
        lines.append(f"s{i}.csv,{('ok', 'worn')[i // 2 % 2]}" + (f",machine {i // 2}" if group else ""))
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_wide(folder: Path, files: dict[str, int], delimiter: str = ",") -> Path:
    """Rows of 12 values, labels in turn, file name -> rows."""
    folder = folder / "wide"
    folder.mkdir(parents=True)
    for name, count in files.items():
        rows = [["kind", *(f"t{i}" for i in range(12))]]
        rows += [[("up", "down", "flat")[i % 3], *(f"{v:.4f}" for v in RNG.normal(size=12))] for i in range(count)]
        (folder / name).write_text("\ufeff" + "\n".join(delimiter.join(row) for row in rows) + "\n", encoding="utf-8")
    return folder


def built(folder: Path, output: Path, *options: str) -> dict[str, Any]:
    arguments = ["task=csv", f"source={folder}", f"output={output}", "workers=1", "cache=null", *options]
    assert main(arguments) == 0
    return json.loads((output / "data_card.json").read_text())


def test_files_with_groups_build_and_no_group_is_divided(tmp_path: Path) -> None:
    card = built(write_files(tmp_path), tmp_path / "out", "csv.drop=[time]", "csv.rate=100", "csv.unit=bar")
    assert card["classes"] == ["ok", "worn"] and card["channels"] == 2 and card["points"] == [30]
    assert card["rows"]["train"] + card["rows"]["test"] == 20 and card["rows"]["test"] == 4
    assert card["group_kind"] == "group" and card["groups_shared"] == {"train_and_test": 0, "fit_and_val": 0}
    assert card["style"]["channel_names"] == ["pressure", "flow"] and card["style"]["legend"]
    assert any("no test part: 4 rows were cut" in warning for warning in card["warnings"])


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_rows_are_series_and_file_names_are_the_split(delimiter: str, tmp_path: Path) -> None:
    folder = write_wide(tmp_path, {"train_a.csv": 30, "test.csv": 9}, delimiter)
    card = built(folder, tmp_path / "out", "csv.label=kind", "modality=numeric", "csv.name=shapes")
    assert card["rows"]["train"] == 30 and card["rows"]["test"] == 9 and card["data_source"] == "shapes_dataset"
    assert card["rows_per_class"]["test"] == {"down": 3, "flat": 3, "up": 3}
    rows = pq.read_table(tmp_path / "out" / "test.parquet").to_pylist()
    assert rows[0]["extra_info"]["classes"] == ["down", "flat", "up"]


def test_values_are_those_of_the_file(tmp_path: Path) -> None:
    folder = write_files(tmp_path, group=False)
    archive = csv_task(str(folder), {"drop": ["time"]}).reader.read(None, None)  # type: ignore[arg-type]
    every = archive.train.series + archive.test.series
    table = np.loadtxt(folder / "s7.csv", delimiter=",", skiprows=1)[:, 1:].T
    assert sum(np.array_equal(series, table) for series in every) == 1


def test_the_declared_order_of_the_classes_is_that_of_their_ids(tmp_path: Path) -> None:
    assert csv_task(str(write_files(tmp_path)), {"drop": ["time"], "classes": ["worn", "ok"]}).classes == ("worn", "ok")


@pytest.mark.parametrize("plot", ["line", "lines", "grid", "spectrogram"])
def test_every_plot_style_draws(plot: str, tmp_path: Path) -> None:
    folder = write_files(tmp_path, steps=40)
    card = built(folder, tmp_path / "out", "csv.drop=[time]", f"csv.plot={plot}", "csv.rate=100", "limit=8")
    assert card["vision_tokens"] == card["canvas"][0] // 28 * (card["canvas"][1] // 28)


def test_a_spectrogram_of_short_series_has_columns_and_names_its_channels(tmp_path: Path) -> None:
    task = csv_task(
        str(write_files(tmp_path, steps=60)), {"drop": ["time"], "plot": "spectrogram", "rate": 100.0, "title": "Pumps"}
    )
    assert task.plot.spectrogram is not None and task.plot.channel_names == ("pressure", "flow")
    series = task.reader.read(None, task).train.series[0]
    assert power(series[0], task.plot.spectrogram).shape[1] >= 16
    plain = replace(task.plot, channel_names=())
    assert draw(series, task.plot) != draw(series, plain)


def test_a_spectrogram_of_too_few_points_is_an_error_naming_the_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_files(tmp_path)
    arguments = ["task=csv", f"source={folder}", "csv.drop=[time]", "csv.plot=spectrogram", "csv.rate=100"]
    assert main([*arguments, f"output={tmp_path / 'out'}"]) == 2
    message = r"labels\.csv, line 2: a series of 30 points is too short for csv\.plot=spectrogram, which needs 32"
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_texts_about_digits_speak_of_the_series_and_texts_about_a_spectrogram_of_what_is_in_it(tmp_path: Path) -> None:
    folder = write_files(tmp_path, steps=60)
    asked = ("csv.drop=[time]", "csv.plot=spectrogram", "csv.rate=100", "limit=8")
    for modality in ("image", "numeric"):
        built(folder, tmp_path / modality, *asked, f"modality={modality}")
    picture, digits = (
        " ".join(pq.read_table(tmp_path / modality / "sft_fit.parquet")["response"].to_pylist())
        for modality in ("image", "numeric")
    )
    said = [[word in text for word in ("loudest part", "rhythm")] for text in (picture, digits)]
    assert said == [[True, False], [False, True]]


def test_rows_are_scored_by_the_classes_that_they_carry(tmp_path: Path) -> None:
    built(write_files(tmp_path, name="scored"), tmp_path / "out", "csv.drop=[time]", "modality=numeric")
    record = pq.read_table(tmp_path / "out" / "test.parquet").to_pylist()[0]
    truth, source = record["reward_model"]["ground_truth"], record["data_source"]
    prompt = Prompt("r", 0, source, np.zeros(1, np.int32), (), (), truth, record["extra_info"])
    manager = RewardManager(max_failure_rate=0.0, answer_format="strict")
    manager.check_prompts([prompt])
    wrong = "ok" if truth == "worn" else "worn"
    texts = [f"<think>x</think><class>{label}</class>" for label in (truth, wrong)]
    scores = manager.score([RewardItem(prompt, text) for text in (*texts, "x")])
    assert [score.total for score in scores] == [1.0, 0.1, 0.0]
    assert known_classes(source) == ("ok", "worn")
    other = Prompt("r", 1, source, np.zeros(1, np.int32), (), (), "a", {"classes": ["a", "b"]})
    with pytest.raises(ValueError, match=r"'scored_dataset' has the classes ok, worn, but a row names a, b"):
        manager.check_prompts([other])


def edit(path: str, change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_text(change((folder / path).read_text()))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "not a number": (
        edit("s3.csv", lambda t: t.replace("\n0.01,", "\n0.01,x")),
        r"pumps/s3\.csv, line 3: .*'pressure'",
    ),
    "missing": (
        edit("s3.csv", lambda t: "\n".join([*t.splitlines()[:4], "0.03,,1.0"])),
        r"pumps/s3\.csv, line 5: the value of column 'pressure' is missing",
    ),
    "not finite": (
        edit("s3.csv", lambda t: "\n".join([*t.splitlines()[:4], "0.03,nan,1.0"])),
        r"line 5: the value of column 'pressure' is nan; only finite",
    ),
    "cells": (
        edit("s3.csv", lambda t: "\n".join([*t.splitlines()[:4], "0.03,1.0"])),
        r"pumps/s3\.csv, line 5: 2 cells, the header has 3",
    ),
    "other columns": (
        edit("s3.csv", lambda t: t.replace("flow", "heat")),
        r"pumps/s3\.csv, line 1: columns \['pressure', 'heat'\], other files have",
    ),
    "no such file": (lambda f: (f / "s5.csv").unlink(), r"labels\.csv, line 7: file 's5\.csv' does not exist"),
    "outside": (
        edit("labels.csv", lambda t: t.replace("s0.csv", "../s0.csv")),
        r"labels\.csv, line 2: file '\.\./s0\.csv' lies outside the folder",
    ),
    "twice": (edit("labels.csv", lambda t: t.replace("s1.csv", "s0.csv")), r"line 3: file 's0\.csv' is listed twice"),
    "no label": (edit("labels.csv", lambda t: t.replace("s2.csv,worn", "s2.csv,")), r"line 4: the label is empty"),
    "no label column": (edit("labels.csv", lambda t: t.replace("label", "kind")), r"no column 'label' in file, kind"),
    "two spellings": (
        edit("labels.csv", lambda t: t.replace("s2.csv,worn", "s2.csv,Worn")),
        r"line \d+: label '[Ww]orn' is '[Ww]orn' elsewhere \(.*labels\.csv, line \d+\): write it one way",
    ),
    "no group": (edit("labels.csv", lambda t: t.replace("machine 0", "")), r"line 2: no 'group', but other rows have"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_naming_file_and_line(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = FAULTS[fault]
    folder = write_files(tmp_path)
    change(folder)
    with pytest.raises(ValueError, match=message):
        csv_task(str(folder), {"drop": ["time"]})
    assert main(["task=csv", f"source={folder}", "csv.drop=[time]", f"output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"questoin": "x"}, r"unknown key csv\.questoin; known: name, question"),
        ({"drop": ["tim"]}, r"csv\.drop names 'tim', but the columns are time, pressure, flow"),
        ({"drop": ["time"], "classes": ["ok", "old"]}, r"line \d+: label 'worn' is not in csv\.classes \(ok, old\)"),
        ({"drop": ["time"], "plot": "bars"}, r"csv\.plot='bars': use one of line, lines, grid, spectrogram"),
        ({"drop": ["time"], "plot": "spectrogram"}, r"csv\.plot=spectrogram needs csv\.rate"),
        ({"rate": "fast"}, r"csv\.rate='fast' must be of type float"),
        ({"test_fraction": 1.5}, r"csv\.test_fraction=1\.5 must lie in \(0, 1\)"),
    ],
)
def test_a_bad_option_is_an_error_naming_the_key(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        csv_task(str(write_files(tmp_path)), options)


def test_one_unit_is_refused_where_a_column_names_another(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    for file in folder.glob("s*.csv"):
        file.write_text(file.read_text().replace("pressure", "pressure [bar]").replace("flow", "flow (l/min)"))
    with pytest.raises(ValueError, match=r"csv\.unit=bar is the unit of all channels, but column 'flow \(l/min\)'"):
        csv_task(str(folder), {"drop": ["time"], "unit": "bar"})
    assert csv_task(str(folder), {"drop": ["time"]}).unit == ""


def test_a_folder_of_single_series_without_labels_says_what_to_write(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    (folder / "labels.csv").unlink()
    with pytest.raises(ValueError, match=r"no column 'label'.*write a labels\.csv with columns file,label"):
        csv_task(str(folder), {})


def test_csv_options_are_refused_for_other_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task=gun_point", "csv.name=x"]) == 2
    assert "csv.* has no effect on task=gun_point" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "Pump #3 and pump # 4, ok or worn?",
        "What is shown: is x=1 or x=2?",
        "[ok] or worn",
        "{ok} or ${worn}",
        "'ok' or \"worn\"?",
        "12",
        "???",
        "yes",
    ],
)
@pytest.mark.parametrize("key", ["csv.question", "csv.title", "style.title"])
def test_text_is_what_stands_after_the_first_equals_sign(key: str, text: str) -> None:
    group, _, name = key.partition(".")
    assert getattr(parse_args(["task=csv", f"{key}={text}"]), group) == {name: text}
    assert parse_args([f"source={text}", "task=csv"]).source == text


@pytest.mark.parametrize("key", ["csv.", "style.", "numeric."])
def test_a_key_without_a_name_is_one_line(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task=csv", "source=.", f"{key}=x"]) == 2
    assert capsys.readouterr().err == f"error: {key}= names no option after its dot; see --help\n"


def test_words_of_a_list_stay_as_they_are_written() -> None:
    config = parse_args(["task=csv", "csv.classes=[no,yes,01,1.0]", "csv.drop=['time [s]','a, b']", "csv.rate=100"])
    assert config.csv == {"classes": ["no", "yes", "01", "1.0"], "drop": ["time [s]", "a, b"], "rate": 100}
    assert parse_args(["task=csv", "csv.drop=time #1"]).csv == {"drop": ["time #1"]}


@pytest.mark.parametrize("value", ["[a", "[time [s]]", "[a: b]", "[a #1]"])
def test_a_list_that_cannot_be_read_is_one_line_with_the_key(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task=csv", "source=.", f"csv.drop={value}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: csv.drop={value}: no list of words") and error.count("\n") == 1


@pytest.mark.parametrize("key", ["csv.classes", "csv.drop"])
def test_words_with_a_comma_and_no_brackets_are_asked_back(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task=csv", "source=.", f"{key}=ok,worn"]) == 2
    ways = "a comma, and no brackets: write [a,b] for two words, ['a,b'] for one with a comma"
    assert capsys.readouterr().err == f"error: {key}=ok,worn: {ways}\n"


def test_hidden_files_are_no_series(tmp_path: Path) -> None:
    folder = write_wide(tmp_path, {"train.csv": 9, "test.csv": 6})
    (folder / "._train.csv").write_bytes(b"\0\5\x16\7\xff")
    assert len(csv_task(str(folder), {"label": "kind"}).reader.read(None, None).train) == 9  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["har", "HAR", "gun_point", "computer"])
def test_the_name_of_a_task_of_the_program_is_refused(name: str, tmp_path: Path) -> None:
    folder = write_files(tmp_path, name=name)
    with pytest.raises(ValueError, match=rf"/{name}: '{name}' is the name of a task .*csv\.name=my_{name}"):
        csv_task(str(folder), {"drop": ["time"]})
    assert csv_task(str(folder), {"drop": ["time"], "name": f"my_{name}"}).name == f"my_{name}"
    with pytest.raises(ValueError, match=rf"csv\.name=my_{name}"):
        csv_task(str(write_files(tmp_path / "other")), {"drop": ["time"], "name": name})


def test_data_of_another_task_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, options = tmp_path / "out", ("csv.drop=[time]", "modality=numeric")
    built(write_files(tmp_path), output, *options)
    before = (output / "train.parquet").read_bytes()
    other = write_files(tmp_path, name="fans")
    assert main(["task=csv", f"source={other}", f"output={output}", *options]) == 2
    error = capsys.readouterr().err
    assert "data_card.json: the folder holds task 'pumps'" in error and "another output=" in error
    assert "delete" in error and error.count("\n") == 1 and (output / "train.parquet").read_bytes() == before
    assert built(other, output, *options, "overwrite=true")["task"] == "fans"
    (output / "data_card.json").write_text("{}")
    assert main(["task=csv", f"source={other}", f"output={output}", *options]) == 2
    assert "is no data card" in capsys.readouterr().err


def test_the_folder_one_stands_in_gives_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_files(tmp_path))
    assert csv_task(".", {"drop": ["time"]}).name == "pumps"


def test_the_last_line_names_the_folder_of_drawn_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["task=csv", f"source={write_files(tmp_path)}", f"output={tmp_path / 'out'}", "workers=1", "limit=8"]
    told = f"a copy of each plot is in {tmp_path / '.plot_cache'}, which may be deleted (cache=null: none)"
    for extra, expected in ((), True), (("cache=null",), False), (("modality=numeric",), False):
        assert main([*arguments, "csv.drop=[time]", *extra]) == 0
        assert (told in capsys.readouterr().out.splitlines()[-1]) == expected
