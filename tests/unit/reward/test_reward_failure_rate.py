"""When failures of the judge stop a run, and how many answers wait for it; the judge is played by a function."""

import asyncio
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from verl.protocol import Prompt
from verl.utils.reward_score.judge import JudgeError, JudgeRequest, Verdict
from verl.utils.reward_score.judge.shared import use_judges
from verl.utils.reward_score.returns import FailureKind, failure_kind
from verl.workers.reward_manager import RewardFailureRateError, RewardManager

ANSWER = "<think>a</think><class>{}</class><extension>Plan {}</extension>"
Item = tuple[Prompt, str]


class PlayedJudge:
    """Fails as `fails(plan)` says for `Plan <number>`."""

    def __init__(self, fails: Callable[[int], FailureKind | None]) -> None:
        self._fails = fails
        self.asked, self.in_flight, self.most_in_flight = 0, 0, 0

    async def judge(self, request: JudgeRequest) -> Verdict:
        self.asked += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        for _ in range(3):
            await asyncio.sleep(0)
        self.in_flight -= 1
        kind = self._fails(int(request.fields["extension"].split()[1]))
        if kind is not None:
            raise JudgeError(kind, "played")
        return Verdict(dict.fromkeys(request.rubric.keys, 0.5), 0.5, False)


@pytest.fixture
def play() -> Iterator[Callable[[Callable[[int], FailureKind | None]], PlayedJudge]]:
    def start(fails: Callable[[int], FailureKind | None]) -> PlayedJudge:
        judge = PlayedJudge(fails)
        use_judges(lambda _: judge)
        return judge

    yield start
    use_judges(None)


def batch(right: int, wrong: int) -> list[Item]:
    prompt = Prompt("p", 0, "emg_dataset", np.zeros(0, np.int32), (), (), "Myopathy", {"index": 0})
    labels = ["Myopathy"] * right + ["Healthy"] * wrong
    return [(prompt, ANSWER.format(label, i)) for i, label in enumerate(labels)]


def manager(rate: float, max_concurrent: int = 32) -> RewardManager:
    return RewardManager(max_failure_rate=rate, judge={"max_concurrent": max_concurrent})


def test_a_dead_judge_stops_the_run_however_few_answers_it_is_asked_about(play: Callable) -> None:
    judge = play(lambda _: FailureKind.SERVER_ERROR)
    with pytest.raises(RewardFailureRateError) as caught:
        manager(0.1).score(batch(right=8, wrong=92))
    assert judge.asked == 8
    said = str(caught.value)
    assert "failed for 8 of the 8 answers it was asked about, above reward.max_failure_rate=0.1" in said
    assert "8 x server_error: played" in said and "8 x server_error: judge.base_url" in said


def test_failures_of_the_judge_within_the_rate_of_the_asked_pass(play: Callable) -> None:
    play(lambda plan: FailureKind.TIMEOUT if plan < 2 else None)
    scores = manager(0.25).score(batch(right=8, wrong=8))
    assert [failure_kind(s) for s in scores if not s.is_ok] == [FailureKind.TIMEOUT] * 2
    with pytest.raises(RewardFailureRateError, match="2 of the 8 answers it was asked about"):
        manager(0.2).score(batch(right=8, wrong=8))


@pytest.mark.parametrize("kind", [FailureKind.AUTH, FailureKind.REJECTED, FailureKind.BUDGET])
def test_what_no_retry_mends_stops_the_run_at_any_rate_once_every_asked_answer_failed(
    play: Callable, kind: FailureKind
) -> None:
    play(lambda _: kind)
    hint = {"auth": "judge.api_key_env", "rejected": "judge.model", "budget": "judge.max_calls"}[kind.value]
    with pytest.raises(RewardFailureRateError, match=f"all 3 answers .*no retry mends: 3 x {kind.value}.*{hint}"):
        manager(1.0).score(batch(right=3, wrong=5))
    play(lambda plan: kind if plan else None)
    assert sum(score.is_ok for score in manager(1.0).score(batch(right=3, wrong=5))) == 6


def test_passing_trouble_of_every_asked_answer_is_left_to_the_rate(play: Callable) -> None:
    play(lambda _: FailureKind.TIMEOUT)
    assert sum(score.is_ok for score in manager(1.0).score(batch(right=3, wrong=5))) == 5


def test_unchecked_scores_are_the_same_and_never_raise(play: Callable) -> None:
    play(lambda _: FailureKind.AUTH)
    scores = manager(0.0).score_unchecked(batch(right=2, wrong=1))
    assert [s.reason for s in scores] == ["auth: played"] * 2 + [None]


def test_no_more_answers_wait_for_the_judge_than_it_has_slots(play: Callable) -> None:
    judge = play(lambda _: None)
    scores = manager(0.0, max_concurrent=5).score(batch(right=60, wrong=0))
    assert all(score.total == pytest.approx(1.25) for score in scores)
    assert judge.asked == 60 and judge.most_in_flight == 5, (judge.asked, judge.most_in_flight)


def test_one_failure_of_the_judge_alone_is_no_rate(play: Callable) -> None:
    play(lambda plan: FailureKind.REJECTED if plan == 0 else None)
    assert sum(score.is_ok for score in manager(0.1).score(batch(right=1, wrong=20))) == 20
    assert sum(score.is_ok for score in manager(0.1).score(batch(right=2, wrong=20))) == 21
