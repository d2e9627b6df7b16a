"""Workers as threads: each runs its calls in order, and a call waits for the calls among its arguments, as in Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from verl.single_controller.group import Call, WorkerGroup, unwrap
from verl.single_controller.worker import WorkerFailure, WorkerShell
from verl.workers.rollout.base import RolloutEngine
from verl.workers.runtime import open_rendezvous
from verl.workers.weight_sync.receiver import WeightReceiver
from verl.workers.weight_sync.sender import WeightSender

CPU = torch.device("cpu")


class Threads(WorkerGroup):
    """A worker group of objects in threads of this process."""

    def __init__(self, name: str, workers: Sequence[Any]) -> None:
        self.name, self.size = name, len(workers)
        self._threads = [ThreadPoolExecutor(1) for _ in workers]
        self._shells = [WorkerShell(name, rank, 1) for rank in range(self.size)]
        for shell, worker in zip(self._shells, workers, strict=True):
            shell.worker = worker

    def rendezvous(self) -> tuple[str, int]:
        return open_rendezvous("127.0.0.1")

    def submit(self, rank: int, method: str, *args: Any) -> Call:
        def run() -> Any:
            ready = [a.result() if isinstance(a, Future) else a for a in args]
            return self._shells[rank].call(method, *ready)

        return Call(self.name, rank, method, self._threads[rank].submit(run))

    def gather(self, calls: Sequence[Call]) -> list[Any]:
        values = [call.ref.result(timeout=60) for call in calls]
        failed = [value for value in values if isinstance(value, WorkerFailure)]
        return [unwrap(value) for value in failed or values]

    def start(self, method: str, per_rank: Sequence[Sequence[Any]], **_: Any) -> tuple[str, list[Any]]:
        return method, [self.submit(rank, method, *args) for rank, args in enumerate(per_rank)]

    def wait(self, started: tuple[str, list[Any]]) -> list[Any]:
        return self.gather(started[1])


class Recording(RolloutEngine):
    """Keeps a copy of what it is given; `before_copy` is called with each name just before."""

    def __init__(self, before_copy: Callable[[str], None] = lambda name: None) -> None:
        self.before_copy = before_copy
        self.updates: list[dict[str, Tensor]] = []
        self.events: list[str] = []

    def begin_update(self) -> None:
        self.updates.append({})
        self.events.append("begin")

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, value in weights:
            self.before_copy(name)
            self.updates[-1][name] = value.clone()
        self.events.append("bucket")

    def end_update(self) -> None:
        self.events.append("end")

    def sleep(self, level: int) -> None:
        self.events.append(f"sleep {level}")

    def wake(self, tags: Sequence[str] | None = None) -> None:
        self.events.append(f"wake {tags}")


class Actor:
    """What the driver sees of an actor worker."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        max_bytes: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> None:
        self.weights = WeightSender(parameters, dtype=dtype, device=device, max_bytes=max_bytes)


class Rollout:
    """What the driver sees of a rollout worker."""

    def __init__(self, engine: Recording, expected: Mapping[str, Sequence[int]], device: torch.device = CPU) -> None:
        self.engine = engine
        self.weights = WeightReceiver(engine, expected, device)
        self.sleep, self.wake = engine.sleep, engine.wake


def parameters(count: int = 7, *, seed: int = 0) -> dict[str, Tensor]:
    """Matrices of 4 KiB each."""
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}.weight": torch.randn(32, 32, generator=generator) for i in range(count)}


def shapes(of: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in of.items()}
