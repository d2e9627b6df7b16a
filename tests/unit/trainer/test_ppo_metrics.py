"""Metrics of a step from those of its optimizer steps."""

from __future__ import annotations

import math

import pytest

from verl.trainer.ppo.metrics import actor_metrics


def step(norm: float, lr: float = 0.1, **more: float) -> dict[str, float]:
    return {"pg_loss": 1.0, "grad_norm": norm, "lr": lr, "skipped": float(not math.isfinite(norm)), **more}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_skipped_step_does_not_enter_the_gradient_norm_and_is_counted(bad: float) -> None:
    metrics = actor_metrics([step(1.0), step(bad), step(3.0, lr=0.2)], 0.0)
    assert (metrics["actor/grad_norm"], metrics["training/skipped_steps"], metrics["actor/lr"]) == (2.0, 1.0, 0.2)


def test_without_a_finite_norm_there_is_none() -> None:
    metrics = actor_metrics([step(math.nan), step(math.inf)], 0.0)
    assert "actor/grad_norm" not in metrics and metrics["training/skipped_steps"] == 2.0


def test_steps_without_a_scored_answer_count_as_skipped_and_enter_no_mean() -> None:
    empty = {"grad_norm": 0.0, "lr": 0.1, "skipped": 1.0}
    metrics = actor_metrics([step(4.0), empty], 0.0)
    assert (metrics["actor/grad_norm"], metrics["actor/pg_loss"], metrics["training/skipped_steps"]) == (4.0, 1.0, 1.0)
