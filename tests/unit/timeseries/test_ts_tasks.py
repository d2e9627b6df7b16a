"""Invariants of `verl.timeseries.task` and the registry."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from verl.timeseries import TaskSpec, find_by_data_source, get_task, task_names
from verl.timeseries.style import Panel, PlotStyle, override_style
from verl.timeseries.task import ClassSpec

ROOT = Path(__file__).resolve().parents[3]


def test_no_torch_ray_or_sktime_is_imported() -> None:
    code = (
        "import sys, verl.timeseries.build, verl.timeseries.tables, verl.timeseries.unpack, verl.timeseries.plot\n"
        "import datasets\n"
        "found = [m for m in ('torch', 'ray', 'sktime', 'matplotlib.pyplot') if m in sys.modules]\n"
        "assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ctu_keeps_the_published_names() -> None:
    task = get_task("ctu")
    assert (task.data_source, task.classes) == ("computer_dataset", ("Desktop", "Laptop"))
    assert [spec.file_label for spec in task.class_specs] == ["1", "2"]
    assert (task.plot.width, task.plot.height) == (588, 224)


def test_every_task_is_found_by_its_data_source() -> None:
    for name in task_names():
        assert find_by_data_source(get_task(name).data_source) is get_task(name)
    assert find_by_data_source("no_such_dataset") is None


def test_every_prompt_starts_with_its_only_image_and_names_every_class() -> None:
    for name in task_names():
        task = get_task(name)
        assert task.prompt_text.startswith("<image>\n") and task.prompt_text.count("<image>") == 1, name
        assert all(label in task.prompt_text for label in task.classes), name
        assert [turn["role"] for turn in task.messages()] == ["user"]


@pytest.mark.parametrize(
    ("typed", "meant"), [("CTU", "ctu"), ("basicmotions", "basic_motions"), ("gunpoint", "gun_point")]
)
def test_an_unknown_task_is_an_error_with_the_nearest_name(typed: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"unknown task='{typed}'; did you mean '{meant}'"):
        get_task(typed)


def test_two_classes_of_one_name_are_refused(tiny_task: TaskSpec) -> None:
    with pytest.raises(ValueError, match="different names and labels"):
        replace(tiny_task, class_specs=(ClassSpec("Up", "1"), ClassSpec("UP", "2")))


def test_an_image_placeholder_in_the_question_is_refused(tiny_task: TaskSpec) -> None:
    with pytest.raises(ValueError, match="start of the prompt only"):
        replace(tiny_task, question="look at <image>")


def test_a_val_of_the_last_windows_is_refused_where_windows_overlap(tiny_task: TaskSpec) -> None:
    assert replace(tiny_task, val_last=True).val_last
    with pytest.raises(ValueError, match="windows that overlap need a gap"):
        replace(tiny_task, val_last=True, overlap=0.5)


def test_panels_that_miss_a_channel_are_refused(tiny_task: TaskSpec) -> None:
    with pytest.raises(ValueError, match=r"draw channels \[0, 1\].* 1 channels"):
        replace(tiny_task, plot=replace(tiny_task.plot, panels=(Panel("both", (0, 1)),)))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"width": 100}, r"style.width=100 is not a positive multiple of 28 .*use 84 or 112"),
        ({"height": 0}, r"style.height=0"),
        ({"widht": 84}, r"unknown key style.widht"),
        ({"width": "wide"}, r"style.width='wide' must be of type int"),
        ({"width": 84.5}, r"must be a whole number"),
        ({"ticks": 1}, r"must be of type bool"),
    ],
)
def test_a_bad_style_is_an_error_naming_the_key(values: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        override_style(PlotStyle(), values)


def test_a_style_override_changes_only_what_it_names() -> None:
    assert override_style(PlotStyle(), {"width": 280, "line_width": 1}) == PlotStyle(width=280, line_width=1.0)
