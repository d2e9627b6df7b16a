"""Reasoning text for supervised examples, written from what is measured on the series.

Invariants
- `describe` takes the series and the task, never the label: rows with the same values get the same text.
- Every word comes from the fixed phrases below and the task's panel and channel names.
- Measures do not change when a series without fixed limits is shifted or scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from verl.timeseries.readers import Series
from verl.timeseries.style import Panel
from verl.timeseries.task import DescriptionStyle, TaskSpec

Channel = NDArray[np.float64]
"""(length,)"""

PLACES = ("first quarter", "second quarter", "third quarter", "last quarter")
COUNTS = ("no", "one", "two", "three", "four", "five")

Scale = tuple[tuple[float, ...], tuple[str, ...]]
"""Upper bounds (exclusive, rising) and one word more than bounds."""

CHANGING: Scale = (
    (0.02, 0.1, 0.25, 0.4, 0.6, 0.9),
    ("almost none", "very few", "few", "some", "about half", "most", "nearly all"),
)
LEVELS: Scale = ((3, 5, 8), ("at most two levels", "a few levels", "several levels", "many levels"))
HIGH: Scale = (
    (0.05, 0.2, 0.4, 0.6, 0.8),
    (
        "low nearly all the time",
        "mostly low",
        "more low than high",
        "evenly low and high",
        "more high than low",
        "high",
    ),
)
STEPS: Scale = ((0.1, 0.3, 0.6), ("gentle", "moderate", "steep", "sudden"))
TREND: Scale = ((-0.5, -0.2, 0.2, 0.5), ("falls", "falls slightly", "keeps level", "rises slightly", "rises"))
RHYTHM: Scale = ((0.35, 0.6), ("no clear", "a weak", "a clear"))
HOURS: Scale = (
    (0.5, 1.75, 5.0, 14.0),
    ("under half an hour", "about an hour", "a few hours", "about half a day", "most of the day"),
)
SHARES: Scale = ((0.05, 0.15, 0.4, 0.7), ("very short", "short", "of medium length", "long", "nearly all"))
STRENGTH: Scale = (
    (0.03, 0.08, 0.16, 0.35, 0.65),
    ("absent", "faint", "weak", "moderate", "strong", "very strong"),
)
SHORT_PACE: Scale = ((4, 8, 12), ("slow", "medium", "fast", "very fast"))
SHORT_STEPS: Scale = ((0.15, 0.35, 0.6), ("smooth", "uneven", "sharp", "sudden"))
SHORT_HIGH: Scale = ((0.15, 0.4, 0.6, 0.85), ("low", "rather low", "balanced", "rather high", "high"))
SHORT_TREND: Scale = ((-0.3, 0.3), ("falling", "level", "rising"))


@dataclass(frozen=True)
class Measures:
    """Properties of one channel. Shares lie in [0, 1]; lengths are shares of the window unless said otherwise."""

    changing: float
    """Share of steps at which the value changes by more than a millionth of its range."""
    high: float
    """Share of points above the middle of the range."""
    high_runs: tuple[float, ...]
    """Lengths of the stretches above the middle of the range; gaps under one percent of the window are bridged."""
    trend: float
    """Correlation with time."""
    peak: int
    """Quarter of the window that holds the highest value."""
    cycles: float
    """Cycles per window of the strongest frequency."""
    rhythm: float
    """Share of the variance that this frequency and its two neighbours hold."""
    jump: float
    """Largest step as a share of the range."""
    levels: int
    """How many of 20 equal bands of the range hold at least one percent of the points."""


def measure(values: Channel) -> Measures:
    """Measure one channel (length,), finite. A constant channel has no change, trend or rhythm."""
    n, span = len(values), float(np.ptp(values))
    if n < 2 or span == 0.0:
        return Measures(0.0, 0.0, (), 0.0, 0, 0.0, 0.0, 0.0, 1)
    unit = (values - values.min()) / span
    steps = np.abs(np.diff(unit))
    power = np.abs(np.fft.rfft(unit - unit.mean())) ** 2
    power[0] = 0.0
    top = int(power.argmax())
    bands = np.bincount(np.minimum((unit * 20).astype(int), 19), minlength=20)
    return Measures(
        changing=float((steps > 1e-6).mean()),
        high=float((unit > 0.5).mean()),
        high_runs=_runs(unit > 0.5),
        trend=float(np.corrcoef(unit, np.arange(n))[0, 1]),
        peak=int(unit.argmax()) * 4 // n,
        cycles=float(top),
        rhythm=float(power[max(top - 1, 1) : top + 2].sum() / power.sum()),
        jump=float(steps.max()),
        levels=int((bands >= 0.01 * n).sum()),
    )


def _runs(high: NDArray[np.bool_]) -> tuple[float, ...]:
    """Lengths of the True stretches as shares of the window, gaps under one percent of it bridged."""
    n = len(high)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], high, [False]]).astype(np.int8)))
    runs: list[list[int]] = []
    for start, end in edges.reshape(-1, 2).tolist():
        if runs and start - runs[-1][1] < 0.01 * n:
            runs[-1][1] = end
        else:
            runs.append([start, end])
    return tuple((end - start) / n for start, end in runs)


def _word(value: float, bounds: Sequence[float], words: Sequence[str]) -> str:
    """The word of the first bound that the value stays under; the last word beyond them all."""
    assert len(words) == len(bounds) + 1, f"{len(words)} words for {len(bounds)} bounds"
    return words[int(np.searchsorted(bounds, value, side="right"))]


def _count(number: int) -> str:
    return COUNTS[number] if number < len(COUNTS) else "many"


def _duration(share: float, task: TaskSpec, length: int) -> str:
    """A stretch in words of time where the task's window is an hour or longer, else in shares of the window."""
    if task.time_step is None or task.time_step * length < 3600:
        return _word(share, *SHARES)
    return _word(share * length * task.time_step / 3600, *HOURS)


def _full(series: Series, task: TaskSpec) -> str:
    names = task.plot.channel_names if task.channels > 1 else ("",)
    return " ".join(
        _full_channel(measure(channel), task, series.shape[1], name)
        for name, channel in zip(names, series, strict=True)
    )


def _full_channel(m: Measures, task: TaskSpec, length: int, name: str) -> str:
    text = [
        f"{f'Channel {name}' if name else 'The signal'} changes at {_word(m.changing, *CHANGING)} of the steps.",
        f"It uses {_word(m.levels, *LEVELS)} and is {_word(m.high, *HIGH)}.",
    ]
    if m.high_runs:
        number = len(m.high_runs)
        phases = "is one high phase" if number == 1 else f"are {_count(number)} high phases"
        text.append(f"There {phases}, the longest {_duration(max(m.high_runs), task, length)}.")
    text.append(f"Its steps are {_word(m.jump, *STEPS)} and overall it {_word(m.trend, *TREND)}.")
    text.append(f"The highest value lies in the {PLACES[m.peak]}.")
    text.append(f"There is {_word(m.rhythm, *RHYTHM)} rhythm.")
    return " ".join(text)


def _strength(values: Series, panel: Panel) -> str:
    """Spread of a panel's channels against the panel's fixed range."""
    assert panel.limits is not None, f"panel {panel.name} has no limits"
    half = (panel.limits[1] - panel.limits[0]) / 2
    spread = float(np.sqrt(values.var(axis=1).mean())) / half
    return _word(spread, *STRENGTH)


def _short(series: Series, task: TaskSpec) -> str:
    widest = int(series.var(axis=1).argmax())
    m = measure(series[widest])
    panels = [panel for panel in task.plot.panels_for(task.channels) if panel.limits is not None]
    if panels:
        lead = ", ".join(f"{panel.name} {_strength(series[list(panel.channels)], panel)}" for panel in panels)
    else:
        lead = f"mostly {_word(m.high, *SHORT_HIGH)}, {_word(m.trend, *SHORT_TREND)}, top in {PLACES[m.peak]}"
    return f"{lead}, pace {_word(m.cycles, *SHORT_PACE)}, steps {_word(m.jump, *SHORT_STEPS)}".capitalize()


def describe(series: Series, task: TaskSpec) -> str:
    """Reasoning text about a series (channels, length), in the task's description style.

    Full: six sentences on change, level, phases, steps and trend, highest value, rhythm. Short: one of 8 to 14
    words, for models of a few million parameters.
    Raises ValueError when the series does not have the task's channels.
    """
    if series.ndim != 2 or series.shape[0] != task.channels:
        raise ValueError(f"task {task.name} has {task.channels} channels, got a series of shape {series.shape}")
    return (_short if task.description is DescriptionStyle.SHORT else _full)(series, task)


def extension(series: Series, label: str, task: TaskSpec) -> str:
    """The `<extension>` of a supervised answer: what was measured, then what the class asks for at that amplitude.

    The measured sentence does not depend on the label.
    """
    suggestion = task.suggestions[label]
    peak = float(np.abs(series[0] - np.median(series[0])).max())
    m = measure(series[0])
    phases = "one high phase" if len(m.high_runs) == 1 else f"{_count(len(m.high_runs))} high phases"
    facts = f"The largest peak is {peak:.1f} {task.unit} from the middle, with {_word(m.levels, *LEVELS)} and {phases}."
    return f"{facts} {suggestion.strong if peak >= suggestion.strong_from else suggestion.weak} {suggestion.then}"


def sft_answer(series: Series, label: str, task: TaskSpec) -> str:
    """The supervised answer: measured reasoning, the class, and the extension where the task asks for one.

    Raises ValueError when the task has no such label.
    """
    if label not in task.classes:
        raise ValueError(f"label {label!r} is not a class of task {task.name}: {', '.join(task.classes)}")
    answer = f"<think>{describe(series, task)}</think><class>{label}</class>"
    return f"{answer}<extension>{extension(series, label, task)}</extension>" if task.asks_extension else answer
