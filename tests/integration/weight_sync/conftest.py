"""One Ray for the tests of transfers between processes, and the simulated workers of the unit tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

UNIT = Path(__file__).resolve().parents[2] / "unit" / "weight_sync"
sys.path.insert(0, str(UNIT))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import process_workers
    import simulated

    mine = not ray.is_initialized()
    if mine:
        ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level=40, log_to_driver=False)
    modules = (process_workers, simulated)
    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)
    yield
    for module in modules:
        ray.cloudpickle.unregister_pickle_by_value(module)
    if mine:
        ray.shutdown()
