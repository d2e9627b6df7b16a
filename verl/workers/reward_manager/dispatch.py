"""Deals answers to scoring workers and brings their scores back (asyncio; no Ray, no process of its own).

Invariants
- Every submitted answer gets exactly one score, whatever order answers arrive and finish in.
- An answer that hangs or kills its worker fails alone: what shared the worker with it is scored again, one at a time,
  and only an answer that was alone when its worker was lost is failed. The same for one whose plain call got no
  turn beside another's (`FailureKind.STARVED`): it is scored once more.
- The clock of an answer starts when a worker that is ready takes it, not when it was submitted.
- A worker that waits for many answers at once and stands still for `silent_s` is lost, however long they may wait: a
  call in it blocks its event loop or holds the interpreter. One that carries calls which outlived their limit is
  replaced as soon as it is idle, and takes nothing until then.
- A traceback is reported once, however many workers saw it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from verl.protocol import Prompt, Score
from verl.utils.reward_score.returns import FailureKind, failed, kind_of_reason
from verl.workers.reward_manager.manager import RewardItem

Place = tuple[int, int]
"""(prompt, answer) within a ticket."""


class Answer(NamedTuple):
    """One finished answer: its place, its text and its length in tokens, None where nobody counted."""

    prompt: int
    answer: int
    text: str
    tokens: int | None


PackedScore = tuple[float | None, Mapping[str, float], str | None, str | None, Mapping[str, Any]]
"""The fields of a `Score`, which cross processes ten times faster than the object."""


@dataclass(frozen=True)
class Scored:
    """What a worker returns: scores in the order of the items, its own seconds, and what a person should read."""

    scores: Sequence[Score | PackedScore]
    seconds: float
    notes: list[str]
    worn: bool = False
    """Calls that outlived their limit still run in the worker."""


class WorkerLostError(Exception):
    """The worker's process is gone."""


class ScoringWorker(Protocol):
    """One process that scores."""

    async def score(self, items: Sequence[RewardItem]) -> Scored:
        """Raises WorkerLostError when the process died."""
        ...

    async def beat(self) -> bool:
        """Returns as soon as its event loop turns: whether calls that outlived their limit still run in it.

        Asked only where the plan has `silent_s`. Raises WorkerLostError when the process died.
        """
        ...

    def kill(self) -> None:
        """End the process now, whatever it does."""
        ...


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """How a pool works. `limit_s` is the longest one call may take; None: calls end by themselves."""

    workers: int
    waiting: bool
    """Calls wait for something else, so a worker takes many at once; otherwise one call after the other."""
    limit_s: float | None
    silent_s: float | None = None
    """How long a waiting worker may stand still; None: nobody asks."""
    reason: str = "the reward function"
    in_flight: int = 64
    """Answers that one worker may wait for at once."""
    chunk_s: float = 0.05
    """Cheap answers are sent in batches of about this many seconds of work."""
    longest_chunk: int = 1024

    @property
    def target_s(self) -> float:
        return self.chunk_s if self.limit_s is None else min(self.chunk_s, self.limit_s / 4)


@dataclass(frozen=True, slots=True)
class _Job:
    ticket: int
    place: Place
    item: RewardItem


@dataclass(eq=False)
class _Slot:
    """A worker's place; its worker is replaced when lost."""

    worker: ScoringWorker | None = None
    load: int = 0
    alone: bool = False
    silent: bool = False
    """Killed because it stood still."""
    worn: bool = False
    """To be replaced once it is idle."""


@dataclass
class _Ticket:
    prompts: Sequence[Prompt]
    scores: dict[Place, Score | PackedScore] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    busy_s: float = 0.0
    before: int = 0
    replaced: int = 0


@dataclass(frozen=True)
class Collected:
    """All scores of a ticket by place, what a person should read, and the pool's own numbers."""

    scores: dict[Place, Score | PackedScore]
    notes: list[str]
    metrics: dict[str, float]


class Dispatcher:
    """Lives in one event loop. `spawn` starts a worker and returns when it is ready."""

    def __init__(self, spawn: Callable[[], Awaitable[ScoringWorker]], plan: DispatchPlan) -> None:
        self._spawn, self._plan = spawn, plan
        self._slots = [_Slot() for _ in range(plan.workers)]
        self._queue: deque[_Job] = deque()
        self._suspects: deque[_Job] = deque()
        self._tickets: dict[int, _Ticket] = {}
        self._next_ticket = 0
        self._seconds: float | None = None  # one answer's work, a running mean
        self._tasks: set[asyncio.Task[None]] = set()
        self._notes: dict[str, bool] = {}  # text -> reported
        self._busy_since: float | None = None
        self._broken: BaseException | None = None

    async def start(self) -> None:
        """Start all workers; returns when they are ready."""
        await asyncio.gather(*(self._fill(slot) for slot in self._slots))

    def open(self, prompts: Sequence[Prompt]) -> int:
        """A new ticket for answers to these prompts."""
        self._next_ticket += 1
        self._tickets[self._next_ticket] = _Ticket(prompts)
        return self._next_ticket

    def submit(self, ticket: int, answers: Iterable[tuple[int, int, str, int | None]]) -> None:
        """Queue finished answers (the fields of `Answer`) of an open ticket."""
        prompts = self._tickets[ticket].prompts
        for prompt, answer, text, tokens in answers:
            self._queue.append(_Job(ticket, (prompt, answer), RewardItem(prompts[prompt], text, tokens)))
        self._pump()

    def progress(self, ticket: int) -> int:
        """Answers scored so far."""
        return len(self._tickets[ticket].scores)

    async def collect(self, ticket: int, count: int) -> Collected:
        """Wait for `count` scores and close the ticket. Raises what made scoring impossible, if anything did."""
        found = self._tickets[ticket]
        found.before = len(found.scores)
        while len(found.scores) < count and self._broken is None:
            found.changed.clear()
            await found.changed.wait()
        if self._broken is not None:
            raise self._broken
        assert len(found.scores) == count, f"ticket {ticket}: {len(found.scores)} scores, {count} expected"
        del self._tickets[ticket]
        metrics = {
            "reward/pool/busy_s": found.busy_s,
            "reward/pool/before_end_share": found.before / max(count, 1),
            "reward/pool/workers_replaced": float(found.replaced),
        }
        notes = [text for text, reported in self._notes.items() if not reported]
        self._notes.update(dict.fromkeys(notes, True))
        return Collected(found.scores, notes, metrics)

    def close(self) -> None:
        """End all workers."""
        for task in self._tasks:
            task.cancel()
        for slot in self._slots:
            if slot.worker is not None:
                slot.worker.kill()

    def _task(self, work: Awaitable[None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception as error:
                self._broken = error
                for ticket in self._tickets.values():
                    ticket.changed.set()

        task = asyncio.get_running_loop().create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fill(self, slot: _Slot) -> None:
        slot.worker = worker = await self._spawn()
        if self._plan.silent_s is not None:
            self._task(self._listen(slot, worker, self._plan.silent_s))
        self._pump()

    async def _listen(self, slot: _Slot, worker: ScoringWorker, limit_s: float) -> None:
        """Replace the worker where it stands still or is worn."""
        while slot.worker is worker:
            try:
                async with asyncio.timeout(limit_s):
                    worn = await worker.beat()
            except (TimeoutError, WorkerLostError) as error:
                if slot.worker is worker and slot.load:
                    slot.silent = isinstance(error, TimeoutError)
                    worker.kill()  # ends its calls, and `_lost` learns which answers it had
                elif slot.worker is worker:
                    self._replace(slot, worker)
                return
            if slot.worker is worker:
                slot.worn = worn
                if worn and slot.load == 0:
                    self._replace(slot, worker)
            await asyncio.sleep(limit_s / 4)

    def _replace(self, slot: _Slot, worker: ScoringWorker) -> None:
        worker.kill()
        slot.worker, slot.silent, slot.worn = None, False, False
        for ticket in self._tickets.values():
            ticket.replaced += 1
        self._task(self._fill(slot))

    def _pump(self) -> None:
        """Give every worker with room its next chunk."""
        for slot in self._slots:
            while slot.worker is not None and (jobs := self._take(slot)):
                slot.load += len(jobs)
                self._watch_clock()
                self._task(self._run(slot, slot.worker, jobs))

    def _take(self, slot: _Slot) -> list[_Job]:
        if slot.alone or slot.worn:
            return []
        if self._suspects and slot.load == 0:
            slot.alone = True
            return [self._suspects.popleft()]
        room = (
            self._plan.in_flight - slot.load if self._plan.waiting else (0 if slot.load else self._plan.longest_chunk)
        )
        fair = math.ceil(len(self._queue) / len(self._slots))
        wanted = 1 if self._seconds is None else int(self._plan.target_s / max(self._seconds, 1e-9))
        size = min(room, fair, max(1, wanted), self._plan.longest_chunk)
        return [self._queue.popleft() for _ in range(size)]

    async def _run(self, slot: _Slot, worker: ScoringWorker, jobs: list[_Job]) -> None:
        try:
            async with asyncio.timeout(self._plan.limit_s):
                scored = await worker.score([job.item for job in jobs])
        except (TimeoutError, WorkerLostError) as error:
            self._lost(slot, worker, jobs, error)
            return
        each = scored.seconds / len(jobs)
        self._seconds = each if self._seconds is None else 0.7 * self._seconds + 0.3 * each
        for note in scored.notes:
            self._notes.setdefault(note, False)
        alone = slot.alone
        slot.worn |= scored.worn and slot.worker is worker
        self._release(slot, jobs)
        for job, score in zip(jobs, scored.scores, strict=True):
            if not alone and _got_no_turn(score):
                self._suspects.append(job)
            else:
                self._settle(job, score)
        self._pump()

    def _lost(self, slot: _Slot, worker: ScoringWorker, jobs: list[_Job], error: Exception) -> None:
        alone, silent = slot.worker is worker and slot.load == 1, slot.silent
        if slot.worker is worker:
            self._replace(slot, worker)
        self._release(slot, jobs)
        if alone:
            self._settle(jobs[0], self._failure(error, silent))
        else:
            self._suspects.extend(jobs)
        self._pump()

    def _failure(self, error: Exception, silent: bool) -> Score:
        if silent:
            return failed(
                FailureKind.TIMEOUT, f"{self._plan.reason} held its process for more than {self._plan.silent_s:g} s"
            )
        if isinstance(error, TimeoutError):
            return failed(FailureKind.TIMEOUT, f"{self._plan.reason} took more than {self._plan.limit_s:g} s")
        return failed(FailureKind.EXCEPTION, f"the process that ran {self._plan.reason} died: {error}")

    def _release(self, slot: _Slot, jobs: Sequence[_Job]) -> None:
        slot.load -= len(jobs)
        slot.alone = False if slot.load == 0 else slot.alone
        if slot.worker is not None and slot.worn and slot.load == 0:
            self._replace(slot, slot.worker)
        self._watch_clock()

    def _settle(self, job: _Job, score: Score | PackedScore) -> None:
        ticket = self._tickets[job.ticket]
        assert job.place not in ticket.scores, f"ticket {job.ticket}: answer {job.place} was scored twice"
        ticket.scores[job.place] = score
        ticket.changed.set()

    def _watch_clock(self) -> None:
        """Count the time in which at least one answer was being scored."""
        now, busy = time.perf_counter(), any(slot.load for slot in self._slots)
        if self._busy_since is not None:
            for ticket in self._tickets.values():
                ticket.busy_s += now - self._busy_since
        self._busy_since = now if busy else None


def _got_no_turn(score: Score | PackedScore) -> bool:
    reason = score.reason if isinstance(score, Score) else score[3]
    return reason is not None and kind_of_reason(reason) is FailureKind.STARVED


def pack(score: Score) -> PackedScore:
    """The fields of a score."""
    return score._total, score.parts, score.prediction, score.reason, score.extra


def in_order(scores: Mapping[Place, Score | PackedScore], counts: Sequence[int]) -> list[Score]:
    """Scores prompt by prompt; `counts` are the answers of each prompt."""
    found = (scores[prompt, answer] for prompt, count in enumerate(counts) for answer in range(count))
    return [score if isinstance(score, Score) else Score(*score) for score in found]
