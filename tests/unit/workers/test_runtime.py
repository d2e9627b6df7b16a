"""What worker processes share: global generators, precision by name."""

from __future__ import annotations

import platform
import random
import socket
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from verl.workers.runtime import (
    compute_dtype,
    dtype_of,
    open_rendezvous,
    seed_draws,
    start_process_group,
)


@pytest.fixture(autouse=True)
def _generators_as_they_were() -> object:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def draws(*key: int) -> list[float]:
    seed_draws(*key)
    return [random.random(), float(np.random.random()), torch.rand(()).item()]


def test_the_global_generators_are_a_function_of_the_key() -> None:
    assert draws(1, 2) == draws(1, 2)
    different = [i for i, (a, b) in enumerate(zip(draws(1, 2), draws(1, 3), strict=True)) if a == b]
    assert different == [], "python, numpy and torch each differ between two steps"
    assert draws(1, 2) != draws(2, 2)


def test_precision_follows_the_name_and_on_cpu_is_fp32() -> None:
    assert [dtype_of(name) for name in ("fp32", "bf16", "float16")] == [torch.float32, torch.bfloat16, torch.float16]
    assert {compute_dtype(name, "cpu") for name in ("fp32", "bf16", "float16")} == {torch.float32}
    assert compute_dtype("bf16", "cuda") == torch.bfloat16


def test_the_port_of_the_rendezvous_is_taken_from_the_moment_it_is_named() -> None:
    address = open_rendezvous("127.0.0.1")
    with socket.socket() as rival, pytest.raises(OSError, match="in use"):
        rival.bind(address)
    start_process_group(0, 1, address, "cpu")
    try:
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    finally:
        dist.destroy_process_group()


def test_a_rank_that_comes_before_the_library_of_rank_0_opens_its_store_is_not_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host, port = open_rendezvous("127.0.0.1")
    early = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=20))
    early.set("who", "rank 1")
    for name, value in {"MASTER_ADDR": host, "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=20)))
    assert store.get("who") == b"rank 1"
    store.set("answer", "rank 0")
    assert early.get("answer") == b"rank 0"


_CHURN = """
import sys
import torch
from verl.workers.runtime import give_back_large_blocks

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

if sys.argv[1] == "called":
    give_back_large_blocks()
block = torch.ones(4_000_000)  # 16 MB; freed, it moves glibc's limit to its size
del block
before, small = resident(), []
large = []
for _ in range(64):
    large.append(torch.ones(800_000))  # 3 MB
    small.append([bytearray(2000) for _ in range(20)])  # these live on, between the large ones (512 bytes: malloc)
large.clear()
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="states how glibc keeps memory")
def test_freed_large_blocks_leave_the_process_though_small_ones_lie_between() -> None:
    def kept(how: str) -> int:
        command = [sys.executable, "-c", _CHURN, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert kept("left") > 100, "glibc returned the blocks by itself: the call is not needed any more"
    assert kept("called") < 20
