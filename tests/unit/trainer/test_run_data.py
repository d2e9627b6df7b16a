"""What the driver counts for its workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_switches import config

from verl.trainer.ppo.data import RunData
from verl.workers.rollout.vllm_plan import decoded_together

NEVER = ("trainer.test_freq=-1", "trainer.val_before_train=False")
OFTEN = ("trainer.test_freq=5", "trainer.val_before_train=False")


def rows(validation: int, test: int | None = None) -> RunData:
    def some(count: int | None) -> Any:
        return None if count is None else range(count)

    return RunData(Path("model"), None, some(64), some(validation), some(test))


@pytest.mark.parametrize(
    ("data", "overrides", "expected"),
    [
        (rows(500), OFTEN, 500),
        (rows(500), ("trainer.test_freq=-1", "trainer.val_before_train=True"), 500),
        (rows(500), ("trainer.val_only=True", *NEVER), 500),
        (rows(500), NEVER, None),
        (rows(500, 700), OFTEN, 700),
        (rows(500, 700), NEVER, 700),
        (rows(500, 700), ("trainer.val_only=True",), 500),
        (rows(500), ("data.val_batch_size=32", *OFTEN), 32),
    ],
)
def test_a_validation_without_a_batch_size_is_of_all_rows_that_are_validated(
    data: RunData, overrides: tuple[str, ...], expected: int | None
) -> None:
    assert data.counted(config(*overrides)).data.val_batch_size == expected


def test_a_validation_that_is_larger_than_a_step_has_its_graphs() -> None:
    """A step of 64 prompts has 320 answers."""
    assert decoded_together(config(*OFTEN), engines=1) == 320
    assert decoded_together(rows(500).counted(config(*OFTEN)), engines=1) == 500
    assert decoded_together(rows(100).counted(config(*OFTEN)), engines=1) == 320
    assert decoded_together(rows(9000).counted(config(*OFTEN)), engines=1) == 1024, "max_num_seqs"
