"""How a legend fits its room: beside the title, in rows, and with names that are shortened in their middle.

Invariants
- A plan is made from measured texts, and never wider than the room; a legend that fits one row is left as it is.
- A name keeps its beginning and end: what tells sensors apart may stand at either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

LOOK = {"handlelength": 1.2, "columnspacing": 1.0}
"""In font sizes, for every legend."""
ABOVE = {"frameon": False, "borderaxespad": 0.1, "borderpad": 0.1}
"""A legend above its axes."""
_BESIDE = 8
"""Pixels between a title and a legend in one line."""


@dataclass(frozen=True)
class LegendPlan:
    """Names as they are written, columns they stand in, size in pixels, and where the title goes."""

    names: tuple[str, ...]
    columns: int
    height: float
    title_above: bool
    """The title has a line of its own: the two do not fit beside each other."""

    @property
    def rows(self) -> int:
        return -(-len(self.names) // self.columns)


def labelled(axes: Any) -> tuple[list[Any], list[str]]:
    """Lines and their names, as they are: left to itself a legend leaves out a name that begins with an underscore."""
    return list(axes.lines), [str(line.get_label()) for line in axes.lines]


class Ruler:
    """Measures texts and legends as Agg draws them, in pixels."""

    def __init__(self, dpi: int) -> None:
        self._figure = Figure(dpi=dpi)
        self._renderer: Any = FigureCanvasAgg(self._figure).get_renderer()

    def text(self, text: str, font: FontProperties) -> tuple[float, float]:
        """Width and height of one line; mathematics (between $ signs) as it is drawn."""
        box = self._figure.text(0.0, 0.0, text, fontproperties=font).get_window_extent(self._renderer)
        return box.width, box.height

    def legend(self, names: Sequence[str], columns: int, font: FontProperties) -> tuple[float, float]:
        """Width and height of a legend of lines, above its axes."""
        axes: Any = self._figure.add_axes((0.0, 0.0, 1.0, 1.0))
        for name in names:
            axes.plot([0.0], [0.0], label=name)
        box = axes.legend(*labelled(axes), prop=font, ncols=columns, **LOOK, **ABOVE).get_window_extent(self._renderer)
        axes.remove()
        return box.width, box.height

    def shortened(self, name: str, room: float, font: FontProperties) -> str:
        """The name, or its beginning and end about an ellipsis; four letters stay however small the room."""
        kept = len(name)
        shown = name
        while kept > 4 and self.text(shown, font)[0] > room:
            kept -= 1
            shown = f"{name[: -(-kept // 2)]}\u2026{name[len(name) - kept // 2 :]}"
        return shown


def plan_legend(
    names: Sequence[str], room: float, ruler: Ruler, font: FontProperties, *, rows: int, title_width: float = 0.0
) -> LegendPlan:
    """The legend of `names` with the most columns that fits `room` pixels, in at most `rows` rows.

    Names too long even for that are shortened to their column's share. A title of `title_width` pixels stands beside
    the legend where both fit.
    """
    width, height = ruler.legend(names, len(names), font)
    columns, fewest = len(names), -(-len(names) // rows)
    while width > room and columns > fewest:
        columns -= 1
        width, height = ruler.legend(names, columns, font)
    if width > room:
        # What a legend takes beside its names, from one with hardly any.
        around = ruler.legend(["i"] * len(names), columns, font)[0] - columns * ruler.text("i", font)[0]
        names = [ruler.shortened(name, (room - around) / columns, font) for name in names]
        width, height = ruler.legend(names, columns, font)
    title_above = bool(title_width) and width + _BESIDE + title_width > room
    return LegendPlan(tuple(names), columns, height, title_above)
