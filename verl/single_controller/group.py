"""The driver side: a group of worker processes, called together."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from verl.single_controller.cluster import Placement
from verl.single_controller.worker import WorkerFailure, WorkerShell

log = logging.getLogger(__name__)

_SAY_EVERY = 30.0  # seconds between "still waiting" lines


class WorkerError(RuntimeError):
    """A worker failed or died. The message names group, rank and phase, and holds the worker's traceback."""


class UserError(WorkerError, ValueError):
    """A worker refused something that the user can fix."""


def unwrap(value: Any) -> Any:
    """A worker's result. Raises the error that a `WorkerFailure` stands for."""
    if not isinstance(value, WorkerFailure):
        return value
    where = f"{value.group} rank {value.rank}, phase {value.phase!r}"
    kind = UserError if value.user_error else WorkerError
    raise kind(f"{where}: {value.error}\n{value.trace}")


class WorkerGroup:
    """Equal workers of one kind, rank i where the placement puts it.

    Every wait is bounded by `timeout` seconds and says every 30 s what it waits for.
    """

    def __init__(
        self,
        name: str,
        *,
        bundles: Placement,
        size: int,
        gpus: float,
        threads: int,
        timeout: float,
    ) -> None:
        self.name, self.size, self.timeout = name, size, timeout
        shell = ray.remote(WorkerShell)
        self.shells = [
            shell.options(
                num_cpus=0,
                num_gpus=gpus,
                scheduling_strategy=bundles.of_rank(rank),
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
            ).remote(name, rank, threads)
            for rank in range(size)
        ]

    def build(self, factory: Any, per_rank: Sequence[Sequence[Any]]) -> None:
        """Make every worker from `factory(*per_rank[rank])`."""
        refs = [s.build.remote(factory, *args) for s, args in zip(self.shells, per_rank, strict=True)]
        self._collect("start", refs)

    def rendezvous(self) -> tuple[str, int]:
        """Address of rank 0 for torch.distributed."""
        return self._collect("address", [self.shells[0].address.remote()])[0]

    def pids(self) -> list[int]:
        return self._collect("pid", [s.pid.remote() for s in self.shells])

    def all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """The same call on every rank; results in rank order."""
        return self.wait(self.start(method, [args] * self.size, **kwargs))

    def each(self, method: str, per_rank: Sequence[Sequence[Any]], **kwargs: Any) -> list[Any]:
        """A call with its own arguments for every rank; results in rank order."""
        return self.wait(self.start(method, per_rank, **kwargs))

    def start(self, method: str, per_rank: Sequence[Sequence[Any]], **kwargs: Any) -> tuple[str, list[Any]]:
        """Begin a call without waiting; give the result to `wait`."""
        assert len(per_rank) == self.size, f"{self.name}.{method}: {len(per_rank)} argument lists, {self.size} ranks"
        refs = [s.call.remote(method, *args, **kwargs) for s, args in zip(self.shells, per_rank, strict=True)]
        return method, refs

    def wait(self, started: tuple[str, list[Any]]) -> list[Any]:
        return self._collect(*started)

    def _collect(self, phase: str, refs: list[Any]) -> list[Any]:
        """Results in order. The first failure ends the wait: other ranks may hang in a collective for ever."""
        begin = time.monotonic()
        pending, results = list(refs), {}
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=_SAY_EVERY)
            for ref in done:
                results[ref] = self._result(phase, refs.index(ref), ref)
            waited = time.monotonic() - begin
            if not done:
                missing = [refs.index(ref) for ref in pending]
                log.warning(
                    "waiting for %s.%s: %d of %d ranks done after %.0f s (missing ranks %s)",
                    *(self.name, phase, len(results), len(refs), waited, missing),
                )
            if pending and waited > self.timeout:
                missing = [refs.index(ref) for ref in pending]
                raise WorkerError(f"{self.name}.{phase}: no answer from ranks {missing} in {waited:.0f} s")
        return [results[ref] for ref in refs]

    def _result(self, phase: str, rank: int, ref: Any) -> Any:
        try:
            value = ray.get(ref)
        except RayActorError as error:
            raise WorkerError(f"{self.name} rank {rank} died during {phase!r}: {error}") from error
        except RayError as error:
            raise WorkerError(f"{self.name} rank {rank}, phase {phase!r}: {error}") from error
        return unwrap(value)

    def kill(self) -> None:
        """End the processes of this group."""
        for shell in self.shells:
            ray.kill(shell, no_restart=True)
