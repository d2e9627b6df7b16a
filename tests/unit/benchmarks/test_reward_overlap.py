"""The limits that the reward benchmark fails at."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("overlapped", "rules", "missed"),
    [
        (1.5, 10.0, []),
        (1.51, 10.0, ["reward_overlapped_s: 1.51 s, allowed 1.5 s"]),
        (0.1, 10.5, ["rules_in_pool_s: 10.50 s, allowed 10 s"]),
    ],
)
def test_rewards_above_a_limit_are_named_with_value_and_limit(
    monkeypatch: pytest.MonkeyPatch, overlapped: float, rules: float, missed: list[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "reward_overlap.py")])
    import reward_overlap
    import rows

    values = {"reward_overlapped_s": overlapped, "rules_in_pool_s": rules}
    made = [rows.BenchmarkRow(row=name, workload="played", value=value, unit="s") for name, value in values.items()]
    assert reward_overlap.too_slow(made, argparse.Namespace(latency=1.0, rules=100_000)) == missed
