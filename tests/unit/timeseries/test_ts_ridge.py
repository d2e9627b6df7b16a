"""Invariants of `verl.timeseries.ridge` and of the texts about spectrograms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from small_archives import write_whales

from verl.timeseries import TaskSpec, get_task
from verl.timeseries.describe import describe, extension
from verl.timeseries.readers import Archive
from verl.timeseries.ridge import listen
from verl.timeseries.spectrogram import Spectrogram, power
from verl.timeseries.style import spectrogram_style
from verl.timeseries.task import DescriptionStyle

RCW = get_task("rcw")
OF = Spectrogram(rate=2000.0, high=500.0)
TIME = np.arange(4000) / 2000


def noise(seed: int, length: int = 4000) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=length)


def sweep(begin: float, end: float, start: float, stop: float, amplitude: float = 3.0) -> np.ndarray:
    """A tone from `begin` to `end` Hz between two seconds, in noise."""
    inside = (start < TIME) & (stop > TIME)
    since = TIME - start
    phase = begin * since + (end - begin) / (stop - start) * since**2 / 2
    return amplitude * np.where(inside, np.sin(2 * np.pi * phase), 0.0) + noise(3)


@pytest.fixture(scope="module")
def whales(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return RCW.reader.read(write_whales(tmp_path_factory.mktemp("whales")), RCW)


def test_texts_of_the_made_archive_tell_a_call_from_noise_and_nearly_all_differ(whales: Archive) -> None:
    texts = []
    for part in (whales.train, whales.test):
        for series, label in zip(part.series, part.labels, strict=True):
            text = describe(series, RCW)
            assert ("it rises" in text) == (label == "RightWhale") == ("No ridge" not in text), text
            assert text == describe(series.copy(), RCW) and len(text.split()) <= 60
            texts.append(text)
    assert len(texts) == 30 and len(set(texts)) >= 25


@pytest.mark.parametrize("begin", [80.0, 300.0])
@pytest.mark.parametrize("end", [80.0, 300.0])
@pytest.mark.parametrize("amplitude", [0.6, 3.0])
def test_a_ridge_is_where_its_tone_is(begin: float, end: float, amplitude: float) -> None:
    found = listen(sweep(begin, end, 0.6, 1.5, amplitude), OF)
    assert found is not None and found.ridge is not None
    ridge = found.ridge
    assert (ridge.start_hertz, ridge.end_hertz) == pytest.approx((begin, end), abs=30)
    assert (ridge.start, ridge.end) == pytest.approx((0.6, 1.5), abs=0.15)
    assert ridge.rises == np.sign(end - begin) and ridge.start <= found.loudest <= ridge.end
    assert ridge.level > (15 if amplitude == 3.0 else 8)


@pytest.mark.parametrize("length", [32, 64, 200, 1000, 4000, 20000])
def test_noise_has_a_ridge_or_a_steady_band_in_one_of_fifty_at_most(length: int) -> None:
    of = Spectrogram.fitting(100.0, length)
    found = [listen(noise(seed, length), of) for seed in range(50)]
    assert sum(one is not None and one.ridge is not None for one in found) <= 1
    assert sum(one is not None and one.steady_hertz is not None for one in found) <= 1


def test_noise_that_is_loud_at_low_frequencies_is_a_steady_band_and_hides_no_call() -> None:
    slow = [noise(seed).cumsum() for seed in range(50)]
    found = [listen(values, OF) for values in slow]
    assert sum(one is not None and one.ridge is not None for one in found) <= 3
    assert all(one is not None and one.steady_hertz is not None and one.steady_hertz < 30 for one in found)
    call = listen(slow[0] + 3 * sweep(80.0, 220.0, 0.5, 1.5), OF)
    assert call is not None and call.ridge is not None and call.ridge.rises == 1


def test_a_tone_that_never_stops_is_a_ridge_that_keeps_level_and_a_steady_band() -> None:
    text = describe((3 * np.sin(2 * np.pi * 203 * TIME) + noise(0))[None], RCW)
    assert " to 203 Hz at 2 s: it keeps level, " in text and "A steady band lies near 203 Hz, " in text


def test_measures_and_text_do_not_change_with_scale_and_shift() -> None:
    values = sweep(80.0, 220.0, 1.0, 2.0)
    assert listen(values, OF) == listen(values * 1024.0, OF)
    assert describe(values[None], RCW) == describe(values[None] * 1024.0 + 4096.0, RCW)


def test_the_drawn_band_is_the_one_that_is_measured() -> None:
    low = listen(sweep(80.0, 220.0, 1.0, 2.0), replace(OF, low=300.0))
    assert low is not None and low.ridge is None and low.loudest_hertz >= 300.0


@pytest.mark.parametrize("value", [0.0, 0.1, 1.7])
def test_a_constant_is_silent_also_where_its_mean_is_inexact(value: float) -> None:
    assert listen(np.full(4000, value), OF) is None and not power(np.full(4000, value), OF).any()


def test_own_data_of_several_channels_names_each_and_a_short_text_is_the_ridge(tiny_task: TaskSpec) -> None:
    plot = replace(spectrogram_style(OF), channel_names=("hull", "bow"), gap=20)
    task = replace(tiny_task, channels=2, length=4000, plot=plot)
    series = np.stack([sweep(220.0, 80.0, 0.5, 1.5), np.zeros(4000)])
    text = describe(series, task)
    assert text.startswith("hull: A ridge runs from 2") and ": it falls, " in text
    assert text.endswith(" bow: The signal is silent.")
    short = describe(series[:1], replace(task, channels=1, description=DescriptionStyle.SHORT))
    assert short.endswith("above the usual level of its frequencies.")


def test_phases_are_left_out_where_bridged_gaps_would_make_one_of_noise() -> None:
    line = get_task("emg")
    text = describe(noise(0, 1500)[None], line)
    assert " phase" not in text and " phase" not in extension(noise(0, 1500)[None], "Healthy", line)
    box = np.where((np.arange(1500) // 300) % 2 == 1, 1.0, 0.0)[None]
    assert "There are two high phases, the longest of medium length." in describe(box, line)
    assert "with at most two levels and two high phases." in extension(box, "Healthy", line)
