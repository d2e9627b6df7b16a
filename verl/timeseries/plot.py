"""Series -> PNG, with matplotlib's Agg canvas and no pyplot.

Invariants
- A plot is a function of (series, style, matplotlib, Pillow, `RENDER_VERSION`): same bytes in any order, in any
  process, from a new or a reused figure, whatever the user's matplotlibrc says.
- Every plot of a style has exactly its width and height, in RGB.
- The text uses the DejaVu Sans that matplotlib ships, not one that the system may have.
- The cache is read by content key only; a damaged entry is drawn again.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from numpy.typing import NDArray
from PIL import Image

from verl.timeseries.legend import ABOVE, LOOK, LegendPlan, Ruler, labelled, plan_legend
from verl.timeseries.readers import Series
from verl.timeseries.spectrogram import Spectrogram, power
from verl.timeseries.style import Panel, PlotStyle

RENDER_VERSION = 4
"""Raise it when this file draws differently, so that cached plots are not reused."""

_FONT = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
_LOCK = threading.Lock()
_PER_TASK = 16
_LEGEND_ROOM = 14
"""Pixels between two panels from which on a legend stands between them."""
_LEGEND_ROWS = 4
"""Most rows of a legend, where the canvas has the height."""
_WORTH_PROCESSES = 128
"""Below that many plots, starting processes takes longer than drawing."""
_pinned = False


def _default_settings() -> Any:
    """matplotlib's own defaults, whatever the user's configuration says (some are read at draw time)."""
    return {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}


def _pinned_settings() -> AbstractContextManager[None]:
    return nullcontext() if _pinned else matplotlib.rc_context(_default_settings())


def plot_key(series: Series, style: PlotStyle) -> str:
    """sha256 over everything that decides the picture."""
    about = {
        "style": asdict(style),
        "shape": series.shape,
        "matplotlib": matplotlib.__version__,
        "pillow": PIL.__version__,
        "render": RENDER_VERSION,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(series, dtype="<f8").tobytes())
    return digest.hexdigest()


class _Canvas:
    """One figure for one style and channel count.

    What all samples of a length share (frame, x axis, texts) is drawn once and kept as pixels; a sample adds its lines
    and y axes. That is three times faster than a whole draw, and the tests hold the two equal.
    """

    def __init__(self, style: PlotStyle, channels: int) -> None:
        self.style = style
        self.panels = style.panels_for(channels)
        self.figure = Figure(figsize=(style.width / style.dpi, style.height / style.dpi), dpi=style.dpi)
        self.canvas = FigureCanvasAgg(self.figure)
        self.lines: dict[int, Any] = {}
        self.pictures: dict[int, Any] = {}
        self.legends_above = len(self.panels) <= style.columns or style.gap >= _LEGEND_ROOM
        self.ruler = Ruler(style.dpi)
        self.legends = {panel: self._plan(number, panel) for number, panel in enumerate(self.panels)}
        self.top = self._top()
        self.axes = [self._add_panel(number, panel) for number, panel in enumerate(self.panels)]
        self.changing = [
            artist
            for axes, panel in zip(self.axes, self.panels, strict=True)
            for artist in (
                *(self.pictures.get(c) for c in panel.channels),
                *(self.lines.get(c) for c in panel.channels),
                axes.yaxis,
                *axes.spines.values(),
                None if self.legends_above else axes.get_legend(),
            )
            if artist is not None
        ]
        self.background: Any = None
        self.length = 0

    @property
    def columns(self) -> int:
        return min(self.style.columns, len(self.panels))

    @property
    def panel_width(self) -> float:
        """Pixels."""
        style = self.style
        return (style.width - style.left - style.right - style.column_gap * (self.columns - 1)) / self.columns

    def _names(self, panel: Panel) -> list[str]:
        """Of the panel's channels, as far as they have one."""
        return [self.style.channel_names[c] for c in panel.channels if c < len(self.style.channel_names)]

    def _plan(self, number: int, panel: Panel) -> LegendPlan | None:
        """The panel's legend; None where it has none."""
        style, names = self.style, self._names(panel)
        if not names or not style.legend or style.spectrogram is not None:
            return None
        rows, room = 1, self.panel_width
        if len(self.panels) == 1:
            half_of_the_plot = (style.height - style.bottom - style.top) // 2
            rows = min(_LEGEND_ROWS, max(1, half_of_the_plot // _LEGEND_ROOM))
        elif not self.legends_above:
            # Inside the panel, off its frame.
            rows, room = _LEGEND_ROWS, room - _LEGEND_ROOM
        beside = style.title and number == 0 and self.columns == 1 and self.legends_above
        title = self.ruler.text(style.title, _font(style.title_size))[0] if beside else 0.0
        return plan_legend(names, room, self.ruler, _font(style.tick_size), rows=rows, title_width=title)

    def _top(self) -> float:
        """Pixels above the first panel: the style's, or more for a legend of several rows or a title above it."""
        plan = self.legends[self.panels[0]]
        if plan is None or not self.legends_above or (plan.rows == 1 and not plan.title_above):
            return self.style.top
        title = self.ruler.text(self.style.title, _font(self.style.title_size))[1] + 4 if plan.title_above else 0
        return max(self.style.top, plan.height + title + 4)

    def _add_panel(self, number: int, panel: Panel) -> Any:
        style, count, columns = self.style, len(self.panels), self.columns
        rows = -(-count // columns)
        row, column = divmod(number, columns)
        height = (style.height - style.bottom - self.top - style.gap * (rows - 1)) / rows
        width = self.panel_width
        bottom = style.bottom + (rows - 1 - row) * (height + style.gap)
        left = style.left + column * (width + style.column_gap)
        axes = self.figure.add_axes(
            (left / style.width, bottom / style.height, width / style.width, height / style.height)
        )
        axes.margins(x=style.x_margin, y=style.y_margin)
        # The y axis' own label stays empty; a fixed place spares matplotlib the search for one at every draw.
        axes.yaxis.set_label_coords(-0.1, 0.5)
        if style.spectrogram is None:
            self._add_lines(axes, panel)
        else:
            self._add_picture(axes, panel, style.spectrogram)
        self._add_text(axes, middle=bottom + height / 2, first_column=column == 0, last_row=number + columns >= count)
        if self.legends[panel] is not None:
            self._add_legend(axes, panel)
        if style.title and number == 0:
            self._add_title(axes, panel)
        return axes

    def _add_title(self, axes: Any, panel: Panel) -> None:
        """Above the first panel, or at the top of the canvas where names or panels stand beside each other."""
        style, plan = self.style, self.legends[panel]
        named_picture = style.spectrogram is not None and bool(self._names(panel))
        if self.columns == 1 and not named_picture and not (plan and plan.title_above):
            beside_legend = self.legends_above and plan is not None
            axes.set_title(
                style.title, loc="left" if beside_legend else "center", fontproperties=_font(style.title_size)
            )
        else:
            self.figure.text(
                (style.left + style.width - style.right) / 2 / style.width,
                1 - 4 / style.height,
                style.title,
                horizontalalignment="center",
                verticalalignment="top",
                fontproperties=_font(style.title_size),
            )

    def _add_lines(self, axes: Any, panel: Panel) -> None:
        style, plan = self.style, self.legends[panel]
        names = plan.names if plan is not None else ()
        for position, channel in enumerate(panel.channels):
            (self.lines[channel],) = axes.plot(
                [0.0, 1.0],
                [0.0, 1.0],
                linewidth=style.line_width,
                color=style.colors[position % len(style.colors)],
                label=names[position] if position < len(names) else None,
            )
        if panel.limits is not None:
            axes.set_ylim(*panel.limits)

    def _add_picture(self, axes: Any, panel: Panel, spectrogram: Spectrogram) -> None:
        if len(panel.channels) != 1 or panel.limits is not None:
            raise ValueError(f"style: panel {panel.name!r} of a spectrogram must hold one channel and no limits")
        if names := self._names(panel):
            font = _font(self.style.tick_size)
            name = self.ruler.shortened(names[0], self.panel_width, font)
            axes.set_title(name, loc="right", pad=2.0, fontproperties=font)
        self.pictures[panel.channels[0]] = axes.imshow(
            np.zeros((2, 2)),
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            cmap=spectrogram.colormap,
            vmin=0.0,
            vmax=1.0,
            extent=(0.0, 1.0, spectrogram.low, spectrogram.top),
        )

    def _add_text(self, axes: Any, *, middle: float, first_column: bool, last_row: bool) -> None:
        style = self.style
        if style.x_label and last_row:
            axes.set_xlabel(style.x_label, fontproperties=_font(style.label_size))
        if style.y_label and first_column:
            # At a fixed place: matplotlib's own would move with the width of the numbers.
            self.figure.text(
                2 / style.width,
                middle / style.height,
                style.y_label,
                rotation="vertical",
                horizontalalignment="left",
                verticalalignment="center",
                fontproperties=_font(style.label_size),
            )
        if not style.ticks:
            axes.set_xticks([])
            axes.set_yticks([])
            return
        axes.tick_params(labelbottom=last_row)
        for axis in (axes.xaxis, axes.yaxis):
            # matplotlib copies the first tick's text settings to every tick that it adds later.
            for tick in axis.get_major_ticks():
                tick.label1.set_fontproperties(_font(style.tick_size))

    def _add_legend(self, axes: Any, panel: Panel) -> None:
        """Above the axes where there is room: it hides no data there, and is drawn once."""
        plan = self.legends[panel]
        assert plan is not None, f"panel {panel.name} has no legend"
        look: dict[str, Any] = {"prop": _font(self.style.tick_size), "ncols": plan.columns, **LOOK}
        if self.legends_above:
            axes.legend(*labelled(axes), loc="lower right", bbox_to_anchor=(1.0, 1.0), **ABOVE, **look)
        else:
            axes.legend(*labelled(axes), loc="upper right", borderpad=0.2, **look)

    def _set(self, series: Series) -> None:
        time = np.arange(series.shape[1])
        for channel, line in self.lines.items():
            line.set_data(time, series[channel])
        for channel, picture in self.pictures.items():
            self._set_picture(picture, series[channel])
        for axes, panel in zip(self.axes, self.panels, strict=True):
            if self.style.spectrogram is None:
                axes.relim()
                axes.autoscale_view(scalex=True, scaley=panel.limits is None)

    def _set_picture(self, picture: Any, channel: NDArray[np.float64]) -> None:
        of = self.style.spectrogram
        assert of is not None, "a picture without a spectrogram"
        picture.set_data(power(channel, of))
        seconds = len(channel) / of.rate
        picture.set_extent((0.0, seconds, of.low, of.top))
        picture.axes.set_xlim(0.0, seconds)
        picture.axes.set_ylim(of.low, of.top)

    def _set_animated(self, animated: bool) -> None:
        for artist in self.changing:
            artist.set_animated(animated)

    def _encode(self) -> bytes:
        size = (self.style.width, self.style.height)
        buffer = self.canvas.buffer_rgba()
        assert buffer.shape[1::-1] == size, f"canvas is {buffer.shape[1::-1]}, style says {size}"
        out = io.BytesIO()
        Image.frombuffer("RGBA", size, buffer, "raw", "RGBA", 0, 1).convert("RGB").save(out, "PNG", compress_level=3)
        return out.getvalue()

    def draw(self, series: Series) -> bytes:
        """PNG bytes of a series (channels, length)."""
        self._set(series)
        if self.length != series.shape[1]:
            self._set_animated(True)
            self.canvas.draw()
            self._set_animated(False)
            self.background, self.length = self.canvas.copy_from_bbox(self.figure.bbox), series.shape[1]
        self.canvas.restore_region(self.background)
        for artist in self.changing:
            self.figure.draw_artist(artist)
        return self._encode()

    def draw_whole(self, series: Series) -> bytes:
        """The same PNG through matplotlib's ordinary draw: the judge of `draw`."""
        self._set(series)
        self.canvas.draw()
        return self._encode()


def _font(size: float) -> FontProperties:
    return FontProperties(fname=_FONT, size=size)


def _pin_process() -> None:
    """For a process that only draws: pin matplotlib's settings once instead of around every plot."""
    global _pinned
    matplotlib.rcParams.update(_default_settings())
    _pinned = True


@functools.lru_cache(maxsize=8)
def _canvas(style: PlotStyle, channels: int) -> _Canvas:
    return _Canvas(style, channels)


def draw(series: Series, style: PlotStyle) -> bytes:
    """PNG bytes (RGB, `style.width` x `style.height`, no metadata) of a finite series (channels, length).

    Raises ValueError when the series is not finite or has other channels than the style's panels.
    """
    if series.ndim != 2 or not series.size or not np.isfinite(series).all():
        raise ValueError(f"a plot needs finite values of shape (channels, length), got shape {series.shape}")
    with _LOCK, _pinned_settings():
        return _canvas(style, series.shape[0]).draw(series)


def _is_whole(png: bytes, style: PlotStyle) -> bool:
    """True for a complete PNG of the style's size; every chunk's checksum is looked at."""
    try:
        with Image.open(io.BytesIO(png)) as image:
            image.verify()
            return image.size == (style.width, style.height) and image.mode == "RGB" and b"IEND" in png[-12:]
    except (OSError, SyntaxError, ValueError):
        return False


def draw_cached(series: Series, style: PlotStyle, cache: Path | None) -> bytes:
    """`draw`, looked up in and added to the folder `cache` (None: no cache)."""
    if cache is None:
        return draw(series, style)
    key = plot_key(series, style)
    path = cache / key[:2] / f"{key}.png"
    if path.is_file():
        png = path.read_bytes()
        if _is_whole(png, style):
            return png
    png = draw(series, style)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place: a reader in another process sees a whole file or none.
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(png)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return png


def default_workers() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def draw_all(
    series: Sequence[Series], style: PlotStyle, *, workers: int = 1, cache: Path | None = None
) -> Iterable[bytes]:
    """PNG bytes of every series, in order, drawn by `workers` processes (1: in this one)."""
    task = functools.partial(draw_cached, style=style, cache=cache)
    if workers == 1 or len(series) < _WORTH_PROCESSES:
        yield from map(task, series)
        return
    # Spawned, not forked: pyarrow and torch may already run threads in the parent.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_pin_process) as pool:
        yield from pool.map(task, series, chunksize=_PER_TASK)
