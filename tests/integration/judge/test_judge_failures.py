"""Whatever the server does: bounded requests, bounded time, a failure of the right kind, never a number."""

import email.utils
import itertools
import json
import logging
import pickle
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from asking import ask, config, different, request
from judge_server import KEYS, JudgeServer, Plan, Seen, completion, error, good, verdict

from verl.utils.reward_score.judge import JudgeError, Verdict
from verl.utils.reward_score.returns import FailureKind


def in_turn(*plans: Plan) -> Callable[[Seen], Plan]:
    """The plans one after the other, the last one for ever."""
    return lambda seen: plans[min(seen.index, len(plans) - 1)]


def test_a_verdict_is_the_mean_of_the_criteria(server: JudgeServer) -> None:
    server.plan = lambda _: Plan(completion(verdict(0.5, depth=0.9)))
    found = ask(config(server), [request()]).only
    assert isinstance(found, Verdict)
    assert found.score == pytest.approx(0.6) and not found.capped
    body = server.seen[0].body
    assert body["temperature"] == 0 and body["model"] == "stub"
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["required"] == list(KEYS) and schema["additionalProperties"] is False
    grades = schema["properties"]["depth"]["enum"]
    assert len(grades) == 21 and (grades[0], grades[10], grades[-1]) == (0.0, 0.5, 1.0)


def test_a_stock_phrase_caps_the_score(server: JudgeServer) -> None:
    server.plan = lambda _: good(0.9)
    found = ask(config(server), [request("Further tests are needed.")]).only
    assert isinstance(found, Verdict) and (found.score, found.capped) == (0.4, True)


FAILURES = {
    "429": (error(429), "rate_limited", 3),
    "quota": (error(429, code="insufficient_quota"), "budget", 1),
    "500": (error(500), "server_error", 3),
    "503": (error(503), "server_error", 3),
    "hang": (Plan(hang=True), "timeout", 3),
    "slow drip": (Plan(completion(verdict()), drip_s=0.02), "timeout", 3),
    "dropped": (Plan(drop=True), "refused_connection", 3),
    "prose": (Plan(completion("I would say 0.8.")), "malformed", 2),
    "fenced json": (Plan(completion(f"```json\n{verdict()}\n```")), "malformed", 2),
    "html": (Plan("<html>busy</html>", headers={"content-type": "text/html"}), "malformed", 2),
    "not json": (Plan("{"), "malformed", 2),
    "no choices": (Plan('{"choices": []}'), "malformed", 2),
    "null text": (Plan(completion(None)), "malformed", 2),
    "cut": (Plan(completion(verdict(), finish_reason="length")), "malformed", 2),
    "missing key": (Plan(completion(json.dumps(dict.fromkeys(KEYS[:3], 0.5)))), "malformed", 2),
    "surplus key": (Plan(completion(verdict(0.5, total=1.0))), "malformed", 2),
    "text for a number": (Plan(completion(verdict().replace("0.6", '"0.6"'))), "malformed", 2),
    "true for a number": (Plan(completion(verdict().replace("0.6", "true"))), "malformed", 2),
    "NaN": (Plan(completion(verdict().replace("0.6", "NaN"))), "malformed", 2),
    "repeated key": (Plan(completion(verdict()[:-1] + ', "depth": 1.0}')), "malformed", 2),
    "above 1": (Plan(completion(verdict(0.5, depth=1.5))), "out_of_range", 2),
    "below 0": (Plan(completion(verdict(0.5, depth=-0.1))), "out_of_range", 2),
    "huge": (Plan(completion(verdict().replace("0.6", "1e999"))), "out_of_range", 2),
    "401": (error(401), "auth", 1),
    "403": (error(403), "auth", 1),
    "404": (error(404, "no such model"), "rejected", 1),
    "400": (error(400, "too long"), "rejected", 2),
}


@pytest.mark.parametrize("name", FAILURES)
def test_each_failure_has_its_kind_in_bounded_requests_and_time(server: JudgeServer, name: str) -> None:
    plan, kind, requests = FAILURES[name]
    server.plan = lambda _: plan
    outcome = ask(config(server, attempt_timeout_s=0.6), [request()])
    assert isinstance(outcome.only, JudgeError)
    assert outcome.kinds == [kind]
    assert len(server.seen) == requests
    assert outcome.seconds < 4
    assert outcome.metrics[f"judge/failed/{kind}"] == 1
    assert outcome.metrics["judge/spent/calls"] == requests


def test_a_refused_connection_has_its_kind_and_names_the_key_to_change(server: JudgeServer) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        outcome = ask(config(server, base_url=f"http://127.0.0.1:{unused.getsockname()[1]}/v1"), [request()])
    assert outcome.kinds == ["refused_connection"] and "judge.base_url" in str(outcome.only)
    assert outcome.seconds < 2


def test_a_mixed_batch_counts_every_kind_and_loses_no_answer(server: JudgeServer) -> None:
    plans = [error(429), error(500), Plan(completion("?")), Plan(completion(verdict(2.0))), Plan(hang=True), good()]

    def plan(seen: Seen) -> Plan:
        number = int(seen.body["messages"][1]["content"].split("Answer number ")[1].split(".")[0])
        return plans[number % len(plans)]

    server.plan = plan
    outcome = ask(config(server, attempt_timeout_s=1.0, timeout_s=10.0, max_concurrent=64), different(60))
    kinds = ["rate_limited", "server_error", "malformed", "out_of_range", "timeout", "ok"]
    assert outcome.kinds == kinds * 10
    assert {k: outcome.metrics[f"judge/failed/{k}"] for k in kinds[:-1]} == dict.fromkeys(kinds[:-1], 10)
    assert len(server.seen) == 10 * (3 + 3 + 2 + 2 + 3 + 1)


@pytest.mark.parametrize("form", ["seconds", "date", "milliseconds"])
def test_retry_after_is_honoured(server: JudgeServer, form: str) -> None:
    # A date has whole seconds: two ahead means between one and two.
    waits = {
        "seconds": {"retry_after": "1"},
        "date": {"retry_after": email.utils.formatdate(time.time() + 2, usegmt=True)},
        "milliseconds": {"retry_after_ms": "1000"},
    }
    server.plan = in_turn(error(429, **waits[form]), good())
    outcome = ask(config(server), [request()])
    assert outcome.kinds == ["ok"]
    first, second = (seen.at for seen in server.seen)
    assert 0.9 <= second - first <= 2.5


def test_retry_after_pauses_the_other_answers_too(server: JudgeServer) -> None:
    server.plan = in_turn(error(429, retry_after="1"), good())
    outcome = ask(config(server, max_concurrent=1), different(5))
    assert outcome.kinds == ["ok"] * 5
    assert all(seen.at - server.seen[0].at >= 0.99 for seen in server.seen[1:])


def test_a_pause_longer_than_the_limit_fails_at_once(server: JudgeServer) -> None:
    server.plan = lambda _: error(429, retry_after="3600")
    outcome = ask(config(server, max_concurrent=4), different(100))
    assert outcome.kinds == ["rate_limited"] * 100
    assert len(server.seen) <= 4 and outcome.seconds < 2


@pytest.mark.parametrize("value", ["soon", "-5", "nan", "inf", "Wed, 99 Foo 2026"])
def test_an_unreadable_retry_after_means_ordinary_backoff(server: JudgeServer, value: str) -> None:
    server.plan = in_turn(error(429, retry_after=value), good())
    outcome = ask(config(server), [request()])
    assert outcome.kinds == ["ok"] and outcome.seconds < 1


def test_a_passing_trouble_is_survived(server: JudgeServer) -> None:
    server.plan = in_turn(error(500), Plan(drop=True), good(0.7))
    found = ask(config(server), [request()]).only
    assert isinstance(found, Verdict) and found.score == pytest.approx(0.7)


def test_the_total_limit_holds_over_all_attempts(server: JudgeServer) -> None:
    server.plan = lambda _: Plan(hang=True)
    outcome = ask(config(server, timeout_s=0.7, attempt_timeout_s=0.5, max_retries=50), [request()])
    assert outcome.kinds == ["timeout"] and outcome.seconds < 1.2


def test_a_batch_on_a_dead_server_ends_soon(server: JudgeServer) -> None:
    server.plan = lambda _: Plan(hang=True)
    settings = config(server, timeout_s=0.6, attempt_timeout_s=0.5, max_concurrent=8, give_up_after=8, max_retries=0)
    outcome = ask(settings, different(400))
    assert outcome.kinds == ["timeout"] * 400
    assert len(server.seen) <= 16 and outcome.seconds < 3


def test_waiting_for_a_slot_is_limited_too(server: JudgeServer) -> None:
    server.plan = lambda _: good(delay_s=0.5)
    outcome = ask(config(server, max_concurrent=1, queue_timeout_s=0.7), different(4))
    assert sorted(outcome.kinds) == ["ok", "ok", "timeout", "timeout"] and outcome.seconds < 2


def test_a_wrong_key_ends_the_asking_with_one_message(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = "sk-very-secret-123"
    monkeypatch.setenv("JUDGE_KEY", key)
    server.plan = lambda seen: error(401, f"Incorrect API key provided: {seen.headers['authorization']}")
    with caplog.at_level(logging.DEBUG):
        outcome = ask(config(server, api_key_env="JUDGE_KEY", max_concurrent=4), different(50))
    assert server.seen[0].headers["authorization"] == f"Bearer {key}"
    assert outcome.kinds == ["auth"] * 50
    assert len(server.seen) <= 4
    (reason,) = {str(found) for found in outcome.found}
    assert "JUDGE_KEY" in reason and "401" in reason
    assert sum(record.name.startswith("verl") for record in caplog.records) == 1


def test_the_key_is_in_no_message_log_or_file(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    key = "sk-very-secret-123"
    monkeypatch.setenv("JUDGE_KEY", key)
    plans = [error(s, f"your key {key} failed") for s in (400, 404, 429, 500)] + [good()]
    server.plan = lambda seen: plans[seen.index % len(plans)]
    settings = config(server, api_key_env="JUDGE_KEY", max_retries=0, cache_path=f"{tmp_path}/judge.sqlite")
    with caplog.at_level(logging.DEBUG):
        outcomes = [ask(settings, [r]) for r in different(8)]
    assert any(not isinstance(o.only, Verdict) for o in outcomes) and any(isinstance(o.only, Verdict) for o in outcomes)
    texts = [repr(o.only) for o in outcomes] + [str(o.only) for o in outcomes] + [caplog.text, repr(settings)]
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    assert files and not any(key in text for text in texts) and not any(key.encode() in data for data in files)


def test_a_missing_key_is_said_and_nothing_is_asked(server: JudgeServer) -> None:
    outcome = ask(config(server, api_key_env="JUDGE_KEY_THAT_IS_NOT_SET"), different(3))
    assert outcome.kinds == ["auth"] * 3 and not server.seen
    assert "JUDGE_KEY_THAT_IS_NOT_SET" in str(outcome.found[0])


def test_one_forbidden_answer_does_not_end_a_working_judge(server: JudgeServer) -> None:
    server.plan = lambda seen: error(403) if seen.index == 1 else good()
    outcome = ask(config(server, max_concurrent=1), different(4))
    assert outcome.kinds == ["ok", "auth", "ok", "ok"]


def test_a_server_without_json_schema_is_asked_without(server: JudgeServer) -> None:
    server.plan = lambda seen: error(400, "response_format is not supported") if seen.has_schema else good()
    outcome = ask(config(server, max_concurrent=1), different(5))
    assert outcome.kinds == ["ok"] * 5
    assert [seen.has_schema for seen in server.seen] == [True] + [False] * 5


def test_without_structured_output_no_schema_is_sent_and_the_reply_is_read_as_strictly(server: JudgeServer) -> None:
    server.plan = in_turn(good(0.7), Plan(completion(f"Sure: {verdict(0.7)}")))
    settings = config(server, structured_output=False, max_concurrent=1)
    assert ask(settings, different(2)).kinds == ["ok", "malformed"]
    assert not any(seen.has_schema for seen in server.seen)


def test_one_refused_answer_does_not_cost_the_others_the_schema(server: JudgeServer) -> None:
    server.plan = lambda seen: error(400, "too long") if b"number 0." in seen.raw else good()
    outcome = ask(config(server, max_concurrent=1), different(4))
    assert outcome.kinds == ["rejected", "ok", "ok", "ok"]
    assert [seen.has_schema for seen in server.seen] == [True, False, True, True, True]


def test_an_error_travels_between_processes() -> None:
    found = pickle.loads(pickle.dumps(JudgeError(FailureKind.TIMEOUT, "late", status=408, retry_after_s=3.0)))
    assert (found.kind, str(found), found.status, found.retry_after_s) == (FailureKind.TIMEOUT, "late", 408, 3.0)


def test_attempts_back_off_with_jitter(server: JudgeServer) -> None:
    server.plan = lambda _: error(500)
    ask(config(server, backoff_s=0.2, max_retries=4), [request()])
    gaps = [b.at - a.at for a, b in itertools.pairwise(server.seen)]
    assert all(gap <= 0.2 * 2**i + 0.1 for i, gap in enumerate(gaps)) and len(gaps) == 4
    assert len({round(gap, 3) for gap in gaps}) > 1
