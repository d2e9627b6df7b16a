"""Optimizer state leaves the GPU between updates, and the numbers do not change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import model_fixtures
import pytest
import torch
import torch.distributed as dist
from model_fixtures import WIDE, Maker, open_policy, patch_source
from torch import Tensor
from torch.distributed.tensor import DTensor

from verl.utils.checkpoint.sharded import optimizer_state
from verl.workers.actor.engine import PackedRunner, ShardSpec, TrainEngine, full_parameters, shard
from verl.workers.actor.objective import SFTObjective
from verl.workers.actor.optim import OptimSpec
from verl.workers.runtime import build_mesh

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SPEC = OptimSpec(
    lr=1e-3,
    betas=(0.9, 0.999),
    weight_decay=0.01,
    clip_grad=1.0,
    warmup_steps=0,
    total_steps=10,
    style="constant",
    min_lr_ratio=0.0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_fixtures.write_tiny(tmp_path_factory.mktemp("cuda") / "tiny")


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def local(value: Tensor) -> Tensor:
    """The one rank's part, on the host."""
    return (value.to_local() if isinstance(value, DTensor) else value).cpu()


def trained(folder: Path, *, offload: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and optimizer state after two updates in bf16 with fp32 master weights."""
    spec = ShardSpec(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, offload=False)
    policy = shard(open_policy(folder), build_mesh("cuda", -1), spec)
    run = TrainEngine(PackedRunner(policy, patch_source(), torch.device("cuda"), 1.0), SPEC, offload_optimizer=offload)
    groups = [Maker(policy.config).group([4, 9, 1], WIDE)]
    for _ in range(2):
        run.step([groups], SFTObjective(), 14)
    return {n: v.cpu() for n, v in full_parameters(policy)}, optimizer_state(policy.hf, run.optimizer)


def test_state_is_on_the_host_between_updates_and_the_bits_are_the_same(folder: Path) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        (plain, on_gpu), (offloaded, on_host) = (trained(folder, offload=offload) for offload in (False, True))
    finally:
        torch.use_deterministic_algorithms(False)
    places = {name: value.device.type for name, value in on_host.items() if value.ndim}
    assert set(places.values()) == {"cpu"} and {v.device.type for v in on_gpu.values()} == {"cuda"}
    different = [name for name, value in plain.items() if not torch.equal(value, offloaded[name])]
    different += [name for name, value in on_gpu.items() if not torch.equal(local(value), local(on_host[name]))]
    assert different == []
