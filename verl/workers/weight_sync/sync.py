"""The driver's end of a transfer: which call waits for which.

Invariants
- Bucket i + 2 lies where bucket i lay: a mapped one is filled only after every engine that reads it has loaded i.
- A bucket is loaded only after it is full.
- Nobody polls and the driver sends no bytes: a call waits for another by taking its result as an argument.
- Whatever fails first, in the order of cause and effect, is what the error names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.single_controller.group import Call, WorkerGroup
from verl.workers.weight_sync.channels import Meeting
from verl.workers.weight_sync.sender import Offer, Passed, Transport


def choose_transport(*, colocated: bool) -> Transport:
    """Memory that both processes map where they share a GPU (or a node, on CPU), else a broadcast."""
    return "mapped" if colocated else "broadcast"


@dataclass(frozen=True)
class Synced:
    """One transfer."""

    nbytes: int
    """Bytes of the model's weights that every rollout rank received."""
    checked: bool
    """Whether both ends compared checksums."""


class WeightSync:
    """Brings the actor's present weights into every rollout engine. Made once per run: names are checked, memory taken.

    Rank r of the rollout hears rank r of the actor (mapped), or rank 0 (broadcast).
    """

    def __init__(self, actors: WorkerGroup, rollouts: WorkerGroup, transport: Transport) -> None:
        self._actors, self._rollouts, self._transport = actors, rollouts, transport
        offers: list[Offer] = actors.all("weights.offer", transport)
        self.plan = offers[0].plan
        if transport == "mapped":
            assert actors.size == rollouts.size, f"{actors.size} actor ranks, {rollouts.size} rollout ranks"
            rollouts.each("weights.connect", [(offer, rank, None) for rank, offer in enumerate(offers)])
        else:
            meeting = Meeting(*actors.rendezvous(), receivers=rollouts.size)
            joins = [(meeting if rank == 0 else None,) for rank in range(actors.size)]
            calls = self._calls(actors, "weights.join", joins)
            calls += self._calls(rollouts, "weights.connect", [(offers[0], r, meeting) for r in range(rollouts.size)])
            rollouts.gather(calls)

    def __call__(self, *, with_checksum: bool) -> Synced:
        """One transfer. Raises WorkerError naming the rank and the phase that failed first."""
        calls = self._calls(self._rollouts, "weights.begin", [()] * self._rollouts.size)
        takes: list[list[Call]] = []
        for index in range(len(self.plan.buckets)):
            sends = self._calls(self._actors, "weights.send", self._send_arguments(index, with_checksum, takes))
            takes.append(self._calls(self._rollouts, "weights.take", self._take_arguments(index, with_checksum, sends)))
            calls += sends + takes[-1]
        calls += self._calls(self._rollouts, "weights.end", [()] * self._rollouts.size)
        self._compare([value for value in self._rollouts.gather(calls) if isinstance(value, Passed)])
        return Synced(self.plan.nbytes, with_checksum)

    def _send_arguments(self, index: int, with_checksum: bool, takes: list[list[Call]]) -> list[tuple[Any, ...]]:
        plain = (index, with_checksum)
        if self._transport == "broadcast" or index < 2:
            return [plain] * self._actors.size
        return [(*plain, take.ref) for take in takes[index - 2]]

    def _take_arguments(self, index: int, with_checksum: bool, sends: list[Call]) -> list[tuple[Any, ...]]:
        plain = (index, with_checksum)
        if self._transport == "broadcast":  # both ends must be in it at once
            return [plain] * self._rollouts.size
        return [(*plain, send.ref) for send in sends]

    @staticmethod
    def _calls(group: WorkerGroup, method: str, per_rank: list[tuple[Any, ...]]) -> list[Call]:
        return [group.submit(rank, method, *arguments) for rank, arguments in enumerate(per_rank)]

    def _compare(self, passed: list[Passed]) -> None:
        for bucket, index in zip(self.plan.buckets, range(len(self.plan.buckets)), strict=True):
            sums = {p.checksum for p in passed if p.index == index}
            assert len(sums) == 1, f"bucket {index} ({bucket}) has other bits at its ends: checksums {sorted(sums)}"
