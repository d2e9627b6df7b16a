"""Invariants of `verl.timeseries.numeric` and of builds with digits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from verl.timeseries import TaskSpec, get_task, task_names, tasks
from verl.timeseries.build import BuildConfig, build, main
from verl.timeseries.numeric import NumericFormat, digits, shorten


def test_digits_read_back_to_the_rounded_series() -> None:
    series = np.random.default_rng(0).normal(size=(1, 50)) * 30
    for decimals in (0, 2, 4):
        text = digits(series, NumericFormat(decimals=decimals))
        assert np.array_equal(np.array(text.split(), dtype=float), np.round(series[0], decimals))


def test_no_negative_zero_is_written() -> None:
    assert digits(np.array([[-0.001, -0.0, 0.004, -1.0]]), NumericFormat()) == "0.00 0.00 0.00 -1.00"


def test_each_channel_has_its_own_named_line() -> None:
    series = np.arange(6.0).reshape(2, 3)
    assert digits(series, NumericFormat(decimals=0, separator=","), ("x", "y")) == "x: 0,1,2\ny: 3,4,5"


@pytest.mark.parametrize(
    ("length", "points", "written"), [(12, 4, 4), (10, 4, 4), (7, 3, 3), (5, 9, 5), (1500, 500, 500)]
)
def test_shortening_takes_means_of_blocks_and_keeps_the_mean(length: int, points: int, written: int) -> None:
    series = np.random.default_rng(1).normal(size=(2, length))
    form = NumericFormat(points=points)
    short, block = shorten(series, form), form.block(length)
    assert short.shape == (2, written)
    for i in range(written):
        assert short[:, i] == pytest.approx(series[:, i * block : (i + 1) * block].mean(axis=1))


@pytest.mark.parametrize("name", task_names())
def test_every_numeric_prompt_states_its_loss_and_speaks_of_no_picture(name: str) -> None:
    task = get_task(name)
    text = task.numeric_prompt(np.zeros((task.channels, task.length or 40)))
    assert "<image>" not in text and "the plot" not in text.lower() and "rounded to" in text
    assert all(label in text for label in task.classes) and text.endswith(task.answer_format)


def test_a_question_may_name_the_plot_anywhere(tiny_task: TaskSpec) -> None:
    question = "Look at the plot. The plot shows a pump, and the plotted unit is bar. What does the plot say?"
    numbers = (
        "Look at the series of numbers. The series of numbers shows a pump, and the plotted unit is bar. What does "
    )
    text = replace(tiny_task, question=question).numeric_question(12)
    assert text.startswith(f"{numbers}the series of numbers say?\n")


def test_both_modalities_have_the_same_rows_and_answers(
    tiny_task: TaskSpec, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks._TASKS, "tiny", tiny_task)
    for modality in ("image", "numeric"):
        out = str(tmp_path / modality)
        build(BuildConfig(task="tiny", source=str(tiny_folder), output=out, modality=modality, workers=1, cache=None))
    for name in ("train", "test", "fit", "val", "sft_fit", "sft_val"):
        image = pq.read_table(tmp_path / "image" / f"{name}.parquet")
        numeric = pq.read_table(tmp_path / "numeric" / f"{name}.parquet")
        assert "images" not in numeric.column_names
        for column in set(image.column_names) - {"images", "prompt", "extra_info"}:
            assert image[column].to_pylist() == numeric[column].to_pylist(), (name, column)
        assert [x["index"] for x in image["extra_info"].to_pylist()] == [
            x["index"] for x in numeric["extra_info"].to_pylist()
        ]
    assert not (tmp_path / "numeric" / "images").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["modality=numeric", "numeric.decimals=9"], "numeric.decimals=9 must lie in 0 to 8"),
        (["modality=numeric", "numeric.separator=."], "numeric.separator='.' must hold no digit"),
        (["modality=numeric", "numeric.points=1"], "numeric.points=1 must be at least 2"),
        (["modality=numeric", "numeric.points=many"], "numeric.points='many' must be of type"),
        (["modality=numeric", "numeric.digits=3"], "unknown key numeric.digits; known: decimals, separator, points"),
        (["numeric.decimals=3"], "numeric.* has no effect on plots: set modality=numeric"),
    ],
)
def test_a_bad_format_is_one_line_naming_the_key(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["task=gun_point", *arguments]) == 2
    assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
