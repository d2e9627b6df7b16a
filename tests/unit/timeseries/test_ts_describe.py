"""Invariants of `verl.timeseries.describe`."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace

import numpy as np
import pytest

from verl.timeseries import TaskSpec, get_task
from verl.timeseries.describe import describe, find_peaks, measure, sft_answer
from verl.timeseries.readers import Series
from verl.timeseries.task import DescriptionStyle

TIME = np.linspace(0.0, 1.0, 200)
RNG = np.random.default_rng(0)


def noisy(seed: int, channels: int, length: int) -> Series:
    rng = np.random.default_rng(seed)
    kind = rng.integers(3)
    base = rng.normal(size=(channels, length)) * 10.0 ** rng.uniform(-2, 1)
    return base if kind == 0 else base.cumsum(axis=1) if kind == 1 else np.round(base.cumsum(axis=1) / 3)


def test_describe_has_no_way_to_see_the_label() -> None:
    assert list(inspect.signature(describe).parameters) == ["series", "task"]


@pytest.mark.parametrize("name", ["ctu", "basic_motions", "har", "ecg"])
def test_the_text_is_the_same_whatever_the_label(name: str) -> None:
    task = get_task(name)
    series = noisy(0, task.channels, task.length or 0)
    answers = {label: sft_answer(series, label, task) for label in task.classes}
    thoughts = {re.fullmatch(r"<think>(.+)</think><class>.+</class>", a).group(1) for a in answers.values()}  # type: ignore[union-attr]
    assert thoughts == {describe(series, task)}
    for label, answer in answers.items():
        assert answer.endswith(f"</think><class>{label}</class>")


@pytest.mark.parametrize("name", ["ctu", "basic_motions", "har", "ecg", "rcw", "tee"])
def test_no_class_is_named_in_any_text(name: str) -> None:
    task = get_task(name)
    for seed in range(50):
        text = describe(noisy(seed, task.channels, task.length or 0), task).lower()
        assert not [label for label in task.classes if label.lower() in text], text


@pytest.mark.parametrize("name", ["ctu", "basic_motions"])
def test_different_series_get_different_texts_from_a_small_vocabulary(name: str) -> None:
    task = get_task(name)
    texts = [describe(noisy(seed, task.channels, task.length or 0), task) for seed in range(200)]
    assert len(set(texts)) > 40
    words = {word for text in texts for word in re.findall(r"\S+", text)}
    assert len(words) < 110 and all(re.fullmatch(r"[A-Za-z]+[.,]?", word) for word in words), sorted(words)


@pytest.mark.parametrize(("name", "fewest", "most"), [("basic_motions", 8, 14), ("gun_point", 8, 14), ("ctu", 35, 60)])
def test_the_length_fits_the_style(name: str, fewest: int, most: int) -> None:
    task = get_task(name)
    for seed in range(100):
        text = describe(noisy(seed, task.channels, task.length or 0), task)
        assert fewest <= len(text.split()) <= most, text


def test_a_full_text_of_many_channels_names_each(tiny_task: TaskSpec) -> None:
    plot = replace(tiny_task.plot, channel_names=("left", "right"))
    task = replace(tiny_task, channels=2, plot=plot, description=DescriptionStyle.FULL)
    text = describe(noisy(0, 2, 12), task)
    assert text.startswith("left ") and ". right " in text and " moves most, " in text


def test_known_shapes_measure_as_they_are() -> None:
    sine = measure(np.sin(2 * np.pi * 5 * TIME))
    assert sine.cycles == 5 and sine.rhythm > 0.9 and len(sine.high_runs) == 5 and sine.changing == 1.0
    ramp = measure(TIME)
    assert ramp.trend == pytest.approx(1.0) and ramp.peak == 3 and ramp.high == pytest.approx(0.5)
    box = measure(((TIME > 0.25) & (TIME < 0.5)).astype(float))
    assert box.changing == pytest.approx(2 / 199) and box.levels == 2 and box.jump == 1.0 and box.peak == 1
    assert box.high_runs == pytest.approx((0.25,), abs=0.01)
    assert measure(-TIME).trend == pytest.approx(-1.0)


def test_gaps_under_one_percent_do_not_cut_a_high_phase() -> None:
    values = np.ones(300)
    values[:50] = values[250:] = 0.0
    values[100] = values[200:202] = 0.0
    assert len(measure(values).high_runs) == 1
    values[150:155] = 0.0
    assert len(measure(values).high_runs) == 2


def test_measures_ignore_shift_and_scale() -> None:
    values = RNG.normal(size=256).cumsum()
    a, b = measure(values), measure(values * 1024.0 + 4096.0)
    assert (a.cycles, a.levels, a.peak, a.high_runs) == (b.cycles, b.levels, b.peak, b.high_runs)
    assert (a.trend, a.rhythm, a.jump) == pytest.approx((b.trend, b.rhythm, b.jump))


def test_a_constant_series_is_described_without_a_warning() -> None:
    for name in ("ctu", "basic_motions", "har", "ecg", "rcw", "tee"):
        task = get_task(name)
        with np.errstate(all="raise"):
            assert "nan" not in describe(np.ones((task.channels, task.length or 0)), task)


def test_a_label_the_task_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="'Tablet' is not a class of task ctu"):
        sft_answer(np.ones((1, 720)), "Tablet", get_task("ctu"))


def test_a_series_with_other_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="has 6 channels"):
        describe(np.ones((1, 100)), get_task("basic_motions"))


def beats(distances: list[int], length: int = 1500) -> np.ndarray:
    """A flat ECG with narrow peaks of 1 mV, `distances` samples apart."""
    values = np.zeros(length)
    for place in np.cumsum([40, *distances]):
        values[place - 3 : place + 4] = [0.2, 0.5, 0.8, 1.0, 0.8, 0.5, 0.2]
    return values


def test_peaks_give_the_rate_and_the_evenness_of_beats() -> None:
    even = find_peaks(beats([240] * 5), 1 / 300)
    assert (even.count, even.spacing, even.mean_distance) == (6, 0.0, 240.0)
    odd = find_peaks(beats([150, 400, 200, 350, 140]), 1 / 300)
    assert odd.count == 6 and odd.spacing is not None and odd.spacing > 0.25
    assert find_peaks(-beats([240] * 5), 1 / 300) == even, "a lead that is turned around has the same beats"


def test_ecg_and_har_texts_carry_their_units() -> None:
    text = describe(beats([240] * 5)[None], get_task("ecg"))
    assert "It spans 1 mV." in text and "6 peaks stand out, evenly spaced, 75 a minute." in text
    walk = np.sin(2 * np.pi * 2.0 * 0.02 * np.arange(128)) * np.array([[0.5], [0.1], [0.2]])
    text = describe(walk, get_task("har"))
    assert "body_acc_x spans 1 g, " in text and "a clear rhythm near 2 Hz" in text
    assert "body_acc_x moves most, body_acc_y least." in text
