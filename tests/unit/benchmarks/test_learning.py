"""The learning benchmark's curves and its tests of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "learning.py")])
    import learning

    return learning


def test_curves_are_kept_by_workload(learning: Any, tmp_path: Path) -> None:
    path = tmp_path / "curves" / "learning.json"
    learning.write_curves({"ctu": {"1": [0.1, 0.2]}}, path, append=True)
    learning.write_curves({"har": {"1": [0.3]}}, path, append=True)
    assert json.loads(path.read_text()) == {"ctu": {"1": [0.1, 0.2]}, "har": {"1": [0.3]}}
    learning.write_curves({"har": {"2": [0.4]}}, path, append=False)
    assert json.loads(path.read_text()) == {"har": {"2": [0.4]}}


def test_mcnemar_counts_what_one_model_alone_gets_right(learning: Any) -> None:
    one = {str(row): row < 8 for row in range(10)}
    other = {str(row): row < 2 for row in range(10)}
    first, second, p = learning.mcnemar(one, other)
    assert (first, second) == (6, 0) and p == pytest.approx(2 * 0.5**6)
    assert learning.mcnemar(one, one) == (0, 0, 1.0)


def test_the_gain_of_a_flat_curve_is_none_and_of_a_rising_one_many_errors(learning: Any) -> None:
    noise = [0.01 * (-1) ** step for step in range(40)]
    assert learning.reward_gain([noise])[0] == pytest.approx(0.0)
    gain, error = learning.reward_gain([[0.02 * step + noise[step] for step in range(40)]] * 3)
    assert gain == pytest.approx(0.6) and gain > 3 * error
