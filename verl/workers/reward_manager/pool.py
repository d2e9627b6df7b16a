"""The reward pool: Ray processes that score answers while others are still written.

One hub deals answers to the workers (`dispatch.py`), and starts the one judge that all workers ask, so that its limits
hold for the run. Hub, judge and workers live on the driver's node. They ask Ray for no CPU. Rollout workers send
finished answers straight to the hub.

Invariants
- The scores are those of the same `RewardManager` in one process.
- A plain function runs in its worker's main thread; a call above the time limit ends with its process. Beside a judge
  or a coroutine it runs in a thread of a worker that waits for many answers: a call that makes that worker stand still
  for the time limit ends with its process too, and a thread that outlives its limit with the next idle moment. What
  was late only because such a thread kept the interpreter is scored again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl.protocol import Prompt, Score
from verl.single_controller.group import UserError
from verl.utils.reward_score.adapter import calls_left_behind
from verl.utils.reward_score.judge import JudgeConfig, JudgeError, JudgeRequest, LLMJudge, Verdict
from verl.utils.reward_score.judge.shared import use_judges
from verl.utils.reward_score.returns import FailureKind
from verl.workers.reward_manager.dispatch import (
    Answer,
    Collected,
    Dispatcher,
    DispatchPlan,
    Scored,
    WorkerLostError,
    in_order,
    pack,
)
from verl.workers.reward_manager.manager import RewardItem, RewardManager

log = logging.getLogger(__name__)

_SAY_EVERY = 30.0
_GRACE_S = 5.0
"""How much longer than the limits of its calls a worker may take for an answer."""
_SENT_TOGETHER = 2000
_NO_TOKENS = np.zeros(0, np.int32)
_IN_FLIGHT = 256
"""Answers of an async function that wait at once, over all workers."""
_IN_FLIGHT_PER_SLOT = 2
"""The same for a judge, by its slots: those that are asked about and as many on their way, so that no slot is idle and
none waits for `queue_timeout_s`."""


def default_workers() -> int:
    """One process per CPU core, at most 8."""
    return min(8, os.cpu_count() or 1)


_Sent = tuple[str, str, Mapping[str, Any], str, int | None]
"""What a worker reads of an item: source, ground truth, extra_info, text, tokens. Plain, so that it pickles fast."""


class _Worker:
    """A manager in a process of its own."""

    def __init__(self, spec: dict[str, Any], hub: Any) -> None:
        self._notes: list[str] = []
        self._judges: dict[JudgeConfig, RemoteJudge] = {}
        use_judges(lambda config: self._judges.setdefault(config, RemoteJudge(hub, config)))
        self.manager = RewardManager(**spec, warn=self._notes.append)

    def ready(self) -> int:
        return os.getpid()

    def _scored(self, scores: list[Score], begin: float) -> Scored:
        notes, self._notes[:] = list(self._notes), []
        return Scored([pack(score) for score in scores], time.perf_counter() - begin, notes)

    def _items(self, sent: Sequence[_Sent]) -> list[RewardItem]:
        return [
            RewardItem(Prompt("", 0, source, _NO_TOKENS, (), (), truth, extra), text, tokens)
            for source, truth, extra, text, tokens in sent
        ]


class PlainWorker(_Worker):
    """Scores one answer after the other in the process's main thread, where signals work."""

    def score(self, sent: Sequence[_Sent]) -> Scored:
        begin = time.perf_counter()
        return self._scored(self.manager.score_now(self._items(sent)), begin)


class AsyncWorker(_Worker):
    """Scores many answers at once in one event loop."""

    async def ready(self) -> int:  # type: ignore[override]
        await asyncio.gather(*(judge.find() for judge in self._judges.values()))
        return os.getpid()

    async def beat(self) -> bool:
        """Whether plain calls that outlived their limit still run here."""
        return calls_left_behind() > 0

    async def score(self, sent: Sequence[_Sent]) -> Scored:
        begin = time.perf_counter()
        scores = await asyncio.gather(*(self.manager.score_one(item) for item in self._items(sent)))
        return dataclasses.replace(self._scored(list(scores), begin), worn=await self.beat())


class JudgeActor:
    """The one `LLMJudge` of a config."""

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._judge: LLMJudge | None = None

    async def judge(self, request: JudgeRequest) -> Verdict | tuple[str, str]:
        """The verdict, or (kind, message): Ray would re-wrap an exception."""
        if self._judge is None:
            self._judge = LLMJudge(self._config)
        try:
            return await self._judge.judge(request)
        except JudgeError as error:
            return error.kind.value, str(error)

    async def ready(self) -> str | None:
        """Import the client and read the key now, not while the first answers wait; what is wrong with it, or with
        the cache file.

        The key is that of this process, which Ray started with its own environment: another than the driver's where
        the cluster was there before. It is never sent.
        """
        try:
            if self._judge is None:
                self._judge = LLMJudge(self._config)
            self._judge.open()
        except (JudgeError, ValueError) as error:
            return f"{error} (Ray node {ray.util.get_node_ip_address()})"
        return None

    async def metrics(self) -> dict[str, float]:
        return {} if self._judge is None else self._judge.metrics()


class RemoteJudge:
    """A worker's view of the judge."""

    def __init__(self, hub: Any, config: JudgeConfig) -> None:
        self._hub, self._config = hub, config
        self._actor: Any = None

    async def find(self) -> Any:
        """The judge's actor; asked for once."""
        if self._actor is None:
            self._actor = await self._hub.judge_for.remote(self._config)
        return self._actor

    async def judge(self, request: JudgeRequest) -> Verdict:
        """As `LLMJudge.judge`."""
        found = await (await self.find()).judge.remote(request)
        if isinstance(found, Verdict):
            return found
        kind, message = found
        raise JudgeError(FailureKind(kind), message)


class _RayWorker:
    """A scoring worker behind a Ray actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def score(self, items: Sequence[RewardItem]) -> Scored:
        sent = [(p.data_source, p.ground_truth, p.extra_info, text, tokens) for p, text, tokens in items]
        try:
            found: Scored = await self._actor.score.remote(sent)
        except RayActorError as error:
            raise WorkerLostError(str(error).splitlines()[0]) from None
        return found

    async def beat(self) -> bool:
        try:
            return bool(await self._actor.beat.remote())
        except RayActorError as error:
            raise WorkerLostError(str(error).splitlines()[0]) from None

    def kill(self) -> None:
        ray.kill(self._actor, no_restart=True)


class RewardHub:
    """The actor that holds the dispatcher, and the handles of workers and judges."""

    def __init__(self, spec: dict[str, Any], plan: DispatchPlan) -> None:
        self._spec = spec
        self._worker_class = AsyncWorker if plan.waiting else PlainWorker
        self._concurrency = plan.in_flight + 2 if plan.waiting else 1
        self._dispatcher = Dispatcher(self._spawn, plan)
        self._judges: dict[JudgeConfig, Any] = {}
        self._pids: dict[int, int] = {}

    async def _spawn(self) -> _RayWorker:
        # Beside the hub: a custom function's file need not be on every node, and a lost node loses no scores.
        options = _beside_the_driver() | {"max_concurrency": self._concurrency}
        actor = ray.remote(self._worker_class).options(**options)
        actor = actor.remote(self._spec, ray.get_runtime_context().current_actor)
        pid = await actor.ready.remote()
        self._pids[pid] = len(self._pids)
        return _RayWorker(actor)

    async def start(self) -> tuple[list[int], str | None]:
        """Start the workers; their process ids, and why the judge cannot be asked, if so."""
        if self._spec["judge"] is None:
            await self._dispatcher.start()
            return list(self._pids), None
        _, problem = await asyncio.gather(self._dispatcher.start(), self._judge_for(self._spec["judge"]).ready.remote())
        return list(self._pids), problem

    async def judge_for(self, config: JudgeConfig) -> Any:
        """The handle of the one judge of that config."""
        return self._judge_for(config)

    def _judge_for(self, config: JudgeConfig) -> Any:
        if config not in self._judges:
            self._judges[config] = ray.remote(JudgeActor).options(**_beside_the_driver()).remote(config)
        return self._judges[config]

    async def open(self, prompts: Sequence[Prompt]) -> int:
        return self._dispatcher.open(prompts)

    async def submit(self, ticket: int, answers: Sequence[tuple[int, int, str, int | None]]) -> None:
        self._dispatcher.submit(ticket, answers)

    async def progress(self, ticket: int) -> int:
        return self._dispatcher.progress(ticket)

    async def collect(self, ticket: int, count: int) -> Collected:
        found = await self._dispatcher.collect(ticket, count)
        for metrics in await asyncio.gather(*(judge.metrics.remote() for judge in self._judges.values())):
            for name, value in metrics.items():
                found.metrics[name] = found.metrics.get(name, 0.0) + value
        return found

    async def close(self) -> None:
        self._dispatcher.close()


@dataclass(frozen=True)
class AnswerSink:
    """Where a rollout worker sends finished answers; can be pickled. Sending does not wait."""

    hub: Any
    ticket: int

    def send(self, answers: Sequence[Answer]) -> None:
        self.hub.submit.remote(self.ticket, [tuple(answer) for answer in answers])


class RewardPool:
    """The driver's handle on a pool that scores like `manager`; `timeout` bounds the wait for one batch, in seconds."""

    def __init__(self, manager: RewardManager, *, workers: int, timeout: float) -> None:
        self._manager, self._timeout = manager, timeout
        plan = dispatch_plan(manager, workers)
        self._hub = ray.remote(RewardHub).options(**_beside_the_driver()).remote(manager.spec, plan)
        self._started = self._hub.start.remote()

    def ready(self, timeout: float) -> list[int]:
        """Wait until all workers run and the judge has its key; the workers' process ids.

        Raises UserError naming variable and node where the judge's process finds no key.
        """
        pids, problem = ray.get(self._started, timeout=timeout)
        if problem is not None:
            raise UserError(f"reward.judge: {problem}")
        return list(pids)

    def open(self, prompts: Sequence[Prompt]) -> AnswerSink:
        """Begin a batch: answers to these prompts, numbered from 0, may now be sent."""
        return AnswerSink(self._hub, ray.get(self._hub.open.remote([_light(p) for p in prompts])))

    def collect(self, sink: AnswerSink, counts: Sequence[int]) -> tuple[list[Score], dict[str, float]]:
        """Wait until all answers of the batch are scored; `counts` are the answers of each prompt.

        Returns the scores prompt by prompt, and the pool's metrics. Raises RewardFailureRateError as the manager does.
        """
        found = self._wait(sink, sum(counts))
        for note in found.notes:
            log.warning("%s", note)
        scores = in_order(found.scores, counts)
        self._manager.check_rate(scores)
        return scores, found.metrics

    def score(self, items: Sequence[RewardItem]) -> list[Score]:
        """Score answers that are there already."""
        prompts = list({id(item.prompt): item.prompt for item in items}.values())
        number = {id(prompt): i for i, prompt in enumerate(prompts)}
        sink = self.open(prompts)
        taken = [0] * len(prompts)
        answers, places = [], []
        for item in items:
            i = number[id(item.prompt)]
            answers.append(Answer(i, taken[i], item.text, item.tokens))
            places.append((i, taken[i]))
            taken[i] += 1
        for start in range(0, len(answers), _SENT_TOGETHER):
            sink.send(answers[start : start + _SENT_TOGETHER])
        scores, _ = self.collect(sink, taken)
        by_place = dict(zip(((i, k) for i, n in enumerate(taken) for k in range(n)), scores, strict=True))
        return [by_place[place] for place in places]

    def _wait(self, sink: AnswerSink, count: int) -> Collected:
        ref, begin = self._hub.collect.remote(sink.ticket, count), time.monotonic()
        while not ray.wait([ref], timeout=_SAY_EVERY)[0]:
            waited = time.monotonic() - begin
            done = ray.get(self._hub.progress.remote(sink.ticket), timeout=_SAY_EVERY)
            if waited > self._timeout:
                raise TimeoutError(f"reward pool: {done} of {count} answers scored after {waited:.0f} s")
            log.warning("waiting for the reward pool: %d of %d answers scored (%.0f s)", done, count, waited)
        found: Collected = ray.get(ref)
        return found

    def close(self) -> None:
        """End hub, workers and judges: Ray ends what the hub started with it."""
        ray.kill(self._hub, no_restart=True)


def dispatch_plan(manager: RewardManager, workers: int) -> DispatchPlan:
    """How to score what that manager scores."""
    limit, in_flight = manager.timeout_s if manager.runs_user_code else None, _IN_FLIGHT
    silent = limit if manager.is_async else None
    if manager.is_async:
        # Judge and coroutines keep their own limits, and `silent` finds a call that blocks the worker's event loop.
        # `limit` is for a worker that answers, but never with a score.
        judge = manager.judge if manager.asks_judge else None
        if judge is not None:
            in_flight = _IN_FLIGHT_PER_SLOT * judge.max_concurrent
        limit = (limit or 0.0) + (2 * judge.queue_timeout_s + judge.timeout_s if judge else 0.0) + _GRACE_S
    return DispatchPlan(
        workers=workers,
        waiting=manager.is_async,
        limit_s=limit,
        silent_s=silent,
        in_flight=math.ceil(in_flight / workers),
    )


def _beside_the_driver() -> dict[str, Any]:
    """Options of an async actor on the caller's node: there lie the judge's key and, from run to run, its cache."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "max_concurrency": 10_000, "scheduling_strategy": here}


def _light(prompt: Prompt) -> Prompt:
    """What a score needs of a prompt: its token ids stay here."""
    return Prompt(
        uid=prompt.uid,
        row=prompt.row,
        data_source=prompt.data_source,
        token_ids=_NO_TOKENS,
        image_keys=(),
        image_grids=(),
        ground_truth=prompt.ground_truth,
        extra_info=prompt.extra_info,
    )
