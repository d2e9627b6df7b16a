"""Shared by all tests: markers by folder, and where the real archives lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's folder is its marker, so that `-m unit` and `tests/unit` mean the same."""
    for item in items:
        folder = Path(item.path).relative_to(ROOT / "tests").parts[0]
        if folder in ("unit", "integration", "gpu"):
            item.add_marker(folder)


@pytest.fixture(scope="session")
def archives() -> Path:
    """The folder with the real archives (`TIMEMASTER_ARCHIVES`, default `../shared/data`); skips where it is absent."""
    path = Path(os.environ.get("TIMEMASTER_ARCHIVES", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real archives not found at {path} (set TIMEMASTER_ARCHIVES)")
    return path
