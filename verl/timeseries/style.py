"""How a task's plot looks: values only, hashable, so that a style is a part of a plot's cache key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from verl.timeseries.spectrogram import Spectrogram

PATCH = 28
"""Pixels per side of one merged vision token of Qwen2.5-VL (patch 14 x merge 2): such canvases are never resampled."""

COLORS = (
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#ff7f0e",
    "#9467bd",
    "#000000",
    "#e377c2",
    "#8c564b",
    "#17becf",
    "#bcbd22",
    "#7f7f7f",
    "#00ff00",
)


@dataclass(frozen=True)
class Panel:
    """One set of axes: the channels it draws, and its fixed y range (None: scaled to each sample).

    Example: `Panel("acceleration", channels=(0, 1, 2), limits=(-25.0, 25.0))`
    """

    name: str
    channels: tuple[int, ...]
    limits: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.limits is not None and not self.limits[0] < self.limits[1]:
            raise ValueError(f"panel {self.name!r}: limits must rise, got {self.limits}")


@dataclass(frozen=True, kw_only=True)
class PlotStyle:
    """Canvas in pixels, line widths and fonts in points, margins in pixels. Panels fill a grid row by row.

    Raises ValueError when a side is not a positive multiple of 28, or when the margins leave no room.
    """

    width: int = 588
    height: int = 224
    dpi: int = 100
    line_width: float = 2.0
    title: str = ""
    x_label: str = ""
    y_label: str = ""
    title_size: float = 9.0
    label_size: float = 8.0
    tick_size: float = 7.0
    ticks: bool = True
    """False draws no tick, number or label: on a canvas of a few tokens they would be unreadable specks."""
    legend: bool = False
    left: int = 52
    right: int = 8
    bottom: int = 38
    top: int = 22
    gap: int = 4
    """Pixels between two panels."""
    x_margin: float = 0.05
    y_margin: float = 0.05
    """Blank share of the data range beside the line, as in matplotlib's default; no effect on a panel with limits."""
    panels: tuple[Panel, ...] = ()
    """Empty: one panel with every channel, or one for each (`each_channel`)."""
    each_channel: bool = False
    """One panel a channel."""
    columns: int = 1
    """Panels beside each other; 1: stacked."""
    column_gap: int = 44
    """Pixels between two columns: room for the numbers."""
    spectrogram: Spectrogram | None = None
    """Draw power over time and frequency in place of lines; each panel then shows one channel."""
    channel_names: tuple[str, ...] = ()
    """Names for the legend."""
    colors: tuple[str, ...] = COLORS

    def __post_init__(self) -> None:
        for side, size in (("width", self.width), ("height", self.height)):
            if size <= 0 or size % PATCH:
                below = max(size // PATCH, 1) * PATCH
                raise ValueError(
                    f"style.{side}={size} is not a positive multiple of {PATCH} (one vision token); "
                    f"use {below} or {below + PATCH}"
                )
        if self.columns < 1:
            raise ValueError(f"style.columns={self.columns} must be at least 1")
        side_by_side = self.column_gap * (self.columns - 1)
        if (
            self.left + self.right + side_by_side >= self.width
            or self.bottom + self.top + self.gap * len(self.panels) >= self.height
        ):
            raise ValueError(f"style: the margins leave no room on a canvas of {self.width}x{self.height} pixels")
        if len(self.colors) < 1:
            raise ValueError("style: at least one line color is needed")

    def panels_for(self, channels: int) -> tuple[Panel, ...]:
        """The panels of a series with that many channels. Raises ValueError when they name a channel it lacks."""
        panels = self.panels
        if not panels and (self.each_channel or self.spectrogram is not None):
            names = self.channel_names
            panels = tuple(Panel(names[i] if i < len(names) else f"channel {i + 1}", (i,)) for i in range(channels))
        if not panels:
            return (Panel("value", tuple(range(channels))),)
        drawn = [channel for panel in panels for channel in panel.channels]
        if sorted(drawn) != list(range(channels)):
            raise ValueError(f"style: the panels draw channels {sorted(drawn)}, but a series has {channels} channels")
        rows = -(-len(panels) // self.columns)
        if self.bottom + self.top + self.gap * (rows - 1) + 8 * rows > self.height:
            raise ValueError(f"style: {rows} rows of panels do not fit in a height of {self.height} pixels")
        return panels

    @property
    def vision_tokens(self) -> int:
        """Merged vision tokens of the plot in Qwen2.5-VL, known without drawing: the canvas is never resampled."""
        return (self.width // PATCH) * (self.height // PATCH)


LINE = PlotStyle()
"""One line."""
LINES = PlotStyle(line_width=1.5, legend=True)
"""Several channels in one panel, told apart by color and legend."""
GRID = PlotStyle(height=336, line_width=1.2, legend=True, each_channel=True, columns=2, gap=16, top=36)
"""A panel for each channel, two beside each other."""


def spectrogram_style(spectrogram: Spectrogram) -> PlotStyle:
    """Power over time and frequency."""
    return PlotStyle(height=280, right=16, spectrogram=spectrogram, x_label="Time (s)", y_label="Frequency (Hz)")


NUMBERS = {"int": int, "float": float}


def override_style(style: PlotStyle, values: Mapping[str, Any]) -> PlotStyle:
    """`style` with some single-valued fields replaced, e.g. `{"width": 224}` or `{"spectrogram": {"window": 128}}`.

    Raises ValueError on an unknown field, a value of the wrong type, or a canvas that does not fit.
    """
    changes: dict[str, Any] = {}
    rest = dict(values)
    nested = rest.pop("spectrogram", None)
    if nested is not None:
        if style.spectrogram is None or not isinstance(nested, Mapping):
            raise ValueError(f"style.spectrogram={nested!r}: this style draws lines, or name a field (spectrogram.hop)")
        fields_changed = _changes(style.spectrogram, nested, "style.spectrogram")
        changes["spectrogram"] = replace(style.spectrogram, **fields_changed)
    return replace(style, **changes, **_changes(style, rest, "style"))


def _changes(of: PlotStyle | Spectrogram, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values with the types of the fields they replace."""
    types = {f.name: str(f.type).removesuffix(" | None") for f in fields(of)}
    types = {name: kind for name, kind in types.items() if kind in ("int", "float", "str", "bool")}
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"unknown key {prefix}.{name}; known: {', '.join(sorted(types))}")
        kind = types[name]
        if kind in NUMBERS and isinstance(value, int | float) and not isinstance(value, bool):
            if kind == "int" and value != int(value):
                raise ValueError(f"{prefix}.{name}={value!r} must be a whole number")
            changes[name] = NUMBERS[kind](value)
        elif type(value).__name__ == kind:
            changes[name] = value
        else:
            raise ValueError(f"{prefix}.{name}={value!r} must be of type {kind}")
    return changes
