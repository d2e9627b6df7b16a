"""Invariants of legends: they stay on the canvas, off the title, and name what they can."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from verl.timeseries import get_task, plot
from verl.timeseries.legend import Ruler
from verl.timeseries.readers import Series
from verl.timeseries.spectrogram import Spectrogram
from verl.timeseries.style import GRID, LINES, PlotStyle, spectrogram_style

LONG = tuple(f"sensor {i} with a long name [bar]" for i in range(1, 5))
PICTURES = spectrogram_style(Spectrogram.fitting(100.0, 200))


def test_a_name_that_begins_with_an_underscore_is_shown(recwarn: pytest.WarningsRecorder) -> None:
    canvas = drawn(replace(LINES, channel_names=("_flow", "_time")), 2)
    (legend,) = (axes.get_legend() for axes in canvas.axes)
    assert [text.get_text() for text in legend.get_texts()] == ["_flow", "_time"] and not recwarn.list


def walk(channels: int) -> Series:
    return np.random.default_rng(0).normal(size=(channels, 200)).cumsum(axis=1)


def drawn(style: PlotStyle, channels: int) -> plot._Canvas:
    canvas = plot._Canvas(style, channels)
    assert canvas.draw(walk(channels)) == plot._Canvas(style, channels).draw_whole(walk(channels))
    return canvas


def boxes(canvas: plot._Canvas) -> list[tuple[float, float, float, float]]:
    """Left, bottom, right, top of every title, panel name and legend, in pixels."""
    renderer = canvas.canvas.get_renderer()
    texts = [*canvas.figure.texts]
    for axes in canvas.axes:
        texts += [axes.title, axes._left_title, axes._right_title, axes.get_legend()]
    shown = [one for one in texts if one is not None and (not hasattr(one, "get_text") or one.get_text())]
    # The y label runs beside the axes and may touch nothing here.
    return [one.get_window_extent(renderer).extents for one in shown if one not in canvas.figure.texts[1:]]


CASES = {
    "four long names": (replace(LINES, title="Pumps", channel_names=LONG), 4),
    "no title": (replace(LINES, channel_names=LONG), 4),
    "a long title": (
        replace(LINES, title="The pump of hall seven, all of its sensors, by night", channel_names=LONG),
        4,
    ),
    "names as long as the canvas": (replace(LINES, title="Pumps", channel_names=tuple(n * 4 for n in LONG)), 4),
    "twenty names": (replace(LINES, title="Pumps", channel_names=tuple(f"{i} {LONG[0]}" for i in range(20))), 20),
    "a flat canvas": (replace(LINES, height=112, channel_names=LONG), 4),
    "a grid": (replace(GRID, title="Pumps", channel_names=tuple(n * 2 for n in LONG)), 4),
    "pictures": (replace(PICTURES, title="Pumps", channel_names=tuple(n * 4 for n in LONG[:2]), gap=20, top=36), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_titles_names_and_legends_stay_on_the_canvas_and_off_each_other(case: str) -> None:
    style, channels = CASES[case]
    found = boxes(drawn(style, channels))
    for i, (left, bottom, right, top) in enumerate(found):
        assert left >= 0 and bottom >= 0 and right <= style.width and top <= style.height, (case, found[i])
        for other in found[:i]:
            apart = right <= other[0] or other[2] <= left or top <= other[1] or other[3] <= bottom
            assert apart, (case, found[i], other)


@pytest.mark.parametrize("case", CASES)
def test_the_plot_keeps_half_of_its_height(case: str) -> None:
    style, channels = CASES[case]
    rows = -(-len(style.panels_for(channels)) // style.columns)
    room = style.height - style.bottom - style.top - style.gap * (rows - 1)
    heights = [axes.get_window_extent().height for axes in drawn(style, channels).axes]
    assert min(heights) * rows >= 0.45 * room


def test_a_legend_that_fits_one_row_leaves_the_axes_where_they_are() -> None:
    style = replace(LINES, title="Pumps", channel_names=("pressure", "flow"))
    bare = plot._Canvas(replace(style, legend=False), 2).axes[0].get_position().bounds
    assert plot._Canvas(style, 2).axes[0].get_position().bounds == bare
    legend = plot._Canvas(style, 2).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["pressure", "flow"]


def test_shortened_names_keep_both_ends_and_differ() -> None:
    font, ruler = plot._font(7.0), Ruler(100)
    shown = ruler.shortened(LONG[0], 80.0, font)
    assert shown.startswith("sens") and shown.endswith("ar]")
    ends = [ruler.shortened(f"channel of the machine {i}", 80.0, font) for i in range(4)]
    assert len(set(ends)) == 4 and all(ruler.text(name, font)[0] <= 80.0 for name in ends)
    assert ruler.shortened("x", 80.0, font) == "x"


def test_every_picture_of_several_channels_has_its_name_and_one_of_a_built_in_task_none() -> None:
    canvas = drawn(replace(PICTURES, channel_names=("pressure", "flow"), gap=20), 2)
    assert [axes.get_title(loc="right") for axes in canvas.axes] == ["pressure", "flow"]
    assert [axes.get_title(loc="right") for axes in plot._Canvas(get_task("rcw").plot, 1).axes] == [""]
