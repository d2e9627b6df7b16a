"""DAPO's overlong punishment: the numbers of its formula, beside a task's parts and beside a custom function."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from verl.config import load
from verl.protocol import Prompt
from verl.trainer.ppo.scoring import build_reward_manager
from verl.utils.reward_score.custom import CustomFunction
from verl.workers.reward_manager import RewardItem, RewardManager, reward_metrics

ANSWER = "<think>a</think><class>Laptop</class>"
LENGTHS = (1, 47, 48, 49, 52, 56, 63, 64)
SCRIPT = [
    "reward_model.reward_manager=dapo",
    "+reward_model.reward_kwargs.overlong_buffer_cfg.enable=True",
    "+reward_model.reward_kwargs.overlong_buffer_cfg.len=16",
    "+reward_model.reward_kwargs.overlong_buffer_cfg.penalty_factor=0.5",
    "+reward_model.reward_kwargs.overlong_buffer_cfg.log=False",
    "+reward_model.reward_kwargs.max_resp_len=64",
]
FUNCTIONS = {
    "plain": "def compute_score(solution_str):\n    return {'score': 0.25, 'acc': 1}\n",
    "waiting": "async def compute_score(solution_str):\n    return {'score': 0.25, 'acc': 1}\n",
}


def items(lengths: tuple[int | None, ...] = LENGTHS, source: str = "computer_dataset") -> list[RewardItem]:
    row = Prompt("p", 0, source, np.zeros(1, np.int32), (), (), "Laptop", {})
    return [RewardItem(row, ANSWER, tokens) for tokens in lengths]


def published(tokens: int, *, longest: int, cache: int) -> float:
    """Equation 13 of arXiv 2503.14476, case by case."""
    if tokens <= longest - cache:
        return 0.0
    return ((longest - cache) - tokens) / cache if tokens <= longest else -1.0


def manager_of(*more: str) -> RewardManager:
    return build_reward_manager(
        load("ppo_trainer", [*SCRIPT, "data.max_response_length=512", "trainer.val_only=True", *more])
    )


def test_a_script_of_verl_gets_the_published_numbers_on_top_of_the_tasks_reward() -> None:
    scores = manager_of().score(items())
    expected = [published(n, longest=64, cache=16) for n in LENGTHS]
    assert expected == [0, 0, 0, -1 / 16, -0.25, -0.5, -15 / 16, -1]
    assert [s.parts["length"] for s in scores] == expected
    assert [s.total for s in scores] == pytest.approx([1 + 0.5 * value for value in expected])


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_custom_function_gets_them_too(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS[kind])
    scores = manager_of(f"custom_reward_function.path={path}").score(items(source="mine"))
    expected = [published(n, longest=64, cache=16) for n in LENGTHS]
    assert [s.total for s in scores] == pytest.approx([0.25 + 0.5 * value for value in expected])
    assert [dict(s.parts) for s in scores] == [{"length": value} for value in expected]
    assert all(s.extra["acc"] == 1 for s in scores)
    assert reward_metrics(["mine"] * len(scores), scores)["reward/mine/length/mean"] == pytest.approx(
        sum(expected) / len(expected)
    )


def test_a_failed_answer_and_one_whose_tokens_nobody_counted_have_no_score(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def compute_score(solution_str):\n    return None if 'Laptop' in solution_str else 1.0\n")
    parts = {"length": {"buffer": 5}, "label": {"weight": 2}}
    manager = RewardManager(max_failure_rate=1, custom=CustomFunction(str(path)), parts=parts, max_tokens=10)
    none, uncounted = manager.score([*items((9,)), items()[0]._replace(text="?", tokens=None)])
    assert str(none.reason).startswith("none:")
    assert str(uncounted.reason).startswith("exception: reward.parts.length needs the answer's length")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"buffer": 11}, r"reward.parts.length: buffer=11 must lie between 1 and max_tokens=10"),
        ({}, r"reward.parts.length: buffer=None"),
        ({"buffer": 5, "when": "label"}, r"reward.parts.length.when=label: no earlier part"),
    ],
)
def test_length_settings_that_cannot_work_beside_a_custom_function_are_refused(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS["plain"])
    with pytest.raises(ValueError, match=message):
        RewardManager(max_failure_rate=1, custom=CustomFunction(str(path)), parts={"length": settings}, max_tokens=10)
