"""Invariants of the reward adapter: call shapes, return shapes, failures."""

import asyncio
import functools
import logging
import math
import sys
import threading
import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from verl.protocol import Score
from verl.utils.reward_score.adapter import RewardFunction
from verl.utils.reward_score.returns import FailureKind, failure_kind, to_score

CLASSES = ("Desktop", "Laptop")
CALL: dict[str, Any] = {"data_source": "s", "solution_str": "text", "ground_truth": "Laptop", "classes": CLASSES}


def read(value: Any, classes: tuple[str, ...] | None = CLASSES) -> Score:
    return to_score(value, ground_truth="Laptop", classes=classes)


@pytest.mark.parametrize(
    "value",
    [1, 1.0, True, np.float32(1), np.int64(1), np.bool_(True), np.array(1.0), torch.tensor(1.0), Fraction(1)],
    ids=lambda v: type(v).__name__,
)
def test_a_single_number_is_the_reward(value: Any) -> None:
    score = read(value)
    assert (score.total, dict(score.parts), score.prediction) == (1.0, {}, None)


def test_a_dict_gives_its_score_and_logs_the_rest() -> None:
    score = read({"score": np.float32(0.5), "acc": True, "pred": "Laptop", "note": "why"})
    assert (score.total, score.prediction) == (0.5, "Laptop")
    assert score.extra == {"acc": True, "pred": "Laptop", "note": "why"}


def test_the_fork_tuple_gives_parts_and_a_label() -> None:
    score = read((1.0, 1, 1, 1))
    assert (score.total, score.prediction, dict(score.parts)) == (1.0, "Laptop", {"format": 1.0, "label": 1.0})
    wrong = read((0.1, np.float32(1), np.int64(0), 1))
    assert (wrong.total, wrong.prediction, wrong.parts["label"]) == (0.1, "Desktop", 0.0)


def test_format_zero_means_unparsed_whatever_the_id() -> None:
    score = read((0.0, 0, 1, 1))
    assert (score.is_ok, score.total, score.prediction, score.parts["label"]) == (True, 0.0, None, 0.0)


@pytest.mark.parametrize("pred_id", [-1, 2, None])
def test_an_id_that_is_no_class_is_unparsed(pred_id: Any) -> None:
    assert read((0.1, 1, pred_id, 1)).prediction is None


def test_without_classes_an_equal_id_is_the_ground_truth() -> None:
    assert read((1.0, 1, 7, 7), None).prediction == "Laptop"
    assert read((0.1, 1, 6, 7), None).prediction == "6"
    assert read((0.1, 1, -1, -1), None).prediction is None


def test_the_fifth_entry_is_the_extension_part() -> None:
    assert read((1.25, 1, 1, 1, 0.5)).parts["extension"] == 0.5
    assert "extension" not in read((0.1, 1, 0, 1, None)).parts
    assert failure_kind(read((1.25, 1, 1, 1, math.nan))) is FailureKind.NOT_FINITE


@pytest.mark.parametrize("value", [(0.5, "why"), [0.5, 1, 2, 3], (0.5,), (0.5, "a", "b", "c")], ids=str)
def test_another_sequence_gives_its_first_entry_with_one_warning(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    function = RewardFunction(lambda solution_str: value)
    scores = [function.score(**CALL) for _ in range(3)]
    assert [s.total for s in scores] == [0.5] * 3
    assert len(caplog.records) == 1 and "ignored" in caplog.text


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, FailureKind.NO_VALUE),
        (math.nan, FailureKind.NOT_FINITE),
        (np.float32("inf"), FailureKind.NOT_FINITE),
        (torch.tensor(math.nan), FailureKind.NOT_FINITE),
        (10**400, FailureKind.NOT_FINITE),
        ({"score": None}, FailureKind.NO_VALUE),
        ({"score": math.nan}, FailureKind.NOT_FINITE),
        ({"reward": 1.0}, FailureKind.BAD_RETURN),
        ((None, 1, 0, 0), FailureKind.NO_VALUE),
        ((1.0, math.nan, 0, 0), FailureKind.NOT_FINITE),
        ((math.nan, "why"), FailureKind.NOT_FINITE),
        ((), FailureKind.BAD_RETURN),
        ("1.0", FailureKind.BAD_RETURN),
        (1 + 0j, FailureKind.BAD_RETURN),
        (np.array([1.0, 2.0]), FailureKind.BAD_RETURN),
        pytest.param(object(), FailureKind.BAD_RETURN, id="object"),
    ],
    ids=repr,
)
def test_what_is_no_finite_number_is_a_failed_score(value: Any, kind: FailureKind) -> None:
    score = read(value)
    assert not score.is_ok and failure_kind(score) is kind
    with pytest.raises(ValueError, match="failed score"):
        _ = score.total


def test_a_score_passes_through() -> None:
    score = Score.failed("judge: budget spent")
    assert read(score) is score and failure_kind(score) is FailureKind.OTHER


def keywords(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    return float((data_source, solution_str, ground_truth) == ("s", "text", "Laptop"))


def fork(predict_str: str, ground_truth: str) -> tuple[float, int, int, int]:
    return float((predict_str, ground_truth) == ("text", "Laptop")), 1, 1, 1


def anything(**kwargs: Any) -> float:
    return float(sorted(kwargs) == ["data_source", "extra_info", "ground_truth", "solution_str"])


def fork_with_more(predict_str: str, ground_truth: str, **kwargs: Any) -> float:
    return float(sorted(kwargs) == ["data_source", "extra_info"])


class Callable:
    def __call__(self, solution_str: str, ground_truth: str) -> float:
        return 1.0


@pytest.mark.parametrize(
    "function",
    [
        keywords,
        fork,
        anything,
        fork_with_more,
        Callable(),
        functools.partial(keywords, extra_info=None),
        lambda solution_str: 1,
    ],
)
def test_every_call_shape_is_filled(function: Any) -> None:
    assert RewardFunction(function).score(**CALL).total == 1.0


def test_reward_kwargs_reach_the_function() -> None:
    def scaled(solution_str: str, *, scale: float) -> float:
        return scale

    assert RewardFunction(scaled, reward_kwargs={"scale": 0.25}).score(**CALL).total == 0.25


def batch(solution_strs: list[str], ground_truths: list[str]) -> list[float]:
    return []


@pytest.mark.parametrize(
    ("function", "kwargs", "text"),
    [
        (lambda a, b: 1, {}, r"no parameter solution_str.*found \(a, b\)"),
        (lambda solution_str, tokenizer: 1, {}, r"requires \['tokenizer'\].*found \(solution_str, tokenizer\)"),
        (lambda solution_str, ground_truth, /: 1, {}, "no parameter solution_str"),
        (lambda solution_str: 1, {"scale": 1}, r"\['scale'\] are no parameters.*found \(solution_str\)"),
        (lambda **kw: 1, {"ground_truth": 1}, r"\['ground_truth'\], which the trainer fills"),
        (batch, {}, "whole batch"),
        (lambda: 1, {}, r"found \(\)"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_at_start(function: Any, kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        RewardFunction(function, name="f", reward_kwargs=kwargs)


def test_the_function_cannot_change_the_extra_info() -> None:
    def vandal(solution_str: str, extra_info: dict[str, Any]) -> float:
        extra_info["tags"].append("x")
        extra_info.clear()
        return 1.0

    extra = {"index": 3, "tags": ["a"]}
    assert RewardFunction(vandal).score(**CALL, extra_info=extra).is_ok
    assert extra == {"index": 3, "tags": ["a"]}


def raising(solution_str: str) -> float:
    if solution_str == "exit":
        sys.exit(3)
    raise KeyError(solution_str)


def test_an_exception_is_a_failed_score_and_its_traceback_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    function = RewardFunction(raising)
    with caplog.at_level(logging.WARNING):
        scores = [function.score(**CALL | {"solution_str": f"answer {i}"}) for i in range(5)]
    assert [failure_kind(s) for s in scores] == [FailureKind.EXCEPTION] * 5
    assert scores[3].reason == "exception: KeyError: 'answer 3'"
    assert len(caplog.records) == 1 and "raise KeyError(solution_str)" in caplog.text


def test_a_function_that_exits_the_program_fails_its_answer_only() -> None:
    call = CALL | {"solution_str": "exit"}
    assert failure_kind(RewardFunction(raising).score(**call)) is FailureKind.EXCEPTION
    assert failure_kind(asyncio.run(RewardFunction(raising, timeout_s=5).score_async(**call))) is FailureKind.EXCEPTION


def test_a_plain_function_that_returns_a_coroutine_fails() -> None:
    async def late() -> float:
        return 1.0

    assert failure_kind(RewardFunction(lambda solution_str: late()).score(**CALL)) is FailureKind.BAD_RETURN


async def judge(solution_str: str, ground_truth: str) -> float:
    match solution_str:
        case "slow":
            await asyncio.sleep(30)
        case "cancel":
            raise asyncio.CancelledError
        case "own timeout":
            raise TimeoutError("of my own")
    return 1.0


def slow(solution_str: str) -> float:
    if solution_str == "slow":
        time.sleep(30)
    return 1.0


@pytest.mark.parametrize("function", [judge, slow])
def test_a_call_over_its_time_limit_is_a_failed_score(function: Any) -> None:
    adapted = RewardFunction(function, timeout_s=0.1)
    assert adapted.needs_loop
    start = time.perf_counter()
    score = asyncio.run(adapted.score_async(**CALL | {"solution_str": "slow"}))
    assert failure_kind(score) is FailureKind.TIMEOUT and "0.1 s" in str(score.reason)
    assert time.perf_counter() - start < 5
    assert asyncio.run(adapted.score_async(**CALL)).total == 1.0


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="the system keeps no clock per thread")
def test_a_late_call_beside_one_that_kept_the_interpreter_is_told_apart_from_a_late_call() -> None:
    end = threading.Event()

    def function(solution_str: str) -> float:
        while solution_str == "spin" and not end.is_set():
            pass
        end.wait(30)
        return 1.0

    adapted = RewardFunction(function, timeout_s=1.0)

    async def kinds(texts: list[str]) -> list[FailureKind]:
        calls = (adapted.score_async(**CALL | {"solution_str": text}) for text in texts)
        return [failure_kind(score) for score in await asyncio.gather(*calls)]

    try:
        assert asyncio.run(kinds(["wait", "wait"])) == [FailureKind.TIMEOUT] * 2
        assert asyncio.run(kinds(["wait", "spin"])) == [FailureKind.STARVED, FailureKind.TIMEOUT]
    finally:
        end.set()


@pytest.mark.parametrize("text", ["cancel", "own timeout"])
def test_an_error_that_looks_like_our_time_limit_is_an_exception(text: str) -> None:
    score = asyncio.run(RewardFunction(judge, timeout_s=5).score_async(**CALL | {"solution_str": text}))
    assert failure_kind(score) is FailureKind.EXCEPTION


@pytest.mark.parametrize("limit", [0, -1.0])
def test_a_time_limit_that_no_call_could_keep_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="time limit"):
        RewardFunction(keywords, timeout_s=limit)
