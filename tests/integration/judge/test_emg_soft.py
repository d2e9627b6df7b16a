"""The three-part EMG reward: as a function, as a registered rule, and as a custom function of the manager."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge_server import JudgeServer, Plan, completion, error, good, verdict

from verl.protocol import Prompt, Score
from verl.utils.reward_score import emg_soft
from verl.utils.reward_score.custom import CustomFunction
from verl.utils.reward_score.returns import FailureKind, failure_kind
from verl.workers.reward_manager import RewardFailureRateError, RewardManager, reward_metrics

ANSWER = "<think>long units</think><class>{}</class><extension>{}</extension>"
PLAN = "Repeat the needle study of the left side in six weeks."


def options(server: JudgeServer, **changes: Any) -> dict[str, Any]:
    fast = {"base_url": server.url, "model": "stub", "api_key_env": None, "max_retries": 0, "timeout_s": 5.0}
    return fast | changes


def score(server: JudgeServer, text: str, truth: str = "Neuropathy", **changes: Any) -> Score:
    return asyncio.run(emg_soft.compute_score(text, truth, judge=options(server), **changes))


def prompt(row: int, truth: str = "Neuropathy", source: str = "emg_dataset") -> Prompt:
    return Prompt(f"test-{row}", row, source, np.zeros(1, np.int32), (), (), truth, {"index": row})


def test_a_right_answer_gets_half_of_the_judges_score_on_top(server: JudgeServer) -> None:
    server.plan = lambda _: good(0.6)
    found = score(server, ANSWER.format("neuropathy", PLAN))
    assert found.total == pytest.approx(0.9 + 0.1 + 0.5 * 0.6)
    assert found.parts == {"format": 1.0, "label": 1.0, "soft": pytest.approx(0.6)}
    assert found.prediction == "Neuropathy"
    assert found.extra["soft/depth"] == 0.6 and found.extra["soft/capped"] is False


@pytest.mark.parametrize(
    ("text", "total", "parts"),
    [
        (ANSWER.format("Healthy", PLAN), 0.1, {"format": 1.0, "label": 0.0}),
        ("no tags", 0.0, {"format": 0.0, "label": 0.0}),
        (ANSWER.format("Neuropathy", " "), 1.0, {"format": 1.0, "label": 1.0, "soft": 0.0}),
        ("<class>Neuropathy</class>", 1.0, {"format": 1.0, "label": 1.0, "soft": 0.0}),
    ],
)
def test_the_judge_is_not_asked_where_its_part_cannot_count(
    server: JudgeServer, text: str, total: float, parts: dict[str, float]
) -> None:
    found = score(server, text)
    assert found.total == pytest.approx(total) and dict(found.parts) == parts
    assert not server.seen


def test_the_strict_format_decides_whether_the_judge_is_asked(server: JudgeServer) -> None:
    text = "Well. " + ANSWER.format("Neuropathy", PLAN)
    assert score(server, text, answer_format="strict").total == 0.0 and not server.seen
    assert score(server, text).total > 1


def test_the_judge_sees_reasoning_class_and_extension_but_not_the_truth_or_the_plot(server: JudgeServer) -> None:
    score(server, ANSWER.format("Neuropathy", PLAN))
    shown = server.seen[0].body["messages"][1]["content"].splitlines()[1]
    assert shown == f'{{"reasoning": "long units", "class": "Neuropathy", "extension": "{PLAN}"}}'
    assert b"ground" not in server.seen[0].raw and b"image" not in server.seen[0].raw


@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        (error(429), FailureKind.RATE_LIMITED),
        (error(500), FailureKind.SERVER_ERROR),
        (Plan(completion("0.9")), FailureKind.MALFORMED),
        (Plan(completion(verdict(-1.0))), FailureKind.OUT_OF_RANGE),
        (error(401), FailureKind.AUTH),
    ],
)
def test_an_answer_that_could_not_be_judged_is_failed_and_not_lower(
    server: JudgeServer, plan: Plan, kind: FailureKind
) -> None:
    server.plan = lambda _: plan
    found = score(server, ANSWER.format("Neuropathy", PLAN))
    assert not found.is_ok and failure_kind(found) is kind


def custom(server: JudgeServer, **changes: Any) -> RewardManager:
    function = CustomFunction(str(emg_soft.__file__), reward_kwargs={"judge": options(server, **changes)})
    return RewardManager(max_failure_rate=0.5, custom=function, max_concurrent=64, timeout_s=30)


def registered(server: JudgeServer, **changes: Any) -> RewardManager:
    return RewardManager(max_failure_rate=0.5, judge=options(server, **changes))


@pytest.mark.parametrize("build", [custom, registered])
def test_both_ways_into_the_manager_give_the_same_scores(server: JudgeServer, build: Any) -> None:
    server.plan = lambda seen: error(500) if b"Plan 3" in seen.raw else good(0.5)
    manager = build(server)
    items = [(prompt(i), ANSWER.format("Neuropathy", f"Plan {i}")) for i in range(6)]
    items.append((prompt(6), ANSWER.format("Healthy", "x")))
    scores = manager.score(items)
    assert [s.total if s.is_ok else None for s in scores] == pytest.approx([1.25] * 3 + [None] + [1.25] * 2 + [0.1])
    metrics = reward_metrics(["emg_dataset"] * 7, scores)
    assert metrics["reward/failed/server_error"] == metrics["reward/failed/count"] == 1
    assert metrics["reward/emg_dataset/soft/mean"] == metrics["reward/emg_dataset/soft/depth/mean"] == 0.5
    assert metrics["reward/emg_dataset/soft/capped/mean"] == 0
    assert metrics["reward/emg_dataset/n"] == 6


def test_a_second_batch_meets_the_same_judge_and_its_cache(server: JudgeServer) -> None:
    manager = registered(server)
    items = [(prompt(i), ANSWER.format("Neuropathy", f"Plan {i}")) for i in range(4)]
    assert manager.score(items) == manager.score(items) == registered(server).score(items)
    assert len(server.seen) == 4


def test_other_sources_are_scored_by_their_rule_beside_the_judge(server: JudgeServer) -> None:
    item = (prompt(0, "Laptop", "computer_dataset"), "<think>a</think><class>Laptop</class>")
    assert registered(server).score([item])[0].total == 1.0 and not server.seen


def test_many_answers_wait_together(server: JudgeServer) -> None:
    server.plan = lambda _: good(delay_s=0.5)
    manager = registered(server, max_concurrent=64)
    scores = manager.score([(prompt(i), ANSWER.format("Neuropathy", f"Plan {i}")) for i in range(64)])
    assert all(s.is_ok for s in scores) and 32 < server.most_in_flight <= 64


def test_a_wrong_key_stops_the_run_with_one_reason(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-wrong")
    server.plan = lambda _: error(401)
    items = [(prompt(i), ANSWER.format("Neuropathy", f"Plan {i}")) for i in range(20)]
    with pytest.raises(RewardFailureRateError, match=r"20 of 20 .*: 20 x auth: .* refused the key in JUDGE_KEY"):
        registered(server, api_key_env="JUDGE_KEY").score(items)


def test_an_unknown_judge_option_is_an_error_with_a_suggestion(server: JudgeServer) -> None:
    with pytest.raises(ValueError, match=r"unknown judge option 'timeouts': did you mean 'timeout_s'\?"):
        RewardManager(max_failure_rate=0, judge={"timeouts": 3})


def test_judge_options_beside_a_custom_function_are_refused() -> None:
    with pytest.raises(ValueError, match="reward_kwargs"):
        RewardManager(max_failure_rate=0, judge={}, custom=CustomFunction(str(Path(emg_soft.__file__))))


def test_importing_needs_no_key_and_loads_no_client() -> None:
    code = "import sys, verl.utils.reward_score.emg_soft; assert not {'openai', 'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={}, cwd=Path(__file__).resolve().parents[3])
