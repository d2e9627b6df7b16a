"""Invariants of the dispatcher, with workers that are coroutines."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

import numpy as np
import pytest

from verl.protocol import Prompt, Score
from verl.workers.reward_manager import RewardItem
from verl.workers.reward_manager.dispatch import (
    Answer,
    Collected,
    Dispatcher,
    DispatchPlan,
    Scored,
    WorkerLostError,
    in_order,
)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", i, "s", np.zeros(0, np.int32), (), (), str(i), {}) for i in range(count)]


class Worker:
    """Scores an answer by the number in its text; `hang`, `die` and `block` (the whole worker) do what they say.

    `leave` gets a score and leaves a call behind that goes on; `turn` gets no turn unless it is alone, `never` never.
    """

    made: list[Worker]

    def __init__(self, second_s: float) -> None:
        self.second_s = second_s
        self.dead = asyncio.Event()
        self.batches: list[int] = []
        self.blocked = self.worn = False
        self.in_flight = 0

    async def score(self, items: Sequence[RewardItem]) -> Scored:
        if self.dead.is_set():
            raise WorkerLostError("killed")
        self.batches.append(len(items))
        self.in_flight += len(items)
        self.blocked |= any(item.text == "block" for item in items)
        if any(item.text == "die" for item in items):
            self.dead.set()
            raise WorkerLostError("exit code 3")
        pause = 60.0 if self.blocked or any(item.text == "hang" for item in items) else self.second_s * len(items)
        waits = asyncio.create_task(asyncio.sleep(pause)), asyncio.create_task(self.dead.wait())
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self.dead.is_set():
            raise WorkerLostError("killed")
        starved, self.in_flight = self.in_flight > 1, self.in_flight - len(items)
        self.worn |= any(item.text == "leave" for item in items)
        notes = ["traceback"] if any(item.text == "bad" for item in items) else []
        failing = {"bad": "bad", "leave": "timeout: too long"} | {"never": "starved: no turn"}
        failing |= {"turn": "starved: no turn"} if starved else {}
        texts = [item.text for item in items]
        scores = [Score.failed(failing[t]) if t in failing else Score.ok(float(t.replace("turn", "7"))) for t in texts]
        return Scored(scores, pause, notes, worn=self.worn)

    async def beat(self) -> bool:
        if self.blocked:
            await self.dead.wait()
        if self.dead.is_set():
            raise WorkerLostError("killed")
        return self.worn

    def kill(self) -> None:
        self.dead.set()


def run(
    texts: Sequence[Sequence[str]],
    *,
    order: int | None = None,
    workers: int = 2,
    waiting: bool = False,
    limit_s: float | None = 0.3,
    silent_s: float | None = None,
    second_s: float = 0.0001,
) -> tuple[list[Score], Collected, list[Worker]]:
    """Submit all answers in a shuffled order; the scores in theirs."""

    async def main() -> tuple[list[Score], Collected, list[Worker]]:
        made: list[Worker] = []

        async def spawn() -> Worker:
            await asyncio.sleep(0.02)
            made.append(Worker(second_s))
            return made[-1]

        pool = Dispatcher(spawn, DispatchPlan(workers=workers, waiting=waiting, limit_s=limit_s, silent_s=silent_s))
        ticket = pool.open(prompts(len(texts)))
        answers = [Answer(i, k, text, 1) for i, group in enumerate(texts) for k, text in enumerate(group)]
        if order is not None:
            random.Random(order).shuffle(answers)
        pool.submit(ticket, answers[:3])
        await pool.start()
        for start in range(3, len(answers), 7):
            pool.submit(ticket, answers[start : start + 7])
            await asyncio.sleep(0)
        found = await asyncio.wait_for(pool.collect(ticket, len(answers)), 20)
        pool.close()
        return in_order(found.scores, [len(group) for group in texts]), found, made

    return asyncio.run(main())


NUMBERS = [[str(10 * i + k) for k in range(5)] for i in range(30)]


@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_scores_come_back_in_order_whatever_the_order_of_arrival(waiting: bool, workers: int) -> None:
    expected = [float(text) for group in NUMBERS for text in group]
    for order in range(3):
        scores, _, _ = run(NUMBERS, order=order, waiting=waiting, workers=workers)
        assert [s.total for s in scores] == expected


@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize("text", ["hang", "die"])
def test_an_answer_that_takes_its_worker_down_fails_alone(text: str, waiting: bool) -> None:
    texts = [list(group) for group in NUMBERS]
    texts[4][2] = texts[17][0] = text
    scores, found, _ = run(texts, order=1, waiting=waiting)
    bad = [i for i, s in enumerate(scores) if not s.is_ok]
    assert bad == [4 * 5 + 2, 17 * 5]
    kind = "timeout" if text == "hang" else "exception"
    assert all(str(scores[i].reason).startswith(kind) for i in bad)
    assert found.metrics["reward/pool/workers_replaced"] >= 2


@pytest.mark.parametrize("workers", [1, 3])
def test_an_answer_that_makes_its_worker_stand_still_fails_alone_long_before_what_answers_may_wait(
    workers: int,
) -> None:
    texts = [list(group) for group in NUMBERS]
    texts[4][2] = texts[17][0] = "block"
    begin = time.perf_counter()
    scores, found, _ = run(texts, order=1, waiting=True, workers=workers, limit_s=60.0, silent_s=0.3, second_s=0.001)
    assert time.perf_counter() - begin < 15
    bad = [i for i, s in enumerate(scores) if not s.is_ok]
    assert bad == [4 * 5 + 2, 17 * 5]
    assert {scores[i].reason for i in bad} == {"timeout: the reward function held its process for more than 0.3 s"}
    assert found.metrics["reward/pool/workers_replaced"] >= 2


def test_slow_answers_of_a_worker_that_beats_are_left_in_peace() -> None:
    scores, found, _ = run([["1"] * 4], waiting=True, workers=1, limit_s=60.0, silent_s=0.1, second_s=0.3)
    assert all(s.is_ok for s in scores) and found.metrics["reward/pool/workers_replaced"] == 0


def test_a_worker_with_a_call_left_behind_finishes_what_it_has_and_is_replaced() -> None:
    texts = [["leave"], *([["1"] * 40] * 5)]
    scores, found, made = run(texts, waiting=True, workers=1, limit_s=60.0, silent_s=0.04, second_s=0.05)
    assert [s.is_ok for s in scores] == [False] + [True] * 200
    assert found.metrics["reward/pool/workers_replaced"] == 1 and len(made) == 2
    assert made[0].dead.is_set() and made[1].batches


def test_a_worker_that_brings_a_score_and_a_call_left_behind_takes_nothing_more_before_its_next_beat() -> None:
    texts = [["leave"], ["1"] * 3, *([["1"] * 40] * 5)]
    scores, _, made = run(texts, waiting=True, workers=1, limit_s=60.0, silent_s=10.0, second_s=0.05)
    assert [s.is_ok for s in scores] == [False] + [True] * 203
    assert made[0].dead.is_set() and sum(made[0].batches) < 100 < sum(made[1].batches), "64 at once, then another"


def test_an_answer_that_got_no_turn_beside_others_is_scored_again_where_it_is_alone() -> None:
    texts = [["1"] * 6, ["turn", "2", "turn"], ["3"] * 6]
    scores, found, _ = run(texts, waiting=True, limit_s=60.0, silent_s=10.0, second_s=0.05)
    assert [s.total for s in scores] == [1.0] * 6 + [7.0, 2.0, 7.0] + [3.0] * 6
    assert found.metrics["reward/pool/workers_replaced"] == 0


def test_an_answer_that_gets_no_turn_alone_either_fails_after_its_second_try() -> None:
    scores, _, made = run([["1"] * 6, ["never"]], waiting=True, limit_s=60.0, silent_s=10.0, second_s=0.05)
    assert [s.is_ok for s in scores] == [True] * 6 + [False]
    assert sum(sum(worker.batches) for worker in made) == 7 + 1


def test_a_traceback_is_reported_once() -> None:
    texts = [["bad"] * 5 for _ in range(10)]
    scores, found, _ = run(texts)
    assert found.notes == ["traceback"] and not any(s.is_ok for s in scores)


def test_cheap_answers_travel_together() -> None:
    _, _, made = run([["1"] * 500], second_s=0.00001)
    assert sum(len(w.batches) for w in made) < 100 and max(max(w.batches) for w in made) > 5


def test_slow_answers_travel_alone_when_one_at_a_time() -> None:
    _, _, made = run([["1"] * 12], second_s=0.06)
    assert max(max(w.batches) for w in made) == 1


def test_answers_that_wait_wait_together() -> None:
    start = time.perf_counter()
    run([["1"] * 100], waiting=True, second_s=0.2, limit_s=5.0)
    assert time.perf_counter() - start < 2.0, "100 answers of 0.2 s, 64 at a time on each of two workers"


def test_the_clock_does_not_run_while_an_answer_queues() -> None:
    scores, _, _ = run([["1"] * 20], workers=1, second_s=0.1, limit_s=0.35)
    assert all(s.is_ok for s in scores)


def test_a_bug_in_a_worker_reaches_the_collector() -> None:
    with pytest.raises(ValueError, match="could not convert"):
        run([["not a number"]])
