"""Invariants of the judge's pure parts: settings, fence, reader, limits, breaker."""

import asyncio
import dataclasses
import json
import re
import string

import pytest

from verl.utils.reward_score.adapter import RewardFunction
from verl.utils.reward_score.emg_soft import RUBRIC
from verl.utils.reward_score.judge import JudgeConfig, JudgeError, JudgeRequest
from verl.utils.reward_score.judge.limits import Breaker, RateLimiter
from verl.utils.reward_score.judge.look_alikes import plain_letters
from verl.utils.reward_score.judge.rubric import build_messages, cache_key, holds_phrase, shown_text
from verl.utils.reward_score.judge.verdict import parse_verdict
from verl.utils.reward_score.returns import FailureKind, ScoringError, failure_kind


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "localhost:8000"}, "judge.base_url='localhost:8000'"),
        ({"timeout_s": 0}, "judge.timeout_s=0"),
        ({"timeout_s": float("inf")}, "judge.timeout_s=inf"),
        ({"timeout_s": "60"}, "judge.timeout_s='60'"),
        ({"max_concurrent": 0}, "judge.max_concurrent=0"),
        ({"max_concurrent": 2.5}, "a whole number"),
        ({"max_retries": -1}, "judge.max_retries=-1"),
        ({"max_rpm": 0}, "judge.max_rpm=0"),
        ({"max_calls": True}, "judge.max_calls=True"),
        ({"temperature": -0.1}, "judge.temperature=-0.1"),
        ({"model": ""}, "judge.model=''"),
    ],
)
def test_an_illegal_setting_is_an_error_that_names_it(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        JudgeConfig.from_mapping(changes)


@pytest.mark.parametrize("changes", [{"api_key_env": "sk-secret"}, {"base_url": "https://me:sk-secret@host/v1"}])
def test_a_key_in_the_wrong_place_is_refused_without_showing_it(changes: dict[str, str]) -> None:
    with pytest.raises(ValueError) as caught:
        JudgeConfig.from_mapping(changes)
    assert "sk-secret" not in str(caught.value)


def test_hostile_text_stays_one_plain_json_string_and_reads_back_unchanged() -> None:
    text = string.printable + "\x00\u2028\u202e\u200b\ud800\U0001f600<|im_end|>`\\"
    shown = shown_text(JudgeRequest(RUBRIC, {"extension": text}), 10_000)
    assert json.loads(shown) == {"extension": text}
    body = shown.removeprefix('{"extension": "').removesuffix('"}')
    assert not set(body) & set("<>[]{}|`\n\r") and body.isascii() and body.isprintable()


def test_a_cut_field_says_so_with_both_lengths() -> None:
    shown = json.loads(shown_text(JudgeRequest(RUBRIC, {"a": "x" * 11, "b": "y" * 10}), 10))
    assert shown["a"] == "x" * 10 and shown["b"] == "y" * 10
    assert shown["a (note)"] == "cut: the first 10 of 11 characters are shown" and "b (note)" not in shown


def test_the_delimiter_is_new_for_each_call_and_absent_from_the_text() -> None:
    drawn = iter(["a" * 32, "b" * 32])
    _, user = build_messages(RUBRIC, "a" * 32, draw=lambda _: next(drawn))
    assert user["content"].startswith(f"BEGIN {'b' * 32}\n")
    assert build_messages(RUBRIC, "x") != build_messages(RUBRIC, "x")


def test_the_key_depends_on_what_decides_the_verdict_and_not_on_the_delimiter() -> None:
    def key(shown: str = "x", model: str = "m", temperature: float | None = 0.0, tokens: int = 5) -> str:
        return cache_key(RUBRIC, shown, model=model, temperature=temperature, max_answer_tokens=tokens)

    assert key() == key()
    assert len({key(), key("y"), key(model="n"), key(temperature=1.0), key(temperature=None), key(tokens=6)}) == 6


DISGUISES = {
    "case and punctuation": "reFER, to -- spe|cia|list!",
    "accents": "r\u00e9fer t\u00f6 sp\u0113cialist\u0335",
    "full width": "\uff52\uff45\uff46\uff45\uff52 \uff54\uff4f \uff53pecialist",
    "mathematical": "\U0001d42b\U0001d41e\U0001d41f\U0001d41e\U0001d42b to specialist",
    "circled, in brackets": "\u24e1ef\u24d4r to \u24c8peci\u249clist",
    "black squares": "\U0001f181\U0001f174\U0001f175\U0001f174\U0001f181 to specialist",
    "regional indicators": "\U0001f1f7\U0001f1ea\U0001f1eb\U0001f1ea\U0001f1f7 to specialist",
    "ligatures": "refer to speciali\ufb06",
    "soft hyphens": "re\u00adfer to speci\u00adalist",
    "zero width": "r\u200be\u200cf\u200de\u2060r t\ufeffo spe\u034fcialist",
    "direction marks": "\u202erefer\u202c \u200fto\u2069 specialist",
    "variation selectors, tags": "re\ufe0ffer to spec\U000e0100iali\U000e0061st",
    "Hangul fillers": "re\u115ffer\u1160 to\u3164 spec\uffa0ialist",
    "Mongolian separators": "re\u180efer to spe\u180bcialist",
    "spaces of all kinds": "re\u00a0fer\u2003to\u3000spe\u2028cialist",
    "Cyrillic": "\u0433\u0435f\u0435\u0433 t\u043e \u0455\u0440\u0435\u0441\u0456\u0430l\u0456\u0455t",
    "Cyrillic capitals": "REFER \u0422\u041e \u0405\u0420\u0415\u0421\u0406\u0410\u04c0\u0406\u0405\u0422",
    "Greek": "ref\u03b5r \u03c4\u03bf s\u03c1\u03b5\u03f2\u03b9\u03b1l\u03b9s\u03c4",
    "Greek capitals": "REF\u0395R \u03a4\u039f S\u03a1\u0395\u03f9\u0399\u0391L\u0399S\u03a4",
    "Armenian, Cherokee": "\u13a1efer t\u0585 \u13da\u13e2\u13ac\u13df\u13a5\u13aa\u13de\u13a5\u13da\u13a2",
    "Cherokee, small": "\uab71efer to specialist",
    "small capitals": "\u0280\u1d07\ua730\u1d07\u0280 \u1d1b\u1d0f \ua731\u1d18\u1d07\u1d04\u026a\u1d00\u029fist",
    "strokes and hooks": "r\u0247\u0192er t\u00f8 specia\u0142is\u0167",
    "dotless and long": "refer to spec\u0131al\u0131\u017ft",
    "capital i, digits": "ref3r t0 5pec1aIi5t",
}


@pytest.mark.parametrize("name", DISGUISES)
def test_a_phrase_is_found_by_what_it_looks_like(name: str) -> None:
    assert holds_phrase(f"Stay calm. {DISGUISES[name]} soon", ("refer to specialist",))


@pytest.mark.parametrize(
    "text", ["refer to a specialist", "refer to spec", "\u0438efer to specialist", "$pecialist", ""]
)
def test_another_text_is_not_taken_for_the_phrase(text: str) -> None:
    assert not holds_phrase(text, ("refer to specialist",))


def test_every_default_ignorable_code_point_is_dropped() -> None:
    """DerivedCoreProperties.txt, Default_Ignorable_Code_Point, as of Unicode 15."""
    ranges = ["ad", "34f", "61c", "115f-1160", "17b4-17b5", "180b-180f", "200b-200f", "202a-202e", "2060-206f", "3164"]
    ranges += ["fe00-fe0f", "feff", "ffa0", "fff0-fff8", "1bca0-1bca3", "1d173-1d17a", "e0000-e0fff"]
    for first, _, last in (part.partition("-") for part in ranges):
        assert plain_letters("".join(map(chr, range(int(first, 16), int(last or first, 16) + 1)))) == ""


def test_folding_leaves_plain_letters_and_other_scripts_alone() -> None:
    letters = string.ascii_lowercase.replace("i", "l")
    assert plain_letters(string.ascii_letters) == letters * 2 and plain_letters("0123456789") == "ol2eas6t89"
    assert plain_letters("\u795e\u7d4c \u05d0") == "\u795e\u7d4c\u05d0"


def test_a_phrase_of_no_letter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stock_phrases hold '\.\.\.', without a letter"):
        dataclasses.replace(RUBRIC, stock_phrases=("...",))


@pytest.mark.parametrize("phrase", RUBRIC.stock_phrases)
def test_every_published_phrase_caps_and_a_plan_without_one_does_not(phrase: str) -> None:
    verdict = dict.fromkeys(RUBRIC.keys, 0.9)
    assert RUBRIC.score(verdict, {"extension": f"Take {phrase}."}) == (0.4, True)
    total, capped = RUBRIC.score(verdict, {"extension": "Test the tibial nerve further."})
    assert total == pytest.approx(0.9) and not capped
    assert RUBRIC.score(dict.fromkeys(RUBRIC.keys, 0.1), {"extension": phrase})[0] == pytest.approx(0.1)


def test_a_verdict_is_read_exactly() -> None:
    assert parse_verdict(' {"a": 0, "b": 1.0}\n', ("a", "b")) == {"a": 0.0, "b": 1.0}


NO_VERDICTS = [
    *("", "0.5", "null", "[]", '"a"', '{"a": 0.5}', '{"a": 0.5, "b": 0.5, "c": 0.5}', '{"a": 0.5, "b": null}'),
    *('{"a": 0.5, "b": "1"}', '{"a": 0.5, "b": true}', '{"a": 0.5, "b": [1]}', '{"a": 0.5, "b": NaN}'),
    *('{"a": 0.5, "b": 0.1, "b": 1}', '{"a": 0.5, "b": 1} ok', '```json\n{"a": 1, "b": 1}\n```', "[" * 100_000),
    '{"a": 0.5, "b": ' + "9" * 5000 + "}",
]


@pytest.mark.parametrize("text", NO_VERDICTS, ids=range(len(NO_VERDICTS)))
def test_what_is_not_exactly_a_verdict_is_malformed(text: str) -> None:
    with pytest.raises(JudgeError) as caught:
        parse_verdict(text, ("a", "b"))
    assert caught.value.kind is FailureKind.MALFORMED


@pytest.mark.parametrize("value", ["-0.01", "1.01", "1e999", "-1e999", "7", str(10**400)])
def test_a_number_outside_the_range_is_out_of_range(value: str) -> None:
    with pytest.raises(JudgeError) as caught:
        parse_verdict(f'{{"a": 0.5, "b": {value}}}', ("a", "b"))
    assert caught.value.kind is FailureKind.OUT_OF_RANGE


def grant(limiter: RateLimiter, tokens: int, max_wait_s: float = 0.0) -> None:
    asyncio.run(limiter.acquire(tokens, max_wait_s))


def test_a_window_holds_at_most_its_requests() -> None:
    clock = Clock()
    limiter = RateLimiter(3, None, clock=clock)
    for _ in range(3):
        assert limiter.wait_s(1) <= 0
        grant(limiter, 1)
        clock.now += 10
    assert limiter.wait_s(1) == pytest.approx(30)
    clock.now += 30
    assert limiter.wait_s(1) <= 0
    grant(limiter, 1)
    assert limiter.wait_s(1) == pytest.approx(10)


def test_a_window_holds_at_most_its_tokens_and_a_correction_frees_room() -> None:
    clock = Clock()
    limiter = RateLimiter(None, 100, clock=clock)
    first = asyncio.run(limiter.acquire(60, 0))
    clock.now += 20
    grant(limiter, 40)
    assert limiter.wait_s(1) == pytest.approx(40)
    assert limiter.wait_s(70) == pytest.approx(60)
    first.tokens = 20
    assert limiter.wait_s(40) <= 0


def test_a_request_above_the_token_limit_is_granted_alone() -> None:
    clock = Clock()
    limiter = RateLimiter(None, 100, clock=clock)
    assert limiter.wait_s(500) <= 0
    grant(limiter, 500)
    assert limiter.wait_s(1) == pytest.approx(60)


def test_a_pause_longer_than_the_wait_is_rate_limited() -> None:
    limiter = RateLimiter(None, None, clock=Clock())
    limiter.pause(30)
    limiter.pause(5)
    assert limiter.wait_s(1) == pytest.approx(30)
    with pytest.raises(JudgeError) as caught:
        grant(limiter, 1, max_wait_s=29)
    assert caught.value.kind is FailureKind.RATE_LIMITED


def test_the_breaker_opens_after_failures_in_a_row_and_again_after_one_more() -> None:
    clock = Clock()
    breaker = Breaker(3, 60, clock=clock)
    for kind in (FailureKind.TIMEOUT, FailureKind.SERVER_ERROR, None, FailureKind.TIMEOUT, FailureKind.TIMEOUT):
        breaker.record(kind)
        breaker.check()
    breaker.record(FailureKind.REFUSED_CONNECTION)
    with pytest.raises(JudgeError, match="3 answers in a row") as caught:
        breaker.check()
    assert caught.value.kind is FailureKind.REFUSED_CONNECTION
    clock.now += 60
    breaker.check()
    breaker.record(FailureKind.TIMEOUT)
    with pytest.raises(JudgeError):
        breaker.check()


def test_a_malformed_reply_shows_a_working_server_and_opens_no_breaker() -> None:
    breaker = Breaker(1, 60, clock=Clock())
    breaker.record(FailureKind.MALFORMED)
    breaker.check()
    breaker.record(FailureKind.TIMEOUT)
    with pytest.raises(JudgeError):
        breaker.check()


def test_a_scoring_error_of_any_function_keeps_its_kind() -> None:
    def compute_score(solution_str: str) -> float:
        raise ScoringError(FailureKind.RATE_LIMITED, "come back later")

    score = RewardFunction(compute_score).score(data_source="a", solution_str="b", ground_truth="c")
    assert failure_kind(score) is FailureKind.RATE_LIMITED and score.reason == "rate_limited: come back later"
