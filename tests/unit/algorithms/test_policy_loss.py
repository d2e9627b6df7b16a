"""Invariants of the clipped policy loss: REINFORCE at ratio 1, the clip table, finite at any log-ratio."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from verl.algorithms.policy_loss import POLICY_LOSSES, PolicyLoss

LOW, HIGH, DUAL = 0.2, 0.3, 3.0


def loss_of(log_probs: Tensor, old: Tensor, advantages: Tensor) -> PolicyLoss:
    return POLICY_LOSSES["vanilla"](log_probs, old, advantages, clip_low=LOW, clip_high=HIGH, clip_dual=DUAL)


def test_at_ratio_one_the_gradient_is_reinforce() -> None:
    log_probs = torch.tensor([-1.0, -3.0, -0.1], requires_grad=True)
    advantages = torch.tensor([0.5, -2.0, 0.0])
    found = loss_of(log_probs, log_probs.detach(), advantages)
    found.loss.sum().backward()
    assert torch.equal(log_probs.grad, -advantages) and torch.equal(found.loss.detach(), -advantages)
    assert not found.clipped.any() and not found.clipped_lower.any() and not found.log_ratio.any()


TABLE = [
    # advantage, ratio, loss, slope in the log-prob, clipped, clipped below by the dual bound
    (1.0, 1.1, -1.1, -1.1, 0, 0),
    (1.0, 1.4, -1.3, 0.0, 1, 0),
    (1.0, 0.5, -0.5, -0.5, 0, 0),
    (1.0, 50.0, -1.3, 0.0, 1, 0),
    (-2.0, 0.9, 1.8, 1.8, 0, 0),
    (-2.0, 0.5, 1.6, 0.0, 1, 0),
    (-2.0, 1.4, 2.8, 2.8, 0, 0),
    (-2.0, 5.0, 6.0, 0.0, 0, 1),
    (0.0, 5.0, 0.0, 0.0, 0, 0),
]


@pytest.mark.parametrize(("advantage", "ratio", "loss", "slope", "clipped", "lower"), TABLE)
def test_every_side_of_the_clip(
    advantage: float, ratio: float, loss: float, slope: float, clipped: int, lower: int
) -> None:
    log_probs = torch.tensor([-2.0 + math.log(ratio)], dtype=torch.float64, requires_grad=True)
    found = loss_of(log_probs, torch.tensor([-2.0], dtype=torch.float64), torch.tensor([advantage]).double())
    found.loss.sum().backward()
    assert (found.loss.item(), log_probs.grad.item()) == pytest.approx((loss, slope), abs=1e-9)
    assert (found.clipped.item(), found.clipped_lower.item()) == (clipped, lower)
    assert found.log_ratio.item() == pytest.approx(math.log(ratio))


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("log_ratio", [100.0, -100.0, 1e4])
def test_a_log_ratio_of_100_has_a_finite_loss_and_gradient(log_ratio: float, advantage: float) -> None:
    log_probs = torch.tensor([-1.0 + log_ratio], requires_grad=True)
    found = loss_of(log_probs, torch.tensor([-1.0]), torch.tensor([advantage]))
    found.loss.sum().backward()
    assert found.loss.isfinite().all() and log_probs.grad.isfinite().all()
    assert abs(found.loss.item()) <= DUAL * abs(advantage), "an outlier is bounded"


def test_indicators_and_log_ratios_carry_no_gradient() -> None:
    log_probs = torch.randn(4, requires_grad=True)
    found = loss_of(log_probs, torch.zeros(4), torch.ones(4))
    assert found.loss.requires_grad
    assert not any(x.requires_grad for x in (found.clipped, found.clipped_lower, found.log_ratio))
