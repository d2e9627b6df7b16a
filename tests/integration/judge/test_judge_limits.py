"""Limits as the server measures them: concurrency, requests and tokens a minute, spending."""

import bisect
from pathlib import Path

import pytest
from asking import ask, config, different, request
from judge_server import JudgeServer, Plan, completion, error, good, verdict


def most_in_window(times: list[float], window_s: float) -> int:
    return max(bisect.bisect_left(times, t + window_s) - i for i, t in enumerate(times))


@pytest.mark.parametrize("limit", [1, 3, 16])
def test_never_more_requests_in_flight_than_allowed(server: JudgeServer, limit: int) -> None:
    server.plan = lambda seen: error(500) if seen.index % 5 == 0 else good(delay_s=0.1)
    outcome = ask(config(server, max_concurrent=limit, max_retries=6), different(48))
    assert outcome.kinds == ["ok"] * 48
    assert server.most_in_flight <= limit
    assert server.most_in_flight == limit


def test_never_more_requests_in_a_window_than_allowed(server: JudgeServer) -> None:
    server.plan = lambda seen: error(500) if seen.index % 7 == 0 else good()
    outcome = ask(config(server, max_rpm=10, max_retries=6), different(25), window_s=1.0)
    assert outcome.kinds == ["ok"] * 25
    times = [seen.at for seen in server.seen]
    # 0.2 s for the way to the server, which differs from request to request on a busy machine.
    assert most_in_window(times, 1.0 - 0.2) <= 10
    assert outcome.seconds < len(times) / 10 + 1


def test_never_more_tokens_in_a_window_than_allowed(server: JudgeServer) -> None:
    # The server reports 100 tokens for each; what was expected beforehand is more, and is corrected.
    outcome = ask(config(server, max_tpm=3000, max_concurrent=1), different(60), window_s=1.0)
    assert outcome.kinds == ["ok"] * 60
    assert most_in_window([seen.at for seen in server.seen], 1.0 - 0.2) <= 30
    assert outcome.seconds < 5


def test_identical_answers_are_asked_for_once(server: JudgeServer) -> None:
    server.plan = lambda _: good(delay_s=0.1)
    outcome = ask(config(server), [request("same")] * 20 + [request("other")] * 20)
    assert outcome.kinds == ["ok"] * 40 and len(server.seen) == 2
    assert outcome.metrics["judge/shared"] == 38


def test_identical_answers_share_a_failure_and_the_next_batch_asks_again(server: JudgeServer) -> None:
    server.plan = lambda seen: error(500) if seen.index < 3 else good()
    assert ask(config(server), [request()] * 8).kinds == ["server_error"] * 8
    assert len(server.seen) == 3
    assert ask(config(server), [request()] * 8).kinds == ["ok"] * 8


def test_the_limit_on_calls_stops_the_asking(server: JudgeServer) -> None:
    outcome = ask(config(server, max_calls=5, max_concurrent=4), different(40))
    assert sorted(outcome.kinds) == ["budget"] * 35 + ["ok"] * 5
    assert len(server.seen) == 5
    assert any("judge.max_calls" in str(found) for found in outcome.found)


def test_retries_are_paid_from_the_same_purse(server: JudgeServer) -> None:
    server.plan = lambda _: error(500)
    outcome = ask(config(server, max_calls=2, max_retries=9), [request()])
    assert outcome.kinds == ["budget"] and len(server.seen) == 2


def test_the_limit_on_tokens_stops_the_asking(server: JudgeServer) -> None:
    outcome = ask(config(server, max_total_tokens=8000, max_concurrent=1), different(90))
    answered = outcome.kinds.count("ok")
    assert outcome.kinds.count("budget") == 90 - answered
    # Each costs 100; the last ones are not asked because the most they could cost would pass the limit.
    assert 10 <= answered <= 80 and outcome.metrics["judge/spent/tokens"] == 100 * answered


@pytest.mark.parametrize("limit", [6000, 9000, 12_000, 25_000])
def test_a_server_that_bills_a_token_a_byte_never_takes_the_run_past_its_limit(server: JudgeServer, limit: int) -> None:
    server.plan = lambda seen: Plan(completion(verdict(), tokens=len(seen.raw)))
    outcome = ask(config(server, max_total_tokens=limit, max_concurrent=4), different(20))
    billed = sum(len(seen.raw) for seen in server.seen)
    assert set(outcome.kinds) == {"ok", "budget"}, outcome.kinds
    assert outcome.metrics["judge/spent/tokens"] == billed <= limit


def test_retries_that_wait_behind_other_answers_for_the_rates_do_not_time_out(server: JudgeServer) -> None:
    # All first requests fail. A retry then waits for at least 11 others, 4 each 0.5 s: longer than timeout_s.
    server.plan = lambda seen: error(500) if seen.index < 12 else good()
    settings = config(server, max_rpm=4, max_concurrent=12, timeout_s=1.0, attempt_timeout_s=1.0)
    outcome = ask(settings, different(12), window_s=0.5)
    assert outcome.kinds == ["ok"] * 12, [str(found) for found in outcome.found]
    assert len(server.seen) == 24 and outcome.seconds > settings.timeout_s


def test_our_own_rates_open_no_breaker(server: JudgeServer) -> None:
    server.plan = lambda _: Plan(completion("?"))
    settings = config(server, max_rpm=1, max_concurrent=1, queue_timeout_s=0.5, give_up_after=1)
    outcome = ask(settings, different(2))
    assert outcome.kinds[0] == "rate_limited" and len(server.seen) == 1
    assert "judge.max_rpm" in str(outcome.found[0])
    assert not any("in a row" in str(found) for found in outcome.found), outcome.found


def test_spending_outlives_the_process_and_a_new_run_starts_at_zero(server: JudgeServer, tmp_path: Path) -> None:
    path = str(tmp_path / "judge.sqlite")
    first = config(server, max_calls=3, cache_path=path, run_name="a")
    assert ask(first, different(2)).kinds == ["ok", "ok"]
    fresh = [request(f"later {i}") for i in range(3)]
    assert sorted(ask(first, fresh).kinds) == ["budget", "budget", "ok"]
    other = config(server, max_calls=3, cache_path=path, run_name="b")
    assert ask(other, [request(f"elsewhere {i}") for i in range(3)]).kinds == ["ok"] * 3


def test_a_known_answer_is_free_when_the_purse_is_empty(server: JudgeServer, tmp_path: Path) -> None:
    path = str(tmp_path / "judge.sqlite")
    ask(config(server, cache_path=path), [request()])
    assert ask(config(server, cache_path=path, max_calls=0), [request()]).kinds == ["ok"]
    assert len(server.seen) == 1
