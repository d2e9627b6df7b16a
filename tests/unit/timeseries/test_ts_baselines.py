"""Invariants of `verl.timeseries.baselines`."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from verl.timeseries import get_task
from verl.timeseries.baselines import BASELINES, BaselineScore, main, of_one_length, score, table


def test_majority_and_nearest_neighbour_are_their_definitions() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(30, 2, 9)), rng.normal(size=(11, 2, 9))
    labels = ["a"] * 12 + ["b"] * 18
    assert list(BASELINES["majority"](train, labels, test, 0)) == ["b"] * 11
    nearest = [labels[int(((train - row) ** 2).sum(axis=(1, 2)).argmin())] for row in test]
    assert list(BASELINES["1-NN"](train, labels, test, 0)) == nearest


def test_a_one_percent_difference_in_the_table_is_beside_its_standard_error() -> None:
    found = BaselineScore("ctu", "1-NN", 250, (0.57, 0.58), 0.57, 1.0)
    assert found.accuracy == pytest.approx(0.575)
    assert found.standard_error == pytest.approx(math.sqrt(0.575 * 0.425 / 250), rel=0.01)
    assert "| ctu | 250 | 57.5 +- 3.1 / 57.0 |" in table([found])


@pytest.mark.parametrize(("accuracy", "n"), [(1.0, 41), (0.0, 41), (0.9, 10), (0.575, 250)])
def test_the_standard_error_solves_wilsons_equation_also_at_no_fault(accuracy: float, n: int) -> None:
    found = BaselineScore("emg", "ROCKET", n, (accuracy,), accuracy, 1.0).standard_error
    # The ends of the interval are the shares whose own standard error just reaches the one that was seen.
    b, c = -(2 * accuracy + 1 / n), accuracy**2
    low, high = sorted(np.roots([1 + 1 / n, b, c]).real)
    assert found == pytest.approx((high - low) / 2) and found > 0


def test_the_table_claims_no_certainty_at_no_fault() -> None:
    assert "| emg | 41 | 100.0 +- 1.2 / 100.0 |" in table([BaselineScore("emg", "ROCKET", 41, (1.0,), 1.0, 1.0)])


@pytest.mark.parametrize(("name", "folder", "accuracy"), [("ctu", "Computers", 0.576), ("tee", "Lightning7", 0.5753)])
def test_one_nn_has_the_published_accuracy(name: str, folder: str, accuracy: float, archives: Path) -> None:
    task = get_task(name)
    found = score(task, task.reader.read(archives / "ucr" / folder, task), "1-NN", [1])
    assert found.accuracy == pytest.approx(accuracy, abs=5e-5)


@pytest.mark.slow
def test_rocket_is_near_its_published_accuracy_on_lightning7(archives: Path) -> None:
    task = get_task("tee")
    found = score(task, task.reader.read(archives / "ucr" / "Lightning7", task), "ROCKET", [1, 2, 3])
    assert found.accuracy == pytest.approx(0.823, abs=0.03)


def test_series_of_different_lengths_are_stretched_to_the_median(capsys: pytest.CaptureFixture[str]) -> None:
    ramp, step = np.arange(5.0)[None], np.array([[0.0, 0.0, 6.0]])
    found = of_one_length([ramp, step], 5)
    np.testing.assert_allclose(found, [[[0, 1, 2, 3, 4]], [[0, 0, 0, 3, 6]]])
    assert main(["japanese_vowels", "--baselines", "1-NN"]) == 0  # UEA archive: 0.924
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| japanese_vowels"))
    assert float(row.split("|")[3].split(" +-")[0]) > 90, row


def test_minirocket_separates_gun_from_point(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gun_point", "--baselines", "majority", "MiniRocket"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| gun_point"))
    majority, rocket = (float(cell.split(" +-")[0]) for cell in row.strip("| ").split("|")[2:])
    assert majority < 55 and rocket > 90, row
