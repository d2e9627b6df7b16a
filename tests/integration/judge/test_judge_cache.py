"""What was paid for once is never paid for again: other processes, restarts, kills."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from asking import ask, config, different, request
from judge_server import JudgeServer, Plan, completion, error, good, verdict

from verl.utils.reward_score.judge import JudgeRequest, Rubric, Verdict

SCRIPT = Path(__file__).parent / "ask_in_process.py"
ROOT = Path(__file__).resolve().parents[3]


def start(server: JudgeServer, cache: Path, count: int, concurrent: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), server.url, str(cache), str(count), str(concurrent)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> list[str]:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return out.split()


def asked_for(server: JudgeServer) -> Counter[str]:
    return Counter(re.findall(rb"Answer number (\d+)", seen.raw)[0].decode() for seen in server.seen)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "judge.sqlite"


def test_the_second_call_comes_from_the_cache(server: JudgeServer, cache: Path) -> None:
    settings = config(server, cache_path=str(cache))
    first, second = ask(settings, [request()]), ask(settings, [request()])
    assert first.found == second.found and len(server.seen) == 1
    assert second.metrics["judge/cached"] == 1


def test_the_cap_applies_to_a_cached_verdict_as_well(server: JudgeServer, cache: Path) -> None:
    server.plan = lambda _: good(0.9)
    settings, plain = config(server, cache_path=str(cache)), request("R\u0435fer to specialist.")
    free = JudgeRequest(dataclasses.replace(plain.rubric, stock_phrases=()), plain.fields)
    first, second = ask(settings, [free]).only, ask(settings, [plain]).only
    assert isinstance(first, Verdict) and isinstance(second, Verdict) and len(server.seen) == 1
    assert (first.score, first.capped) == (pytest.approx(0.9), False)
    assert (second.score, second.capped) == (0.4, True)


def test_another_process_finds_the_answers(server: JudgeServer, cache: Path) -> None:
    ask(config(server, cache_path=str(cache)), different(6))
    # The script's own config differs in limits only, which are no part of the key.
    settings = config(server, cache_path=str(cache), max_answer_tokens=256)
    assert ask(settings, different(6)).kinds == ["ok"] * 6
    assert finish(start(server, cache, 8, 4)) == ["ok"] * 8
    assert asked_for(server) == Counter({str(i): 1 for i in range(8)})


def test_after_kill_9_in_the_middle_of_a_batch_nothing_known_is_asked_again(server: JudgeServer, cache: Path) -> None:
    count, concurrent = 30, 3
    server.plan = lambda _: good(delay_s=0.1)
    victim = start(server, cache, count, concurrent)
    deadline = time.monotonic() + 30
    while len(server.seen) < 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    victim.stdout and victim.stdout.close()
    before = asked_for(server)
    assert 12 <= before.total() < count
    assert finish(start(server, cache, count, concurrent)) == ["ok"] * count
    after = asked_for(server)
    assert set(after) == {str(i) for i in range(count)}
    twice = [number for number, times in after.items() if times > 1]
    # Only what was on its way when the process died is asked for again.
    assert len(twice) <= concurrent and max(after.values()) <= 2


def test_many_processes_open_one_new_file_together(server: JudgeServer, cache: Path) -> None:
    processes = [start(server, cache, 10, 2) for _ in range(4)]
    assert [finish(process) for process in processes] == [["ok"] * 10] * 4
    with sqlite3.connect(cache) as db:
        (calls,) = db.execute("SELECT calls FROM spending WHERE run = 'default'").fetchone()
        assert db.execute("SELECT count(*) FROM verdicts").fetchone() == (10,)
    assert calls == len(server.seen)


def test_the_limit_on_calls_holds_over_processes(server: JudgeServer, cache: Path) -> None:
    settings = config(server, cache_path=str(cache), max_calls=12)
    finish(start(server, cache, 10, 2))
    assert sorted(ask(settings, [request(f"own {i}") for i in range(6)]).kinds) == ["budget"] * 4 + ["ok"] * 2


@pytest.mark.parametrize("bad", [error(500), Plan(completion("?")), Plan(completion(verdict(3.0))), error(401)])
def test_a_failure_is_never_cached(server: JudgeServer, cache: Path, bad: Plan) -> None:
    server.plan = lambda _: bad
    settings = config(server, cache_path=str(cache), max_retries=0)
    assert "ok" not in ask(settings, [request()]).kinds
    server.plan = lambda _: good(0.3)
    found = ask(settings, [request()]).only
    assert getattr(found, "score", None) == pytest.approx(0.3)


@pytest.mark.parametrize("changes", [{"model": "other"}, {"temperature": 0.5}, {"temperature": None}])
def test_another_model_or_temperature_is_another_answer(
    server: JudgeServer, cache: Path, changes: dict[str, object]
) -> None:
    ask(config(server, cache_path=str(cache)), [request()])
    ask(config(server, cache_path=str(cache), **changes), [request()])
    assert len(server.seen) == 2


def test_another_rubric_or_text_is_another_answer(server: JudgeServer, cache: Path) -> None:
    same = request()
    other = Rubric(name=same.rubric.name, task="Something else.", criteria=same.rubric.criteria)
    asked = [same, JudgeRequest(other, same.fields), request(reasoning="none"), request("x")]
    ask(config(server, cache_path=str(cache)), asked)
    assert len(server.seen) == 4


def test_the_file_holds_no_text_of_an_answer(server: JudgeServer, cache: Path) -> None:
    ask(config(server, cache_path=str(cache)), [request("a very private patient")])
    assert not any(b"private" in path.read_bytes() for path in cache.parent.iterdir())


def test_a_file_of_another_kind_is_an_error_that_names_it(server: JudgeServer, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_bytes(b"not a data base at all, but long enough to be read as one" * 40)
    with pytest.raises(ValueError, match=rf"judge.cache_path={re.escape(str(cache))}"):
        ask(config(server, cache_path=str(cache)), [request()])
