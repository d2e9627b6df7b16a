"""How a bucket's bytes get from an actor process to a rollout process.

`mapped` (colocated): two buckets that both processes map, through CUDA IPC on a GPU and a memory file on a CPU;
nothing is copied on the way. Who may touch which bucket when is decided by the driver's order of calls (`sync`).
`broadcast` (split): actor rank 0 broadcasts to every rollout rank, NCCL on GPUs and gloo on CPUs; both ends have two
buckets of their own, so that the next one is filled, or on its way, while the last is still loaded.

All waits for the device are on the host: when a call returns, the bytes it promises are there for any process.
CUDA parts run on torch 2.11; memory with `expandable_segments` cannot be exported by every driver.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from verl.workers.runtime import rendezvous_store

_JOIN_TIMEOUT = timedelta(minutes=10)
_TRANSFER_TIMEOUT = timedelta(minutes=30)


def wait_for_device(device: torch.device) -> None:
    """Until everything that this process queued on the current stream is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@dataclass(frozen=True)
class MappedHandle:
    """What another process on the same device or node needs to map both buckets."""

    place: str
    """UUID of the GPU, or a path to the sender's open file."""
    host: str
    """See `host_identity`."""
    cuda: tuple[Any, ...] | None
    """Arguments of torch's rebuild function; None on a CPU."""


@dataclass(frozen=True)
class Meeting:
    """Where the ends of a broadcast meet: an address on the sender's node, and how many receivers come."""

    host: str
    port: int
    receivers: int


class SendEnd(Protocol):
    """The actor's end."""

    def bucket(self, index: int) -> Tensor:
        """The flat memory (size,) to write bucket `index` to."""
        ...

    def post(self, index: int) -> None:
        """Bucket `index` is written: let it go."""
        ...


class ReceiveEnd(Protocol):
    """The rollout's end."""

    def bucket(self, index: int) -> Tensor:
        """Bucket `index` as it was sent, (size,). Valid until `release`."""
        ...

    def release(self, index: int) -> None:
        """Bucket `index` is loaded: wait until the device has read it."""
        ...


class Scratch:
    """The end of a rank that takes part in gathering but sends nothing."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._sizes = sizes
        self._flat = torch.empty(max(sizes), dtype=dtype, device=device)

    def bucket(self, index: int) -> Tensor:
        return self._flat[: self._sizes[index]]

    def post(self, index: int) -> None:
        """Nobody reads it."""


class MappedSendEnd:
    """Two buckets for another process to map."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._sizes, self._device, largest = sizes, device, max(sizes)
        if device.type == "cuda":
            self._flat = torch.empty(2, largest, dtype=dtype, device=device)
            _, arguments = reduce_tensor(self._flat)
            self.handle = MappedHandle(gpu_uuid(device), host_identity(), arguments)
        else:
            # Memory without a name: nothing is left behind however the processes end, and /dev/shm may be small.
            self._file = os.fdopen(os.memfd_create("timemaster-weights"), "r+b", buffering=0)
            self._file.truncate(2 * largest * dtype.itemsize)
            path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
            self._flat = _map_file(path, largest, dtype)
            self.handle = MappedHandle(path, host_identity(), None)

    def bucket(self, index: int) -> Tensor:
        return self._flat[index % 2, : self._sizes[index]]

    def post(self, index: int) -> None:
        wait_for_device(self._device)


class MappedReceiveEnd:
    """The other process's two buckets. Raises RuntimeError when this process cannot map them."""

    def __init__(self, handle: MappedHandle, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._sizes, self._device = sizes, device
        check_same_place(handle, host_identity(), gpu_uuid(device) if handle.cuda is not None else None)
        if handle.cuda is not None:
            self._flat = rebuild_cuda_tensor(*handle.cuda)
        else:
            self._flat = _map_file(handle.place, max(sizes), dtype)

    def bucket(self, index: int) -> Tensor:
        return self._flat[index % 2, : self._sizes[index]]

    def release(self, index: int) -> None:
        wait_for_device(self._device)


def check_same_place(handle: MappedHandle, host: str, gpu: str | None) -> None:
    """Raises RuntimeError unless a process on `host` (and `gpu`) can map what the handle's sender holds.

    A path under /proc means another process, or nothing, on any other host.
    """
    if handle.host != host:
        raise RuntimeError(
            f"the actor of this rank is on host {handle.host}, this rollout on {host}: they cannot share memory. Ray "
            "must place both on one node, in one container (actor_rollout_ref.hybrid_engine=False lets them be apart)"
        )
    if gpu is not None and gpu != handle.place:
        raise RuntimeError(f"the actor of this rank is on GPU {handle.place}, this rollout on GPU {gpu}")


def host_identity() -> str:
    """Names the running kernel and this process's view of process ids: equal where /proc paths mean the same."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}/{boot[:8]}/{os.readlink('/proc/self/ns/pid')}"


def gpu_uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _map_file(path: str, size: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(path, shared=True, size=2 * size, dtype=dtype).view(2, size)


class _Broadcasts:
    """A process group of the sender (rank 0) and every receiver, beside those that torch.distributed knows.

    A wait orders the device's stream after the broadcast; with gloo it blocks.
    """

    def __init__(
        self, meeting: Meeting, rank: int, sizes: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._sizes = sizes
        self._flat = torch.empty(2, max(sizes), dtype=dtype, device=device)
        self._running: dict[int, dist.Work] = {}
        world = 1 + meeting.receivers
        # Kept: the group asks the store again when it connects, which is at the first broadcast.
        self._store = rendezvous_store((meeting.host, meeting.port))
        self._store.set_timeout(_JOIN_TIMEOUT)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = _TRANSFER_TIMEOUT
            self._group = dist.ProcessGroupNCCL(self._store, rank, world, options)
        else:
            self._group = dist.ProcessGroupGloo(self._store, rank, world, _TRANSFER_TIMEOUT)

    def flat(self, index: int) -> Tensor:
        return self._flat[index % 2, : self._sizes[index]]

    def start(self, index: int) -> None:
        self._running[index % 2] = self._group.broadcast([self.flat(index)])

    def wait(self, index: int) -> None:
        """For the last broadcast from or to the memory of bucket `index`, if one is under way."""
        work = self._running.pop(index % 2, None)
        if work is not None:
            work.wait()


class BroadcastSendEnd(_Broadcasts):
    """Rank 0: fills one bucket while the other is on its way."""

    def __init__(self, meeting: Meeting, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(meeting, 0, sizes, dtype, device)

    def bucket(self, index: int) -> Tensor:
        self.wait(index)
        return self.flat(index)

    def post(self, index: int) -> None:
        self.start(index)


class BroadcastReceiveEnd(_Broadcasts):
    """One receiver: the next bucket is on its way while one is loaded."""

    def __init__(
        self, meeting: Meeting, receiver: int, sizes: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(meeting, 1 + receiver, sizes, dtype, device)
        self._device = device

    def bucket(self, index: int) -> Tensor:
        if index == 0:
            self.start(0)
        self.wait(index)
        if index + 1 < len(self._sizes):
            self.start(index + 1)
        return self.flat(index)

    def release(self, index: int) -> None:
        wait_for_device(self._device)
