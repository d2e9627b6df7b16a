"""What a run does with rewards: every manager's name, answers that could not be scored, and too many of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_process import rl_here
from runs import Data, Run, differences, rl_overrides

FAILING = """
from collections import Counter
from threading import Lock

lock, order, seen = Lock(), {}, Counter()

def compute_score(solution_str, extra_info):
    with lock:  # calls with a time limit run in threads
        row = extra_info["index"]
        prompt = order.setdefault(row, len(order) + 1)
        seen[row] += 1
        answer = seen[row]
    if __RULE__:
        raise RuntimeError("no score today")
    return {"score": len(solution_str) / 100, "letters": len(solution_str)}
"""


def run(work: Path, data: Data, start: Path, name: str, *overrides: str) -> Run:
    folder = work / "rewards" / name
    return rl_here(rl_overrides(data, start, folder, *overrides), folder)


def failing_run(work: Path, data: Data, start: Path, name: str, rule: str, *overrides: str) -> Run:
    """`rule` says which answers fail: `prompt` is the prompt's number in the step, `answer` the answer's, from 1."""
    path = work / f"{name}.py"
    path.write_text(FAILING.replace("__RULE__", rule))
    return run(work, data, start, name, f"custom_reward_function.path={path}", *overrides)


@pytest.fixture(scope="module")
def naive(work: Path, data: Data, start: Path) -> Run:
    return run(work, data, start, "naive", "reward_model.reward_manager=naive").ok()


@pytest.mark.parametrize("name", ["ts", "batch", "prime", "dapo", "rate_limited"])
def test_a_step_under_every_manager_name_has_the_numbers_of_naive(
    work: Path, data: Data, start: Path, naive: Run, name: str
) -> None:
    found = run(work, data, start, name, f"reward_model.reward_manager={name}").ok()
    assert not differences(found.steps[1], naive.steps[1])
    assert found.answers(1) == naive.answers(1)


def test_failed_answers_leave_their_groups_and_a_group_of_one_leaves_the_step(
    work: Path, data: Data, start: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The first group keeps one score of four, the second three, the others all.
    rule = "answer > 1 if prompt == 1 else answer == 4 if prompt == 2 else False"
    found = failing_run(work, data, start, "failing", rule, "reward.max_failure_rate=0.5").ok()
    row, answers = found.steps[1], [answer for group in found.answers(1) for answer in group["answers"]]
    ok = [answer["score"] for answer in answers if answer["failed"] is None]
    assert len(answers) == 16 and len(ok) == 12
    assert {a["failed"] for a in answers} == {None, "exception: RuntimeError: no score today"}
    assert all(a["score"] is None for a in answers if a["failed"] is not None)
    assert (row["reward/failed/count"], row["reward/failed/exception"], row["reward/failed/rate"]) == (4, 4, 0.25)
    assert (row["training/groups/dropped"], row["training/groups/failed_answers"]) == (1, 4)
    assert row["critic/score/mean"] == pytest.approx(sum(ok) / len(ok)) and row["critic/score/min"] == min(ok)
    shown = [record for record in caplog.records if "RuntimeError: no score today" in record.getMessage()]
    assert len(shown) == 1 and "Traceback" in shown[0].getMessage()


def test_above_the_failure_rate_the_run_stops_with_the_reasons_and_saves_nothing(
    work: Path, data: Data, start: Path
) -> None:
    found = failing_run(work, data, start, "stopping", "answer > 2", "reward.max_failure_rate=0.25")
    assert found.code != 0 and not (found.folder / "global_step_1").exists()
    assert "8 of 16 answers could not be scored, above reward.max_failure_rate=0.25: 8 x exception: Runt" in found.err
