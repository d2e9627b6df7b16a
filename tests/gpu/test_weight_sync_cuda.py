"""Transfers between two processes on CUDA: through IPC on one GPU, through NCCL on two."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "weight_sync"))

import cuda_workers
import ray
import simulated
from cuda_workers import COUNT, CudaActor, CudaRollout
from simulated import parameters

from verl.single_controller.cluster import Resources, reserve
from verl.single_controller.group import WorkerGroup
from verl.workers.weight_sync.sync import WeightSync

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level=40, log_to_driver=False)
    for module in (cuda_workers, simulated):
        ray.cloudpickle.register_pickle_by_value(module)
    yield
    ray.shutdown()


@pytest.mark.parametrize("max_bytes", [4 << 10, 24 << 10, 1 << 20])
@pytest.mark.parametrize("busy", [0, 2_000_000])
def test_weights_cross_two_processes_of_one_gpu_bit_for_bit_however_slow_the_reader(max_bytes: int, busy: int) -> None:
    bundles = reserve(Resources(1, 1, "cuda"), 120)
    transfer(bundles, bundles, 0.5, "mapped", max_bytes, busy)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("busy", [0, 2_000_000])
def test_weights_cross_two_gpus_bit_for_bit_however_slow_the_reader(busy: int) -> None:
    actor, rollout = (reserve(Resources(1, 1, "cuda"), 120) for _ in range(2))
    transfer(actor, rollout, 1.0, "broadcast", 4 << 10, busy)


def transfer(actor_on, rollout_on, share: float, transport: str, max_bytes: int, busy: int) -> None:
    options = {"size": 1, "gpus": share, "threads": 1, "timeout": 240.0}
    actor = WorkerGroup("actor", bundles=actor_on, **options)
    rollout = WorkerGroup("rollout", bundles=rollout_on, **options)
    try:
        actor.build(CudaActor, [(max_bytes,)])
        rollout.build(CudaRollout, [(busy,)])
        sync = WeightSync(actor, rollout, transport)
        for _ in range(3):
            assert sync(with_checksum=True).nbytes == COUNT * 2048
            actor.all("double")
        (seen,) = rollout.all("seen")
    finally:
        actor.kill()
        rollout.kill()
        for bundles in {id(b): b for b in (actor_on, rollout_on)}.values():
            ray.util.remove_placement_group(bundles.group)
    assert len(seen) == 3
    for number, update in enumerate(seen):
        for name, value in parameters(COUNT).items():
            expected = (value * 2**number).bfloat16().float()
            assert torch.equal(update[name], expected), f"update {number}: {name}"
