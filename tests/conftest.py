"""Shared by all tests: marker, order and time limit by folder, and where the real archives lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


LIMITS = {"unit": 240, "integration": 900, "gpu": 600}
"""Seconds for one test, by folder (fast ones first); `slow` tests get SLOW_LIMIT, a test's own timeout marker wins."""

SLOW_LIMIT = 3600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's folder is its marker, so that `-m unit` and `tests/unit` mean the same; unit tests run first."""
    order = list(LIMITS)
    places: dict[pytest.Item, int] = {}
    for item in items:
        folder = Path(item.path).relative_to(ROOT / "tests").parts[0]
        if folder in LIMITS:
            item.add_marker(folder)
            if item.get_closest_marker("timeout") is None:
                limit = SLOW_LIMIT if item.get_closest_marker("slow") else LIMITS[folder]
                item.add_marker(pytest.mark.timeout(limit))
        places[item] = order.index(folder) if folder in order else len(order)
    items.sort(key=places.__getitem__)


@pytest.fixture(scope="session")
def archives() -> Path:
    """The folder with the real archives (`TIMEMASTER_ARCHIVES`, default `../shared/data`); skips where it is absent."""
    path = Path(os.environ.get("TIMEMASTER_ARCHIVES", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real archives not found at {path} (set TIMEMASTER_ARCHIVES)")
    return path
