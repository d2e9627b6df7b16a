"""A small task and its archive."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_archive import LENGTH, ROWS, write_archive

from verl.timeseries.readers import UcrReader
from verl.timeseries.style import PlotStyle
from verl.timeseries.task import ClassSpec, TaskSpec


@pytest.fixture
def tiny_task() -> TaskSpec:
    """Two classes, one channel of 12 points, 20 + 10 rows."""
    return TaskSpec(
        name="tiny",
        data_source="tiny_dataset",
        class_specs=(ClassSpec("Up", "1"), ClassSpec("Down", "2")),
        question="Which way does it go?",
        answer_format="Answer Up or Down.",
        reader=UcrReader("Tiny"),
        plot=PlotStyle(width=84, height=56, ticks=False, left=2, right=2, bottom=2, top=2),
        channels=1,
        length=LENGTH,
        rows=(ROWS["TRAIN"], ROWS["TEST"]),
    )


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "Tiny")
