"""Invariants of `verl.timeseries.plot`."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from verl.timeseries import get_task, plot, task_names
from verl.timeseries.readers import Series
from verl.timeseries.spectrogram import Spectrogram, power
from verl.timeseries.style import GRID, Panel, PlotStyle

CTU = get_task("ctu").plot
HAR, RCW = get_task("har").plot, get_task("rcw").plot
MOTION = replace(GRID, title="Motion", x_label="Timestamp", y_label="g", channel_names=("x", "y", "z"))
SMALL = PlotStyle(width=84, height=56, ticks=False, left=2, right=2, bottom=2, top=2)
LEGEND = replace(CTU, legend=True, channel_names=("x", "y"), panels=(Panel("a", (0,), (-3.0, 3.0)), Panel("b", (1,))))
STYLES = [
    pytest.param(style, id=name)
    for name, style in (
        ("ctu", CTU),
        ("small", SMALL),
        ("legend", LEGEND),
        ("lines", HAR),
        ("grid", MOTION),
        ("spectrogram", RCW),
    )
]
CHANNELS = {LEGEND: 2, HAR: 3, MOTION: 3}
ROOT = Path(__file__).resolve().parents[3]


def walk(seed: int, channels: int = 1, length: int = 100, scale: float = 1.0) -> Series:
    return np.random.default_rng(seed).normal(size=(channels, length)).cumsum(axis=1) * scale


def samples(channels: int = 1) -> list[Series]:
    """Walks of different scales, so that tick labels change in number and width."""
    return [walk(i, channels, scale=10.0 ** (i % 7 - 3)) for i in range(12)]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.parametrize("style", STYLES)
def test_bytes_do_not_depend_on_the_order_or_on_the_figure_being_new(style: PlotStyle) -> None:
    series = samples(CHANNELS.get(style, 1))
    first = [plot.draw(s, style) for s in series]
    assert [plot.draw(s, style) for s in reversed(series)] == first[::-1]
    for s, png in zip(series, first, strict=True):
        plot._canvas.cache_clear()
        assert plot.draw(s, style) == png


@pytest.mark.parametrize("style", STYLES)
def test_the_reused_background_gives_the_pixels_of_a_whole_draw(style: PlotStyle) -> None:
    lengths = (50, 80, 50, 120)
    channels = CHANNELS.get(style, 1)
    canvas = plot._Canvas(style, channels)
    for seed, length in enumerate(lengths):
        series = walk(seed, channels, length)
        assert canvas.draw(series) == plot._Canvas(style, channels).draw_whole(series), f"length {length}"


def test_a_user_configuration_does_not_change_the_bytes() -> None:
    series = walk(1)
    plot._canvas.cache_clear()
    before = plot.draw(series, CTU)
    with matplotlib.rc_context(
        {"lines.linewidth": 9, "axes.grid": True, "font.family": "serif", "path.simplify": False}
    ):
        plot._canvas.cache_clear()
        assert plot.draw(series, CTU) == before
        assert matplotlib.rcParams["lines.linewidth"] == 9, "the user's settings must come back"


def test_other_processes_draw_the_same_bytes() -> None:
    series = [walk(i, length=30) for i in range(plot._WORTH_PROCESSES)]
    assert list(plot.draw_all(series, SMALL, workers=2)) == [plot.draw(s, SMALL) for s in series]


def test_a_fresh_interpreter_draws_the_same_bytes() -> None:
    code = (
        "import hashlib, numpy as np\nfrom verl.timeseries import get_task, plot\n"
        "s = np.random.default_rng(1).normal(size=(1, 100)).cumsum(axis=1)\n"
        "print(hashlib.sha256(plot.draw(s, get_task('ctu').plot)).hexdigest())"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    import hashlib

    assert found.stdout.strip() == hashlib.sha256(plot.draw(walk(1), CTU)).hexdigest()


def test_every_task_draws_rgb_at_its_canvas_without_metadata() -> None:
    for name in task_names():
        task = get_task(name)
        image = Image.open(io.BytesIO(plot.draw(walk(0, task.channels, task.length or 40), task.plot)))
        assert (image.mode, image.size) == ("RGB", (task.plot.width, task.plot.height)), name
        assert image.size[0] % 28 == 0 and image.size[1] % 28 == 0, name
        assert not image.info, f"{name}: {image.info}"


def test_every_channel_has_its_own_color_in_its_panel() -> None:
    task = get_task("basic_motions")
    flat = np.linspace(-4.0, 4.0, 6)[:, None].repeat(100, axis=1)
    image = pixels(plot.draw(flat, task.plot))
    half = task.plot.height // 2
    for rows in (image[4 : half - 4], image[half + 4 : -4]):
        column = rows[:, image.shape[1] // 2].astype(int)
        drawn = column[np.ptp(column, axis=1) > 60]
        hues = {tuple(np.round(c / 64).astype(int)) for c in drawn}
        assert len(hues) >= 3, hues


def test_a_panel_with_limits_shows_amplitude_and_one_without_does_not() -> None:
    series = walk(3)
    free, fixed = SMALL, replace(SMALL, panels=(Panel("v", (0,), (-20.0, 20.0)),))
    assert plot.draw(series, free) == plot.draw(series * 0.125, free)
    assert plot.draw(series, fixed) != plot.draw(series * 0.125, fixed)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_series_that_is_not_finite_is_refused(value: float) -> None:
    series = walk(0)
    series[0, 5] = value
    with pytest.raises(ValueError, match="finite"):
        plot.draw(series, SMALL)


def test_a_constant_series_draws() -> None:
    assert len({tuple(p) for p in pixels(plot.draw(np.ones((1, 50)), CTU)).reshape(-1, 3)}) > 2


def test_the_cache_is_used_and_a_damaged_entry_is_drawn_again(tmp_path: Path) -> None:
    series = walk(0)
    png = plot.draw_cached(series, SMALL, tmp_path)
    (entry,) = tmp_path.rglob("*.png")
    other = plot.draw(walk(1), SMALL)
    entry.write_bytes(other)
    assert plot.draw_cached(series, SMALL, tmp_path) == other, "an entry must be read, not drawn"
    for damaged in (b"", png[:-20], png[:60] + bytes([png[60] ^ 1]) + png[61:], plot.draw(series, CTU)):
        entry.write_bytes(damaged)
        assert plot.draw_cached(series, SMALL, tmp_path) == png
        assert entry.read_bytes() == png


def test_the_cache_key_depends_on_values_shape_style_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    series = walk(0, channels=2)
    keys = {plot.plot_key(s, SMALL) for s in (series, series + 1e-12, series.reshape(1, -1))}
    keys.add(plot.plot_key(series, replace(SMALL, line_width=1.0)))
    monkeypatch.setattr(plot, "RENDER_VERSION", plot.RENDER_VERSION + 1)
    keys.add(plot.plot_key(series, SMALL))
    monkeypatch.setattr(matplotlib, "__version__", "0.0")
    keys.add(plot.plot_key(series, SMALL))
    assert len(keys) == 6


def test_ten_thousand_series_of_1500_points_fit_four_minutes_on_two_cores() -> None:
    series = [walk(i, length=1500) for i in range(30)]
    plot.draw(series[0], CTU)
    started = time.process_time()
    for s in series:
        plot.draw(s, CTU)
    milliseconds = (time.process_time() - started) / len(series) * 1e3
    assert milliseconds < 48, f"{milliseconds:.1f} ms of CPU time per plot; 10,000 on 2 cores in 240 s allow 48"


def test_the_token_count_of_a_style_is_that_of_its_picture() -> None:
    from verl.utils.dataset.images import ImageSpec, smart_resize

    spec = ImageSpec()
    for name in task_names():
        task = get_task(name)
        width, height = Image.open(io.BytesIO(plot.draw(walk(0, task.channels, task.length or 40), task.plot))).size
        rows, columns = smart_resize(height, width, spec)
        assert (rows // 28) * (columns // 28) == task.plot.vision_tokens, name


def test_a_rising_tone_rises_in_the_spectrogram_whatever_its_scale() -> None:
    time = np.arange(4000) / 2000
    tone = np.sin(2 * np.pi * (60 * time + 50 * time**2))
    of = Spectrogram(rate=2000.0, high=500.0)
    values = power(tone, of)
    ridge = values.argmax(axis=0) * 2000 / of.window
    assert ridge[0] == pytest.approx(70, abs=10) and ridge[-1] == pytest.approx(250, abs=12)
    assert values.min() >= 0.0 and values.max() == 1.0
    assert np.allclose(power(tone * 1000, of), values)


@pytest.mark.parametrize("length", [32, 33, 50, 63, 64, 127, 128, 300, 511, 512, 900, 1024, 4000])
def test_a_window_that_fits_the_length_gives_columns_and_rows(length: int) -> None:
    of = Spectrogram.fitting(100.0, length)
    rows, columns = power(walk(0, length=length)[0], of).shape
    assert columns >= 16 and rows >= 5 and of.window & (of.window - 1) == 0
    assert length < 1024 or of == Spectrogram(rate=100.0)


def test_a_window_for_too_few_points_is_refused() -> None:
    with pytest.raises(ValueError, match="needs series of 32 points or more, got 31"):
        Spectrogram.fitting(100.0, 31)


def test_a_silent_clip_draws_an_empty_spectrogram() -> None:
    assert not power(np.ones(4000), Spectrogram(rate=2000.0)).any()


@pytest.mark.parametrize(
    "values",
    [{"rate": 0}, {"rate": 2000, "high": 1200}, {"rate": 2000, "hop": 0}, {"rate": 2000, "low": 900, "high": 9}],
)
def test_a_spectrogram_that_cannot_be_drawn_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"style\.spectrogram: needs"):
        Spectrogram(**values)
