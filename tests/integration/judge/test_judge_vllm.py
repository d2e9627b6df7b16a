"""The same judge code against a real vLLM OpenAI server: protocol, structured output, accounting, key and cache.

The model is random, so its grades mean nothing: what counts is that they arrive as grades, or as a failure with its
reason, and never as a number that nobody gave.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import ask, different, request
from judge_server import KEYS
from vllm_server import CONTEXT, KEY, LANE, MODEL, VllmServer, serve

from verl.utils.reward_score import emg_soft
from verl.utils.reward_score.judge import JudgeConfig, JudgeError, Verdict
from verl.utils.reward_score.returns import FailureKind, failure_kind

pytestmark = [
    pytest.mark.skipif(not LANE.is_dir(), reason=f"no vLLM for CPU in {LANE} (bash tests/run.sh installs it)"),
    pytest.mark.timeout(900),
]

ANSWER = "<think>long units</think><class>Neuropathy</class><extension>Sample soleus next.</extension>"


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    with serve(tmp_path_factory.mktemp("vllm")) as found:
        yield found


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)


def options(vllm: VllmServer, **changes: Any) -> dict[str, Any]:
    patient = {"timeout_s": 240.0, "attempt_timeout_s": 120.0, "max_retries": 1}
    return {"base_url": vllm.url, "model": MODEL, "api_key_env": "JUDGE_KEY", **patient, **changes}


def config(vllm: VllmServer, **changes: Any) -> JudgeConfig:
    return JudgeConfig(**options(vllm, **changes))


def test_the_server_lists_the_model_under_the_name_that_the_judge_uses(vllm: VllmServer) -> None:
    assert [model["id"] for model in json.loads(vllm.get("/v1/models"))["data"]] == [MODEL]


def test_structured_output_gives_grades_in_range_for_many_answers_at_once(vllm: VllmServer) -> None:
    outcome = ask(config(vllm, max_concurrent=6), different(12))
    assert outcome.kinds == ["ok"] * 12, [str(found) for found in outcome.found]
    for found in outcome.found:
        assert isinstance(found, Verdict) and tuple(found.criteria) == KEYS
        assert all(0 <= value <= 1 for value in found.criteria.values()) and 0 <= found.score <= 1
    assert outcome.metrics["judge/requests"] == outcome.metrics["judge/asked"] == 12


def test_spending_equals_what_the_server_counted_and_a_second_ask_is_free(vllm: VllmServer, tmp_path: Path) -> None:
    settings, asked = config(vllm, cache_path=f"{tmp_path}/judge.sqlite"), [request(), request("Another plan.")]
    requests, tokens = vllm.counted()
    first = ask(settings, asked)
    assert first.kinds == ["ok", "ok"], [str(found) for found in first.found]
    after = vllm.counted()
    spent = (first.metrics["judge/spent/calls"], first.metrics["judge/spent/tokens"])
    assert spent == (after[0] - requests, after[1] - tokens) and spent[1] > 200
    second = ask(settings, asked)
    assert second.found == first.found and second.metrics["judge/cached"] == 2
    assert vllm.counted() == after
    assert (second.metrics["judge/spent/calls"], second.metrics["judge/spent/tokens"]) == spent


def test_the_three_part_reward_is_ok_and_in_range(vllm: VllmServer) -> None:
    found = asyncio.run(emg_soft.compute_score(ANSWER, "Neuropathy", judge=options(vllm)))
    assert found.is_ok, found.reason
    assert found.total == pytest.approx(1.0 + 0.5 * found.parts["soft"]) and 0 <= found.parts["soft"] <= 1
    assert found.parts["soft"] == pytest.approx(sum(found.extra[f"soft/{key}"] for key in KEYS) / len(KEYS))


def test_without_structured_output_the_random_reply_is_a_failed_score_with_its_reason(vllm: VllmServer) -> None:
    judge = options(vllm, structured_output=False, max_answer_tokens=32, run_name="free")
    found = asyncio.run(emg_soft.compute_score(ANSWER, "Neuropathy", judge=judge))
    assert not found.is_ok and failure_kind(found) is FailureKind.MALFORMED, found
    outcome = ask(JudgeConfig(**judge), [request()])
    assert outcome.kinds == ["malformed"] and outcome.metrics["judge/spent/calls"] == 2


def test_a_wrong_key_a_wrong_model_and_a_text_beyond_the_context_have_their_reasons(
    vllm: VllmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_model = ask(config(vllm, model="gpt-4o"), different(2))
    assert wrong_model.kinds == ["rejected"] * 2 and "gpt-4o" in str(wrong_model.found[0])
    too_long = ask(config(vllm, max_chars=20 * CONTEXT), [request("long words " * 2 * CONTEXT), request()])
    assert too_long.kinds == ["rejected", "ok"] and str(CONTEXT) in str(too_long.found[0])
    monkeypatch.setenv("JUDGE_KEY", "sk-wrong")
    refused = ask(config(vllm), [request()]).only
    assert isinstance(refused, JudgeError) and refused.kind is FailureKind.AUTH and "JUDGE_KEY" in str(refused)
