"""Invariants of the reward manager and its metrics."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from verl.protocol import Prompt, Score
from verl.utils import reward_score
from verl.utils.reward_score.custom import CustomFunction
from verl.workers.reward_manager import RewardFailureRateError, RewardItem, RewardManager, reward_metrics

GOOD = "<think>a</think><class>{}</class>"


def prompt(row: int = 0, truth: str = "Desktop", source: str = "computer_dataset") -> Prompt:
    return Prompt(f"train-{row}", row, source, np.zeros(1, np.int32), (), (), truth, {"index": row})


def custom(folder: Path, body: str, **kwargs: float) -> CustomFunction:
    path = folder / "reward.py"
    path.write_text(body)
    return CustomFunction(str(path), reward_kwargs=kwargs)


SOMETIMES = """
def compute_score(solution_str, ground_truth):
    if solution_str == "bad":
        raise RuntimeError("no")
    return 1.0
"""


@pytest.mark.parametrize("name", ["naive", "ts", "batch", "prime", "dapo", "rate_limited"])
def test_every_manager_name_scores_in_order(name: str) -> None:
    items: list[RewardItem] = [(prompt(), GOOD.format("Desktop")), (prompt(), GOOD.format("Laptop")), (prompt(), "?")]
    scores = RewardManager(name, max_failure_rate=0).score(items)
    assert [s.total for s in scores] == [1.0, 0.1, 0.0]
    assert [s.prediction for s in scores] == ["Desktop", "Laptop", None]


def test_an_unknown_manager_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"'naiv': did you mean 'naive'\?.*custom_reward_function.path"):
        RewardManager("naiv", max_failure_rate=0)


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_a_failure_rate_that_is_no_share_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="max_failure_rate"):
        RewardManager(max_failure_rate=rate)


def test_the_strict_format_reaches_the_rule() -> None:
    item = (prompt(), "<class>Desktop</class>")
    assert RewardManager(max_failure_rate=0).score([item])[0].total == 1.0
    assert RewardManager(max_failure_rate=0, answer_format="strict").score([item])[0].total == 0.0


def test_one_raising_answer_among_64_fails_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager = RewardManager(max_failure_rate=0.1, custom=custom(tmp_path, SOMETIMES))
    with caplog.at_level(logging.WARNING):
        scores = manager.score([(prompt(i), "bad" if i == 17 else "fine") for i in range(64)])
    assert [i for i, s in enumerate(scores) if not s.is_ok] == [17]
    assert len(caplog.records) == 1


def test_above_the_failure_rate_the_run_stops_with_counts(tmp_path: Path) -> None:
    manager = RewardManager(max_failure_rate=0.25, custom=custom(tmp_path, SOMETIMES))
    assert len(manager.score([(prompt(), t) for t in ("bad", "a", "b", "c")])) == 4
    with pytest.raises(
        RewardFailureRateError, match=r"2 of 4 .*max_failure_rate=0.25: 2 x exception: RuntimeError: no"
    ):
        manager.score([(prompt(), t) for t in ("bad", "a", "b", "bad")])


def test_an_unregistered_source_fails_its_answers_with_the_way_out() -> None:
    with pytest.raises(RewardFailureRateError, match=r"'my_data' is not registered.*custom_reward_function.path"):
        RewardManager(max_failure_rate=0.5).score([(prompt(source="my_data"), "x")])


@pytest.fixture
def another_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Forgets what rows declared, as a new process knows nothing of it."""

    def forget() -> None:
        monkeypatch.setattr(reward_score, "_from_rows", {})
        reward_score._find.cache_clear()

    forget()
    yield forget
    reward_score._find.cache_clear()


def test_a_manager_in_another_process_has_built_its_rules_before_the_first_answer(
    monkeypatch: pytest.MonkeyPatch, another_process: Callable[[], None]
) -> None:
    own = Prompt("p", 0, "own_dataset", np.zeros(1, np.int32), (), (), "wet", {"classes": ["dry", "wet"]})
    driver = RewardManager(max_failure_rate=0)
    driver.check_prompts([prompt(), own])
    spec = driver.spec
    another_process()
    worker = RewardManager(**spec)
    monkeypatch.setattr(RewardManager, "_build", lambda *_: pytest.fail("built within the time of an answer"))
    items = [RewardItem(prompt(), GOOD.format("Desktop")), RewardItem(own, GOOD.format("wet"))]
    assert [score.total for score in worker.score(items)] == [1.0, 1.0]


def test_an_empty_batch_is_no_failure() -> None:
    assert RewardManager(max_failure_rate=0).score([]) == []


def test_prompts_are_checked_at_load_naming_the_row() -> None:
    manager = RewardManager(max_failure_rate=0)
    manager.check_prompts([prompt(0), prompt(1, "laptop ")])
    with pytest.raises(ValueError, match=r"row 5 \(train-5\): ground truth 'Tablet'"):
        manager.check_prompts([prompt(0), prompt(5, "Tablet")])
    with pytest.raises(ValueError, match=r"row 6 .*'my_data' is not registered"):
        manager.check_prompts([prompt(6, source="my_data")])


def test_a_custom_function_returning_a_float_works_on_any_source(tmp_path: Path) -> None:
    manager = RewardManager(
        max_failure_rate=0,
        custom=custom(tmp_path, "def compute_score(solution_str, bonus):\n    return bonus\n", bonus=0.5),
    )
    manager.check_prompts([prompt(source="my_data", truth="anything")])
    assert manager.score([(prompt(source="my_data"), "x")])[0].total == 0.5


ASYNC = """
import asyncio
lock = asyncio.Lock()          # bound to the loop of its first wait, as an http client is
running = peak = 0

async def compute_score(solution_str, ground_truth):
    global running, peak
    running += 1
    peak = max(peak, running)
    await asyncio.sleep(30 if solution_str == "hang" else 0.05)
    async with lock:
        await asyncio.sleep(0.001)
    running -= 1
    return {"score": 1.0, "peak": peak}
"""


def test_async_calls_wait_together_within_the_bound_batch_after_batch(tmp_path: Path) -> None:
    manager = RewardManager(max_failure_rate=0, custom=custom(tmp_path, ASYNC), max_concurrent=4)
    start = time.perf_counter()
    for _ in range(2):
        scores = manager.score([(prompt(), "x")] * 16)
        assert [s.total for s in scores] == [1.0] * 16
    assert max(s.extra["peak"] for s in scores) == 4
    assert time.perf_counter() - start < 1.5, "32 calls of 0.05 s, 4 at a time"


def test_a_hanging_answer_fails_alone_and_in_time(tmp_path: Path) -> None:
    manager = RewardManager(max_failure_rate=0.5, custom=custom(tmp_path, ASYNC), timeout_s=0.3)
    start = time.perf_counter()
    scores = manager.score([(prompt(), t) for t in ("a", "hang", "b")])
    assert [s.is_ok for s in scores] == [True, False, True]
    assert time.perf_counter() - start < 5


def test_waiting_for_a_slot_uses_up_no_time_of_a_call(tmp_path: Path) -> None:
    body = "import time\ndef compute_score(solution_str):\n    time.sleep(0.05)\n    return 1.0\n"
    manager = RewardManager(max_failure_rate=0, custom=custom(tmp_path, body), timeout_s=0.4, max_concurrent=1)
    assert all(s.is_ok for s in manager.score([(prompt(), "x")] * 12))


def test_the_manager_works_inside_a_running_event_loop(tmp_path: Path) -> None:
    manager = RewardManager(max_failure_rate=0, custom=custom(tmp_path, ASYNC))

    async def main() -> list[Score]:
        return manager.score([(prompt(), "x")])

    assert asyncio.run(main())[0].total == 1.0


def test_metrics_count_failures_by_kind_and_average_parts_by_source() -> None:
    scores = [
        Score.ok(1.0, {"format": 1, "label": 1}, "Desktop"),
        Score.ok(0.0, {"format": 0, "label": 0}),
        Score.failed("timeout: 10 s"),
        Score.ok(0.25, extra={"acc": True, "note": "x", "odd": float("nan")}),
        Score.failed("none: the function returned None"),
    ]
    metrics = reward_metrics(["ctu", "ctu", "ctu", "mine", "empty"], scores)
    assert metrics["reward/ctu/format/mean"] == 0.5 and metrics["reward/ctu/total/mean"] == 0.5
    assert metrics["reward/mine/total/mean"] == 0.25 and metrics["reward/mine/acc/mean"] == 1.0
    assert "reward/mine/odd/mean" not in metrics and "reward/empty/total/mean" not in metrics
    assert (metrics["reward/ctu/n"], metrics["reward/empty/n"]) == (2, 0)
    assert metrics["reward/failed/count"] == 2 and metrics["reward/failed/rate"] == 0.4
    assert (metrics["reward/failed/timeout"], metrics["reward/failed/none"], metrics["reward/failed/exception"]) == (
        1,
        1,
        0,
    )


def test_the_format_rate_of_a_known_mix_is_its_share() -> None:
    items = [(prompt(i), GOOD.format("Laptop") if i % 2 else "?") for i in range(100)]
    scores = RewardManager(max_failure_rate=0).score(items)
    assert reward_metrics(["computer_dataset"] * 100, scores)["reward/computer_dataset/format/mean"] == 0.5
