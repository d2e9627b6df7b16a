"""Reasoning text for supervised examples, written from what is measured on the series.

Invariants
- `describe` takes the series and the task, never the label: rows with the same values get the same text.
- Every word comes from the fixed phrases below and the task's panel and channel names; numbers carry a unit.
- Where the task draws a spectrogram, what is measured is that spectrogram.
- Measures do not change when a series without fixed limits is shifted or scaled; only the span in the task's unit does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from verl.timeseries.readers import Series
from verl.timeseries.ridge import Sound, listen
from verl.timeseries.spectrogram import Spectrogram
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
SPACING: Scale = ((0.1, 0.25), ("evenly", "somewhat unevenly", "irregularly"))
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

    @property
    def has_phases(self) -> bool:
        """The high runs are phases: in noise the bridged gaps make one of what is low half the time."""
        return bool(self.high_runs) and sum(self.high_runs) - self.high <= 0.1


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


def _number(value: float) -> str:
    """Two significant digits."""
    return f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}"


def _is_short(task: TaskSpec, length: int) -> bool:
    """Frequencies are said in Hz where the window is shorter than an hour."""
    return task.time_step is not None and task.time_step * length < 3600


def _hertz(m: Measures, task: TaskSpec, length: int) -> str:
    """` near 1.2 Hz`, or nothing where the task has no clock or the channel no clear frequency."""
    if not _is_short(task, length) or m.cycles == 0.0 or m.rhythm < RHYTHM[0][0]:
        return ""
    assert task.time_step is not None
    return f" near {_frequency(m.cycles / (length * task.time_step))}"


def _frequency(hertz: float) -> str:
    return f"{_number(hertz)} Hz" if hertz < 1000 else f"{_number(hertz / 1000)} kHz"


def _span(values: Channel, task: TaskSpec) -> str:
    return f"{_number(float(np.ptp(values)))} {task.unit}"


@dataclass(frozen=True)
class Peaks:
    """Points that stand out of their surroundings by 40 percent of the range or more, at least 0.2 s apart."""

    count: int
    spacing: float | None
    """Standard deviation of the distances over their mean; None below three peaks."""
    mean_distance: float | None
    """In points; None below two peaks."""


def find_peaks(values: Channel, time_step: float) -> Peaks:
    """Peaks of one channel (length,); of the two directions the one that stands out farther from the median."""
    from scipy.signal import find_peaks as scipy_find_peaks

    centred = values - np.median(values)
    span = float(np.ptp(values))
    if span == 0.0:
        return Peaks(0, None, None)
    upright = centred if centred.max() >= -centred.min() else -centred
    places, _ = scipy_find_peaks(upright, prominence=0.4 * span, distance=max(1, round(0.2 / time_step)))
    distances = np.diff(places)
    mean = float(distances.mean()) if len(distances) else None
    spacing = float(distances.std() / distances.mean()) if len(distances) >= 2 else None
    return Peaks(len(places), spacing, mean)


def _peak_sentence(values: Channel, task: TaskSpec) -> str:
    """How many peaks, how evenly, how many a minute: for windows of seconds, where beats and steps are seen."""
    if task.time_step is None or not task.unit or not 1.0 <= task.time_step * len(values) < 60.0:
        return ""
    peaks = find_peaks(values, task.time_step)
    if peaks.spacing is None or peaks.mean_distance is None:
        return "Hardly any peak stands out." if peaks.count < 2 else "Two peaks stand out."
    rate = 60 / (peaks.mean_distance * task.time_step)
    return f"{peaks.count} peaks stand out, {_word(peaks.spacing, *SPACING)} spaced, {rate:.0f} a minute."


def _full(series: Series, task: TaskSpec) -> str:
    if task.channels > 1:
        return _full_channels(series, task)
    return _full_channel(series[0], measure(series[0]), task)


def _names(task: TaskSpec, channels: int) -> list[str]:
    """The plot's names; numbers where it has none."""
    given = task.plot.channel_names[:channels]
    return [*given, *(f"channel {i + 1}" for i in range(len(given), channels))]


def _full_channels(series: Series, task: TaskSpec) -> str:
    """One sentence a channel, then which moves most and least, then the peaks of the one that moves most."""
    names = _names(task, len(series))
    text = []
    for name, channel in zip(names, series, strict=True):
        m = measure(channel)
        span = f"spans {_span(channel, task)}, " if task.unit else ""
        rhythm = f"{_word(m.rhythm, *RHYTHM)} rhythm{_hertz(m, task, series.shape[1])}"
        trend, steps = _word(m.trend, *TREND), _word(m.jump, *STEPS)
        text.append(f"{name} {span}{trend} and has {steps} steps with {rhythm}.")
    order = np.argsort(series.var(axis=1), kind="stable")
    text.append(f"{names[int(order[-1])]} moves most, {names[int(order[0])]} least.")
    text.append(_peak_sentence(series[int(order[-1])], task))
    return " ".join(filter(None, text))


def _full_channel(values: Channel, m: Measures, task: TaskSpec) -> str:
    length = len(values)
    text = [
        f"The signal changes at {_word(m.changing, *CHANGING)} of the steps.",
        f"It uses {_word(m.levels, *LEVELS)} and is {_word(m.high, *HIGH)}.",
    ]
    if task.unit:
        text.append(f"It spans {_span(values, task)}.")
    if m.has_phases:
        number = len(m.high_runs)
        phases = "is one high phase" if number == 1 else f"are {_count(number)} high phases"
        text.append(f"There {phases}, the longest {_duration(max(m.high_runs), task, length)}.")
    text.append(f"Its steps are {_word(m.jump, *STEPS)} and overall it {_word(m.trend, *TREND)}.")
    text.append(f"The highest value lies in the {PLACES[m.peak]}.")
    text.append(f"There is {_word(m.rhythm, *RHYTHM)} rhythm{_hertz(m, task, length)}.")
    text.append(_peak_sentence(values, task))
    return " ".join(filter(None, text))


def _sounds(series: Series, task: TaskSpec, of: Spectrogram) -> str:
    """A channel after the other, by name where there are several."""
    texts = [_sound(listen(channel, of), task.description) for channel in series]
    if len(texts) == 1:
        return texts[0]
    return " ".join(f"{name}: {text}" for name, text in zip(_names(task, len(series)), texts, strict=True))


def _sound(sound: Sound | None, style: DescriptionStyle) -> str:
    """The ridge; in full texts then the loudest part and the steady band."""
    if sound is None:
        return "The signal is silent."
    ridge = sound.ridge
    if ridge is None:
        text = "No ridge stands out."
    else:
        course = ("keeps level", "rises", "falls")[ridge.rises]
        text = (
            f"A ridge runs from {_frequency(ridge.start_hertz)} at {_number(ridge.start)} s to "
            f"{_frequency(ridge.end_hertz)} at {_number(ridge.end)} s: it {course}, "
            f"{ridge.level:.0f} dB above the usual level of its frequencies."
        )
    if style is DescriptionStyle.SHORT:
        return text
    steady = "No frequency is loud all the time."
    if sound.steady_hertz is not None:
        steady = (
            f"A steady band lies near {_frequency(sound.steady_hertz)}, {sound.steady_level:.0f} dB above the others."
        )
    return (
        f"{text} The loudest part is at {_number(sound.loudest)} s near {_frequency(sound.loudest_hertz)}, "
        f"{sound.loudest_level:.0f} dB above the median level. {steady}"
    )


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

    Full: sentences on change, level, span, phases, steps and trend, highest value, rhythm and peaks; with several
    channels one on each, and how they compare. Short: one of 8 to 14 words, for models of a few million parameters.
    Of a spectrogram: the ridge, the loudest part and the steady band of each channel; short: the ridge.
    Raises ValueError when the series does not have the task's channels.
    """
    if series.ndim != 2 or series.shape[0] != task.channels:
        raise ValueError(f"task {task.name} has {task.channels} channels, got a series of shape {series.shape}")
    if task.plot.spectrogram is not None:
        return _sounds(series, task, task.plot.spectrogram)
    return (_short if task.description is DescriptionStyle.SHORT else _full)(series, task)


def extension(series: Series, label: str, task: TaskSpec) -> str:
    """The `<extension>` of a supervised answer: what was measured, then what the class asks for at that amplitude.

    The measured sentence does not depend on the label.
    """
    suggestion = task.suggestions[label]
    peak = float(np.abs(series[0] - np.median(series[0])).max())
    m = measure(series[0])
    phases = ""
    if m.has_phases:
        phases = " and one high phase" if len(m.high_runs) == 1 else f" and {_count(len(m.high_runs))} high phases"
    facts = f"The largest peak is {peak:.1f} {task.unit} from the middle, with {_word(m.levels, *LEVELS)}{phases}."
    return f"{facts} {suggestion.strong if peak >= suggestion.strong_from else suggestion.weak} {suggestion.then}"


def sft_answer(series: Series, label: str, task: TaskSpec) -> str:
    """The supervised answer: measured reasoning, the class, and the extension where the task asks for one.

    Raises ValueError when the task has no such label.
    """
    if label not in task.classes:
        raise ValueError(f"label {label!r} is not a class of task {task.name}: {', '.join(task.classes)}")
    answer = f"<think>{describe(series, task)}</think><class>{label}</class>"
    return f"{answer}<extension>{extension(series, label, task)}</extension>" if task.asks_extension else answer
