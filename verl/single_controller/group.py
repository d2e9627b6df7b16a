"""The driver side: a group of worker processes, called together."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from verl.single_controller.cluster import Placement, why_dead
from verl.single_controller.placement import Node
from verl.single_controller.worker import WorkerFailure, WorkerShell

log = logging.getLogger(__name__)

_PROCESS_GRACE, _NODE_GRACE = 10.0, 45.0  # seconds for Ray to find a dead process, or node, after a peer's failure
_VERDICT = 30.0  # seconds for Ray to say that the node of a dead process is gone
_LOST_PEER = r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|DistNetworkError|DistBackendError"
_SAY_EVERY = 30.0  # seconds between "still waiting" lines


class WorkerError(RuntimeError):
    """A worker failed or died. The message names group, rank and phase, and holds the worker's traceback if any."""


class WorkerDiedError(WorkerError):
    """A worker's process, or its whole node, is gone."""


class UserError(WorkerError, ValueError):
    """A worker refused something that the user can fix; its traceback is in the log at level DEBUG."""


def unwrap(value: Any) -> Any:
    """A worker's result. Raises the error that a `WorkerFailure` stands for."""
    if not isinstance(value, WorkerFailure):
        return value
    where = f"{value.group} rank {value.rank}, phase {value.phase!r}"
    if value.user_error:
        log.debug("%s\n%s", where, value.trace)
        raise UserError(f"{where}: {value.error}")
    raise WorkerError(f"{where}: {value.error}\n{value.trace}")


@dataclass(frozen=True)
class Call:
    """A call under way. Its `ref` may be an argument of another call, which then waits for it."""

    group: str
    rank: int
    phase: str
    ref: Any
    node: Node | None = None
    """Where the rank runs; None where all are on one node."""

    def __str__(self) -> str:
        """E.g. `actor rank 3 on node 10.0.0.2 (Ray node ab12cd34)`."""
        return f"{self.group} rank {self.rank}" + ("" if self.node is None else f" on node {self.node}")


class WorkerGroup:
    """Equal workers of one kind, rank i where the placement puts it.

    Every wait is bounded by `timeout` seconds and says every 30 s what it waits for.
    """

    several_nodes = False
    """Whether ranks of this group are on different nodes."""

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
        self._bundles = bundles
        self.several_nodes = len(bundles.nodes) > 1
        shell = ray.remote(WorkerShell)
        self.shells = [
            shell.options(
                num_cpus=0,
                num_gpus=gpus,
                scheduling_strategy=bundles.of_rank(rank),
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
            ).remote(name, rank, threads, os.getcwd(), self.several_nodes)
            for rank in range(size)
        ]

    def _node(self, rank: int) -> Node | None:
        return self._bundles.node_of(rank) if self.several_nodes else None

    def build(self, factory: Any, per_rank: Sequence[Sequence[Any]]) -> None:
        """Make every worker from `factory(*per_rank[rank])`."""
        refs = [s.build.remote(factory, *args) for s, args in zip(self.shells, per_rank, strict=True)]
        self._collect("start", refs)

    def rendezvous(self, rank: int = 0) -> tuple[str, int]:
        """Address of a rank for torch.distributed."""
        return self._collect("address", [self.shells[rank].address.remote()])[0]

    def pids(self) -> list[int]:
        return self._collect("pid", [s.pid.remote() for s in self.shells])

    def gpu_bytes(self) -> int:
        """Memory of the smallest GPU of this group."""
        return min(self._collect("look at the GPU", [s.gpu_bytes.remote() for s in self.shells]))

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

    def submit(self, rank: int, method: str, *args: Any) -> Call:
        """Begin a call on one rank; arguments may be `Call.ref`s. A rank's calls run in the order they were begun."""
        return Call(self.name, rank, method, self.shells[rank].call.remote(method, *args), self._node(rank))

    def gather(self, calls: Sequence[Call]) -> list[Any]:
        """Results in order. `calls` stand in the order of cause and effect, of any groups.

        The first failure ends the wait, because other ranks may hang in a collective for ever; of several it is the
        earliest in `calls`, because those that wait for a failed call fail with it.
        """
        begin = time.monotonic()
        places = {call.ref: place for place, call in enumerate(calls)}
        results: dict[int, Any] = {}
        while places:
            done, _ = ray.wait(list(places), num_returns=1, timeout=_SAY_EVERY)
            if done:
                done, _ = ray.wait(list(places), num_returns=len(places), timeout=0)
            for place in sorted(places.pop(ref) for ref in done):
                try:
                    results[place] = _result(calls[place])
                except WorkerError as error:
                    left = [calls[other] for other in sorted(places.values())]
                    raise self._cause(error, left, calls[place].phase) from error.__cause__
            waited = time.monotonic() - begin
            if places and not done:
                log.warning("waiting for %s: %d of %d calls done after %.0f s",
                            _missing(calls, places.values()), len(results), len(calls), waited)  # fmt: skip
            if places and waited > self.timeout:
                raise WorkerError(f"{_missing(calls, places.values())}: no answer in {waited:.0f} s")
        return [results[place] for place in range(len(calls))]

    def _cause(self, error: WorkerError, left: Sequence[Call], phase: str) -> WorkerError:
        """The death that a broken connection stands for, if one becomes known in time; else `error` itself.

        A rank that loses its peer fails at once; Ray takes some seconds to find that a process is gone, and up to
        half a minute to give up a node. `left`: calls under way.
        """
        if isinstance(error, WorkerDiedError | UserError) or not is_broken_connection(str(error)):
            return error
        # The rank that died may have had no call under way: the others are asked too.
        asked = [Call(self.name, r, phase, s.pid.remote(), self._node(r)) for r, s in enumerate(self.shells)]
        open_calls = {call.ref: call for call in (*left, *asked)}
        end = time.monotonic() + (_NODE_GRACE if self.several_nodes else _PROCESS_GRACE)
        while open_calls and time.monotonic() < end:
            done, _ = ray.wait(list(open_calls), num_returns=1, timeout=1.0)
            for call in (open_calls.pop(ref) for ref in done):
                try:
                    _result(call)
                except WorkerDiedError as death:
                    return death
                except WorkerError:
                    log.debug("%s lost its peer too", call)
        return error

    def _collect(self, phase: str, refs: list[Any]) -> list[Any]:
        """Results in rank order."""
        return self.gather([Call(self.name, rank, phase, ref, self._node(rank)) for rank, ref in enumerate(refs)])

    def kill(self) -> None:
        """End the processes of this group."""
        for shell in self.shells:
            ray.kill(shell, no_restart=True)


def _result(call: Call) -> Any:
    try:
        value = ray.get(call.ref)
    except RayActorError as error:
        raise WorkerDiedError(f"{call} died during {call.phase!r}: {error}{_fate(call.node)}") from error
    except RayError as error:
        raise WorkerError(f"{call}, phase {call.phase!r}: {error}") from error
    return unwrap(value)


def _fate(node: Node | None) -> str:
    """Whether the node went with the process, which Ray says some time after its processes are gone; "" on one node."""
    if node is None:
        return ""
    end = time.monotonic() + _VERDICT
    while time.monotonic() < end:
        reason = why_dead(node)
        if reason is not None:
            return f"\nThe node is lost ({reason}). Start the run again when it is back, or on fewer nodes."
        time.sleep(0.5)
    return "\nThe node itself is alive: its log has the reason."


def is_broken_connection(text: str) -> bool:
    """Whether an error of torch.distributed tells that the other end went away."""
    return re.search(_LOST_PEER, text, re.IGNORECASE) is not None


def _missing(calls: Sequence[Call], places: Iterable[int]) -> str:
    """E.g. `actor.update (ranks 0, 3)`, of the earliest phase that is not done."""
    first = calls[min(places)]
    ranks = sorted({calls[p].rank for p in places if (calls[p].group, calls[p].phase) == (first.group, first.phase)})
    return f"{first.group}.{first.phase} (ranks {', '.join(map(str, ranks))})"
