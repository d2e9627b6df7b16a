"""Metrics of a step from those of its optimizer steps."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from verl.trainer.ppo.metrics import actor_metrics
from verl.trainer.ppo.mfu import FlopMeter
from verl.workers.runtime import memory_metrics

NAMES = yaml.safe_load((Path(__file__).parents[2] / "golden" / "compat_metrics.yaml").read_text())


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


def test_the_metrics_of_a_gpu_have_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mem_get_info", (1, 4)), ("max_memory_allocated", 2 << 30), ("max_memory_reserved", 3 << 30)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    counter: Any = SimpleNamespace(forward=lambda groups, shared: 6e12, training=lambda groups, shared: 18e12)
    meter = FlopMeter(counter, peak=1e12, ranks=2)
    for kind in ("actor", "actor_infer"):
        meter.add(kind, [])
    found = meter.metrics({"update_actor": 10.0, "old_log_prob": 2.0, "ref": 1.0}) | memory_metrics("cuda")
    assert {name: found.get(name) for name in NAMES["cuda"]} == {
        "perf/mfu/actor": pytest.approx(0.9),
        "perf/mfu/actor_infer": pytest.approx(1.0),
        "perf/max_memory_allocated_gb": 2.0,
        "perf/max_memory_reserved_gb": 3.0,
    }
