"""Invariants of the schedule and of AdamW's groups."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from verl.config.nodes import OptimConfig
from verl.workers.actor.optim import OptimSpec, build_optimizer, lr_factor, optim_spec

SPEC = OptimSpec(
    lr=1e-3,
    betas=(0.9, 0.95),
    weight_decay=0.1,
    clip_grad=1.0,
    warmup_steps=4,
    total_steps=24,
    style="cosine",
    min_lr_ratio=0.1,
)
CONSTANT = dataclasses.replace(SPEC, style="constant")
NO_WARMUP = dataclasses.replace(SPEC, warmup_steps=0)


@pytest.mark.parametrize(
    ("spec", "step", "factor"),
    [
        (SPEC, 0, 0.2),
        (SPEC, 3, 0.8),
        (SPEC, 4, 1.0),
        (SPEC, 14, 0.55),
        (SPEC, 24, 0.1),
        (SPEC, 1000, 0.1),
        (CONSTANT, 0, 0.2),
        (CONSTANT, 3, 0.8),
        (CONSTANT, 4, 1.0),
        (CONSTANT, 24, 1.0),
        (NO_WARMUP, 0, 1.0),
        (NO_WARMUP, 24, 0.1),
        (dataclasses.replace(CONSTANT, warmup_steps=0), 0, 1.0),
        (dataclasses.replace(SPEC, min_lr_ratio=0.0), 24, 0.0),
        (dataclasses.replace(SPEC, warmup_steps=30), 29, 30 / 31),
        (dataclasses.replace(SPEC, warmup_steps=30), 30, 1.0),
    ],
)
def test_the_factor_at_the_corners_of_the_schedule(spec: OptimSpec, step: int, factor: float) -> None:
    assert lr_factor(step, spec) == pytest.approx(factor, abs=1e-12)


def test_the_rate_rises_to_the_end_of_the_warm_up_then_falls() -> None:
    factors = [lr_factor(step, SPEC) for step in range(25)]
    assert factors[:5] == sorted(factors[:5]) and factors[4:] == sorted(factors[4:], reverse=True)
    assert len(set(factors)) == 25 and min(factors) > 0


def test_an_unknown_style_is_an_error_that_names_the_styles() -> None:
    with pytest.raises(ValueError, match="warmup_style='linear': choose constant or cosine"):
        lr_factor(9, dataclasses.replace(SPEC, style="linear"))


CONFIG = OptimConfig(
    num_cycles=0.5,
    lr=2e-6,
    lr_warmup_steps=-1,
    lr_warmup_steps_ratio=0.1,
    warmup_style="cosine",
    min_lr_ratio=0.05,
    total_training_steps=-1,
    betas=(0.9, 0.999),
    weight_decay=0.01,
)


@pytest.mark.parametrize(
    ("fields", "warmup", "total"),
    [
        ({}, 20, 200),
        ({"total_training_steps": 50}, 5, 50),
        ({"lr_warmup_steps": 7}, 7, 200),
        ({"lr_warmup_steps": 0}, 0, 200),
    ],
)
def test_the_spec_of_a_config_takes_the_runs_length_unless_it_is_fixed(
    fields: dict[str, int], warmup: int, total: int
) -> None:
    spec = optim_spec(dataclasses.replace(CONFIG, **fields), clip_grad=0.5, optimizer_steps=200)
    assert (spec.warmup_steps, spec.total_steps, spec.clip_grad, spec.style) == (warmup, total, 0.5, "cosine")
    assert (spec.lr, spec.betas, spec.weight_decay, spec.min_lr_ratio) == (2e-6, (0.9, 0.999), 0.01, 0.05)


def test_matrices_decay_vectors_do_not_and_frozen_ones_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    decayed, plain = build_optimizer(model, SPEC).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3)] and decayed["weight_decay"] == 0.1
    assert [tuple(p.shape) for p in plain["params"]] == [(4,), (4,), (4,)] and plain["weight_decay"] == 0.0
    assert decayed["betas"] == (0.9, 0.95) and decayed["lr"] == 1e-3
