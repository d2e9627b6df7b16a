"""A judge server for each test."""

from __future__ import annotations

from collections.abc import Iterator

import openai  # noqa: F401  (its import takes a second, which would count as waiting in the tests of time limits)
import pytest
from judge_server import JudgeServer


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as found:
        yield found


@pytest.fixture(autouse=True)
def no_key_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
