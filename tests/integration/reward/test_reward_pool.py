"""The reward pool in real processes: the scores of one process, and functions that hang, die or raise."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from judge_server import JudgeServer, Seen, error, good

from verl.protocol import Prompt, Score
from verl.single_controller.group import UserError
from verl.utils.reward_score.custom import CustomFunction
from verl.workers.reward_manager import RewardFailureRateError, RewardItem, RewardManager, reward_metrics
from verl.workers.reward_manager.dispatch import Answer
from verl.workers.reward_manager.pool import RewardPool, dispatch_plan

LIMIT_S = 3.0
"""Longer than a busy machine keeps a process waiting for a core: silence of a worker is judged by the wall clock."""
ANSWER = "<think>a</think><class>{}</class><extension>{}</extension>"
WITHOUT = """
import os, re, signal, time

def compute_score(solution_str, ground_truth):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)       # works in a main thread only
    if solution_str == "hang":
        re.match(r"(a+)+$", "a" * 40 + "b")             # never lets go of the interpreter
    if solution_str == "sleep":
        time.sleep(100)
    if solution_str == "die":
        os._exit(3)
    if solution_str == "bad":
        raise RuntimeError("no")
    return float(solution_str)
"""
WAITING = """
import asyncio, time

async def compute_score(solution_str, ground_truth):
    if solution_str == "hang":
        await asyncio.sleep(100)
    if solution_str == "block":
        time.sleep(100)
    await asyncio.sleep(0.2)
    return float(solution_str)
"""


def prompt(row: int, truth: str = "Desktop", source: str = "computer_dataset") -> Prompt:
    return Prompt(f"p{row}", row, source, np.zeros(3, np.int32), (), (), truth, {"index": row})


@contextmanager
def pool_of(manager: RewardManager, source: str = "computer_dataset", truth: str = "Desktop") -> Iterator[RewardPool]:
    manager.check_prompts([prompt(0, truth, source)])
    pool = RewardPool(manager, workers=2, timeout=120)
    try:
        pool.ready(120)
        yield pool
    finally:
        pool.close()


def scores_of(pool: RewardPool, texts: list[str]) -> tuple[list[Score], dict[str, float]]:
    sink = pool.open([prompt(0)])
    sink.send([Answer(0, i, text, 1) for i, text in enumerate(texts)])
    return pool.collect(sink, [len(texts)])


def custom(folder: Path, body: str) -> CustomFunction:
    (folder / "reward.py").write_text(body)
    return CustomFunction(str(folder / "reward.py"))


def test_the_pool_gives_the_scores_of_one_process() -> None:
    manager = RewardManager(max_failure_rate=0, parts={"length": {"buffer": 10, "weight": 0.5}}, max_tokens=100)
    said = ("Desktop", "Laptop", "?")
    batch = [prompt(i) for i in range(100)]
    items = [RewardItem(batch[i % 100], ANSWER.format(said[i % 3], i), i % 120) for i in range(3000)]
    with pool_of(manager) as pool:
        assert pool.score(items) == manager.score(items)
        assert pool.score([]) == []


def test_a_plain_function_that_hangs_dies_or_raises_fails_its_own_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = RewardManager(max_failure_rate=0.5, custom=custom(tmp_path, WITHOUT), timeout_s=LIMIT_S)
    texts = [str(i) for i in range(60)]
    texts[10], texts[20], texts[30], texts[40], texts[41] = "hang", "sleep", "die", "bad", "bad"
    with pool_of(manager) as pool, caplog.at_level(logging.WARNING):
        scores, metrics = scores_of(pool, texts)
    reasons = {i: str(s.reason).split(":")[0] for i, s in enumerate(scores) if not s.is_ok}
    assert reasons == {10: "timeout", 20: "timeout", 30: "exception", 40: "exception", 41: "exception"}
    assert [s.total for i, s in enumerate(scores) if i not in reasons] == [i for i in range(60) if i not in reasons]
    assert metrics["reward/pool/workers_replaced"] >= 3
    assert sum("RuntimeError: no" in record.getMessage() for record in caplog.records) == 1


def test_coroutines_wait_together_and_one_that_hangs_or_blocks_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verl.workers.reward_manager.pool._GRACE_S", 1.0)
    manager = RewardManager(max_failure_rate=0.5, custom=custom(tmp_path, WAITING), timeout_s=LIMIT_S)
    with pool_of(manager) as pool:
        begin = time.perf_counter()
        scores, _ = scores_of(pool, [str(i) for i in range(100)])
        assert [s.total for s in scores] == list(range(100))
        assert time.perf_counter() - begin < 10, "100 answers of 0.2 s, many at a time"
        scores, _ = scores_of(pool, ["1", "hang", "2", "block", "3"])
    assert [s.total if s.is_ok else str(s.reason)[:7] for s in scores] == [1, "timeout", 2, "timeout", 3]


def test_above_the_failure_rate_the_run_stops(tmp_path: Path) -> None:
    manager = RewardManager(max_failure_rate=0.25, custom=custom(tmp_path, WITHOUT), timeout_s=5.0)
    with pool_of(manager) as pool:
        with pytest.raises(RewardFailureRateError, match=r"2 of 4 .*2 x exception: RuntimeError: no"):
            scores_of(pool, ["bad", "bad", "1", "2"])
        assert scores_of(pool, ["1", "2"])[0][1].total == 2.0


def judge_options(server: JudgeServer, **changes: Any) -> dict[str, Any]:
    return {"base_url": server.url, "model": "stub", "api_key_env": None, "max_retries": 0, **changes}


CALM = """
import os, time

def compute_score(solution_str, least):
    if "hang" in solution_str:
        time.sleep(100)
    if "die" in solution_str:
        os._exit(3)
    if "bad" in solution_str:
        raise RuntimeError("no")
    if "nothing" in solution_str:
        return None
    return {"score": "calm" in solution_str, "long_enough": len(solution_str) >= least}
"""
GATE = """
import asyncio

async def compute_score(solution_str):
    await asyncio.sleep(100 if "hang" in solution_str else 0.01)
    if "bad" in solution_str:
        raise RuntimeError("no")
    return "plain" in solution_str
"""
SLOW = """
import time

def compute_score(solution_str):
    time.sleep(100 if "slow" in solution_str else 0)
    return 1.0
"""


def custom_part(folder: Path, name: str, body: str, **settings: Any) -> dict[str, Any]:
    (folder / f"{name}.py").write_text(body)
    return {"kind": "custom", "path": str(folder / f"{name}.py"), **settings}


def outcomes(scores: list[Score]) -> list[float | str]:
    """The total, or the kind of the failure."""
    return [round(s.total, 6) if s.is_ok else str(s.reason).split(":")[0] for s in scores]


def test_a_users_part_counts_by_weight_and_condition_and_its_failures_stay_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calm = custom_part(tmp_path, "calm", CALM, weight=0.25, when="label", reward_kwargs={"least": 60})
    manager = RewardManager(max_failure_rate=0.7, parts={"calm": calm}, timeout_s=LIMIT_S)
    said = [("Desktop", "calm"), ("Desktop", "loud"), ("Laptop", "hang, die, bad"), ("Desktop", "hang")]
    said += [("Desktop", "die"), ("Desktop", "bad"), ("Desktop", "bad"), ("Desktop", "nothing"), ("Desktop", "calm")]
    with pool_of(manager) as pool, caplog.at_level(logging.WARNING):
        scores, _ = scores_of(pool, [ANSWER.format(*words) for words in said])
    failures = ["timeout", "exception", "exception", "exception", "none"]
    assert outcomes(scores) == [1.25, 1.0, 0.1, *failures, 1.25]
    assert "calm" not in scores[2].parts, "the part runs only where its condition holds"
    assert dict(scores[0].parts) == {"format": 1.0, "label": 1.0, "calm": 1.0}
    assert scores[0].extra == {"calm/long_enough": True}
    assert sum("RuntimeError: no" in record.getMessage() for record in caplog.records) == 1


def test_waiting_parts_of_a_user_stand_beside_the_judge_in_their_order_and_within_their_limit(tmp_path: Path) -> None:
    parts = {
        "gate": custom_part(tmp_path, "gate", GATE, weight=0.0, before="soft"),
        "soft": {"when": ["label", "format", "gate"]},
        "slow": custom_part(tmp_path, "slow", SLOW, weight=0.125, when="gate"),
    }
    words = ["plain plan", "other plan", "hang", "bad", "plain but slow", "plain again"]
    with JudgeServer() as server:
        server.plan = lambda _: good(0.5)
        manager = RewardManager(max_failure_rate=0.5, judge=judge_options(server), parts=parts, timeout_s=LIMIT_S)
        items = [
            RewardItem(prompt(i, "Myopathy", "emg_dataset"), ANSWER.format("Myopathy", w)) for i, w in enumerate(words)
        ]
        with pool_of(manager, "emg_dataset", "Myopathy") as pool:
            scores = pool.score(items)
        assert outcomes(scores) == [1.375, 1.0, "timeout", "exception", "timeout", 1.375]
        assert list(scores[0].parts) == ["format", "label", "gate", "soft", "slow"]
        asked = [word for word in words if any(f'"extension": "{word}"' in said_to(seen) for seen in server.seen)]
    assert asked == ["plain plan", "plain but slow", "plain again"], "the judge is asked only behind the gate"


HOLDING = """
import re

def compute_score(solution_str):
    if "regex" in solution_str:
        re.match(r"(a+)+$", "a" * 40 + "b")             # never lets go of the interpreter
    while "spin" in solution_str:                       # lets go now and then, and never ends
        pass
    return 1.0
"""


def test_a_plain_part_that_holds_the_interpreter_beside_a_judge_fails_its_own_answer_within_the_limit(
    tmp_path: Path,
) -> None:
    parts = {"holding": custom_part(tmp_path, "holding", HOLDING, weight=0.125, when="label")}
    words = [f"plan {i}" for i in range(12)]
    words[2], words[7], words[9] = "regex", "regex again", "spin"
    items = [
        RewardItem(prompt(i, "Myopathy", "emg_dataset"), ANSWER.format("Myopathy", w)) for i, w in enumerate(words)
    ]
    with JudgeServer() as server:
        server.plan = lambda _: good(0.5, delay_s=0.2)
        manager = RewardManager(max_failure_rate=0.5, judge=judge_options(server), parts=parts, timeout_s=LIMIT_S)
        with pool_of(manager, "emg_dataset", "Myopathy") as pool:
            begin = time.perf_counter()
            sink = pool.open([item.prompt for item in items])
            sink.send([Answer(i, 0, item.text, 9) for i, item in enumerate(items)])
            scores, metrics = pool.collect(sink, [1] * len(items))
            assert time.perf_counter() - begin < 60
        asked = [said_to(seen) for seen in server.seen]
    held = {2: "timeout", 7: "timeout", 9: "timeout"}
    assert outcomes(scores) == [held.get(i, 1.375) for i in range(len(words))], [score.reason for score in scores]
    assert all(f"held its process for more than {LIMIT_S:g} s" in str(scores[i].reason) for i in (2, 7))
    assert f"holding.py:compute_score took more than {LIMIT_S:g} s" in str(scores[9].reason)
    counted = reward_metrics(["emg_dataset"] * len(scores), scores)
    assert counted["reward/failed/timeout"] == counted["reward/failed/count"] == 3
    assert metrics["reward/pool/workers_replaced"] >= 2
    assert not any(name.startswith("judge/failed") for name in metrics)
    assert len({line for text in asked for line in text.splitlines() if '"extension"' in line}) == len(asked), (
        "what was scored again is not asked for again"
    )


def said_to(seen: Seen) -> str:
    return str(seen.body["messages"][1]["content"])


def test_all_workers_share_one_judge_and_its_limits() -> None:
    with JudgeServer() as server:
        server.plan = lambda seen: error(500) if b'Plan 7\\"' in seen.raw else good(0.5, delay_s=0.2)
        manager = RewardManager(max_failure_rate=0.5, judge=judge_options(server, max_concurrent=3))
        batch = [prompt(i, "Myopathy", "emg_dataset") for i in range(24)]
        items = [RewardItem(p, ANSWER.format("Myopathy", f"Plan {p.row}"), 9) for p in batch]
        with pool_of(manager, "emg_dataset", "Myopathy") as pool:
            scores = pool.score(items)
            again = pool.score(items[8:])
        assert server.most_in_flight == 3
        assert [s.total if s.is_ok else s.reason for s in scores[:7]] == [1.25] * 7
        assert str(scores[7].reason).startswith("server_error") and all(s.is_ok for s in scores[8:])
        assert again == scores[8:] and len(server.seen) == 24, "a second batch is served from the judge's cache"


def test_the_judges_key_is_that_of_its_node_and_a_missing_one_is_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The driver's environment is not the cluster's: Ray was there before these variables were set or deleted."""
    monkeypatch.setenv("KEY_OF_THE_DRIVER", "sk-known-to-the-driver-alone")
    monkeypatch.delenv("KEY_OF_THE_NODE", raising=False)
    item = RewardItem(prompt(0, "Myopathy", "emg_dataset"), ANSWER.format("Myopathy", "Plan"), 9)
    with JudgeServer() as server:
        manager = RewardManager(max_failure_rate=0, judge=judge_options(server, api_key_env="KEY_OF_THE_DRIVER"))
        with pytest.raises(UserError) as caught, pool_of(manager, "emg_dataset", "Myopathy"):
            pass
        message = str(caught.value)
        assert "KEY_OF_THE_DRIVER" in message and socket.gethostname() in message and "ray start" in message
        assert "sk-known" not in message and not server.seen
        server.plan = lambda _: good(0.5)
        manager = RewardManager(max_failure_rate=0, judge=judge_options(server, api_key_env="KEY_OF_THE_NODE"))
        with pool_of(manager, "emg_dataset", "Myopathy") as pool:
            assert pool.score([item])[0].total == 1.25
        assert [seen.headers["authorization"] for seen in server.seen] == ["Bearer sk-known-to-the-node-alone"]


@pytest.mark.parametrize(("slots", "workers", "each"), [(32, 2, 32), (3, 2, 3), (1, 8, 1), (400, 4, 200)])
def test_the_pool_sends_a_judge_what_its_slots_can_hold(slots: int, workers: int, each: int) -> None:
    manager = RewardManager(max_failure_rate=0, judge={"max_concurrent": slots, "api_key_env": None})
    manager.check_prompts([prompt(0, "Myopathy", "emg_dataset")])
    plan = dispatch_plan(manager, workers)
    assert plan.waiting and plan.in_flight == each


def test_closing_the_pool_ends_its_processes() -> None:
    with pool_of(RewardManager(max_failure_rate=0)) as pool:
        pids = pool.ready(10)
        assert all(psutil.pid_exists(pid) for pid in pids) and os.getpid() not in pids
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
