"""A run that is killed while its answers are judged, and started again: what was paid for is not paid for again."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import Data, Launcher, rl_overrides

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "judge"))
from judge_server import JudgeServer, Plan, good

CONCURRENT = 2
ANSWERED = 6
"""Of 16 answers those that the judge answers before the kill; the following ones hang."""
REWARD = """
from verl.utils.reward_score.judge import JudgeConfig, JudgeRequest, Rubric, shared_judge

KEYS = ("specificity", "appropriateness", "relevance", "depth")
RUBRIC = Rubric(name="all", task="An answer.", criteria=tuple((key, "good") for key in KEYS))

async def compute_score(solution_str, ground_truth, judge):
    verdict = await shared_judge(JudgeConfig(**judge)).judge(JudgeRequest(RUBRIC, {"answer": solution_str}))
    return verdict.score
"""


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as found:
        yield found


def answers_asked(server: JudgeServer) -> Counter[str]:
    """The fenced line of every request, which holds the answer."""
    return Counter(seen.body["messages"][1]["content"].splitlines()[1] for seen in server.seen)


def test_after_a_kill_in_the_middle_of_a_step_known_answers_are_not_asked_again(
    work: Path, data: Data, tiny: Path, launcher: Launcher, server: JudgeServer
) -> None:
    folder = work / "judged"
    function = work / "judged_reward.py"
    function.write_text(REWARD)
    judge = {
        "base_url": server.url,
        "model": "stub",
        "api_key_env": "null",
        "max_concurrent": CONCURRENT,
        "cache_path": f"{folder}/judge.sqlite",
    }
    overrides = rl_overrides(
        data,
        tiny,
        folder,
        f"custom_reward_function.path={function}",
        *(f"custom_reward_function.reward_kwargs.judge.{key}={value}" for key, value in judge.items()),
        "reward.timeout=120",
        "reward.num_workers=2",
    )
    server.plan = lambda seen: good(0.5) if seen.index < ANSWERED else Plan(hang=True)
    with launcher.start("main_ppo", overrides, folder) as run:
        # Leaving the block kills every process of the run with SIGKILL.
        run.until(lambda: len(server.seen) >= ANSWERED + CONCURRENT, "questions that the judge leaves unanswered")
    time.sleep(0.5)  # nothing of the killed run may still be asking
    before = answers_asked(server)
    assert before.total() == ANSWERED + CONCURRENT and max(before.values()) == 1
    assert not run.members() and not (folder / "samples").exists(), "the step was not over"

    server.plan = lambda _: good(0.5)
    again = launcher.run("main_ppo", overrides, folder).ok()
    after = answers_asked(server)
    twice = [answer for answer, times in after.items() if times > 1]
    assert len(twice) == CONCURRENT and max(after.values()) == 2, "only what was on its way is asked for again"
    assert set(before) <= set(after) and len(after) == len({a["text"] for g in again.answers(1) for a in g["answers"]})
    assert again.steps[1]["judge/cached"] >= ANSWERED
