"""What every worker process needs first: device, precision, process group, model folder."""

from __future__ import annotations

import ctypes
import importlib
import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(name: str) -> str:
    """`auto` is cuda where there is one. Raises ValueError when cuda is asked for and absent."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("trainer.device=cuda but this machine has no CUDA device: use trainer.device=cpu or auto")
    return ("cuda" if available else "cpu") if name == "auto" else name


def dtype_of(name: str) -> torch.dtype:
    """The precision of a name as the config writes it."""
    return _DTYPES[name]


def compute_dtype(name: str, device: str) -> torch.dtype:
    """The named precision; on CPU always fp32, where half precision is slower and its kernels are incomplete."""
    return torch.float32 if device == "cpu" else dtype_of(name)


def seed_draws(*key: int) -> None:
    """Make the global generators of python, numpy and torch a function of `key` (non-negative integers).

    Our own noise has generators of its own; this is for code that is not ours: external_lib, reward functions.
    """
    python, numpy_seed, torch_seed = (int(word) for word in np.random.SeedSequence(key).generate_state(3))
    random.seed(python)
    np.random.seed(numpy_seed)
    torch.manual_seed(torch_seed)


_TIMEOUT = timedelta(minutes=30)
_opened: dict[tuple[str, int], dist.TCPStore] = {}


def open_rendezvous(host: str) -> tuple[str, int]:
    """Listen in this process, which will be rank 0, on a port that the system gives: nobody can take it meanwhile.

    A library that opens the store at this address itself (torchrun's `env://`) gets the same server, so that a rank
    that came first is not cut off.
    """
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT, multi_tenant=True)
    _opened[host, store.port] = store
    return host, store.port


def rendezvous_store(address: tuple[str, int]) -> dist.TCPStore:
    """The store at an address of `open_rendezvous`: of this process if it opened it, else a client."""
    return _opened.pop(address, None) or dist.TCPStore(*address, is_master=False, timeout=_TIMEOUT)


def start_process_group(rank: int, world: int, address: tuple[str, int], device: str) -> None:
    """Join the group of `world` ranks that meets at an address which rank 0 got from `open_rendezvous`."""
    store = rendezvous_store(address)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(0)  # Ray shows each worker its own GPU only
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_TIMEOUT)


def start_process_group_from_env(device: str) -> tuple[int, int]:
    """Join torchrun's group, or be the only rank when not under torchrun. Returns (rank, world size)."""
    if "RANK" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    else:
        start_process_group(0, 1, open_rendezvous("127.0.0.1"), device)
    return dist.get_rank(), dist.get_world_size()


@contextmanager
def node_leader_first() -> Iterator[None]:
    """The first rank of each node runs the block before the others do, so that they find what it has cached."""
    leader = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if not leader:
        dist.barrier()
    yield
    if leader:
        dist.barrier()


def all_gather_objects(value: Any) -> list[Any]:
    """The value of every rank, in rank order. For small things between ranks that trust each other."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def build_mesh(device: str, fsdp_size: int) -> DeviceMesh:
    """One shard group over all ranks, or replicas of shard groups of `fsdp_size` ranks (HSDP)."""
    world = dist.get_world_size()
    if fsdp_size in (-1, world):
        return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (world // fsdp_size, fsdp_size), mesh_dim_names=("replicate", "shard"))


def import_external(name: str | None) -> None:
    """Import the module of `model.external_lib`, which may register things, before the model is built."""
    if name is not None:
        importlib.import_module(name)


def give_back_large_blocks(threshold: int = 1 << 20) -> None:
    """Let glibc map every host block of `threshold` bytes and more on its own, so that freeing it returns its memory.

    By default the first freed block raises that limit up to 32 MiB, and images then come from the heap, where small
    blocks that live on keep the holes between them: a rollout process that sees 200 MB of patches a step grew by 150 MB
    a step. Not for CPU models: each of their intermediate tensors would be mapped anew. Other C libraries are left as
    they are. See mallopt(3), M_MMAP_THRESHOLD.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        mmap_threshold = -3
        assert libc.mallopt(mmap_threshold, threshold) == 1, f"mallopt refused a threshold of {threshold}"


def memory_metrics(device: str) -> dict[str, float]:
    """Memory in GiB: of this process on the host (peak, and where Linux tells it now), on its GPU (peak allocated and
    reserved by this process, in use by all processes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux reports KiB
    metrics = {"perf/cpu_memory_used_gb": peak}
    pages = Path("/proc/self/statm")
    if pages.is_file():
        metrics["perf/cpu_memory_resident_gb"] = int(pages.read_text().split()[1]) * resource.getpagesize() / 2**30
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        metrics["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / 2**30
        metrics["perf/max_memory_reserved_gb"] = torch.cuda.max_memory_reserved() / 2**30
        metrics["perf/gpu_memory_in_use_gb"] = (total - free) / 2**30
    return metrics
