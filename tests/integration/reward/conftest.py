"""One Ray for the tests of the pool, and the judge server of the judge's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "judge"))


@pytest.fixture(scope="session", autouse=True)
def cluster() -> Iterator[None]:
    """Its processes know a key that the driver does not, as on a cluster that was there before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEY_OF_THE_NODE", "sk-known-to-the-node-alone")
        ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level=40, log_to_driver=False)
    yield
    ray.shutdown()
