"""How a task's plot looks: values only, hashable, so that a style is a part of a plot's cache key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

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
    """Canvas in pixels, line widths and fonts in points, margins in pixels. Panels are stacked top to bottom.

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
    """Empty: one panel with every channel."""
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
        if self.left + self.right >= self.width or self.bottom + self.top + self.gap * len(self.panels) >= self.height:
            raise ValueError(f"style: the margins leave no room on a canvas of {self.width}x{self.height} pixels")
        if len(self.colors) < 1:
            raise ValueError("style: at least one line color is needed")

    def panels_for(self, channels: int) -> tuple[Panel, ...]:
        """The panels of a series with that many channels. Raises ValueError when they name a channel it lacks."""
        if not self.panels:
            return (Panel("value", tuple(range(channels))),)
        drawn = [channel for panel in self.panels for channel in panel.channels]
        if sorted(drawn) != list(range(channels)):
            raise ValueError(f"style: the panels draw channels {sorted(drawn)}, but a series has {channels} channels")
        return self.panels


NUMBERS = {"int": int, "float": float}


def override_style(style: PlotStyle, values: Mapping[str, Any]) -> PlotStyle:
    """`style` with some single-valued fields replaced, e.g. `{"width": 224}`.

    Raises ValueError on an unknown field, a value of the wrong type, or a canvas that does not fit.
    """
    types = {f.name: str(f.type) for f in fields(PlotStyle) if str(f.type) in ("int", "float", "str", "bool")}
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"unknown key style.{name}; known: {', '.join(sorted(types))}")
        kind = types[name]
        if kind in NUMBERS and isinstance(value, int | float) and not isinstance(value, bool):
            if kind == "int" and value != int(value):
                raise ValueError(f"style.{name}={value!r} must be a whole number")
            changes[name] = NUMBERS[kind](value)
        elif type(value).__name__ == kind:
            changes[name] = value
        else:
            raise ValueError(f"style.{name}={value!r} must be of type {kind}")
    return replace(style, **changes)
