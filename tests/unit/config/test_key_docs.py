"""docs/keys.md is what its script makes now."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from verl.config.loader import SCHEMAS
from verl.config.schema import leaves

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_key_docs", ROOT / "scripts" / "make_key_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(script: ModuleType) -> None:
    written = script.TARGET.read_text(encoding="utf-8").splitlines()
    made = script.page().splitlines()
    stale = sorted(set(written) ^ set(made))
    assert written == made, f"run `python3 scripts/make_key_docs.py`; lines that differ: {stale[:6]}"


def test_the_page_names_every_key_and_every_old_name(script: ModuleType) -> None:
    page = script.page()
    for schema in SCHEMAS.values():
        assert [key for key, _ in leaves(schema.root) if f"| `{key}` |" not in page] == []
        assert [key for key in schema.rules if f"| `{key}` |" not in page] == []
