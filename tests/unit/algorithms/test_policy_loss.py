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


# --- losses with one ratio per answer, and CISPO ---------------------------------------------------------------------

# Two answers of 2 and 3 tokens; log-ratios 0.2, 0.4 | -0.3, 0.0, 0.6.
ANSWERS = torch.tensor([0, 0, 1, 1, 1])
OLD = torch.tensor([-1.0, -2.0, -1.0, -0.5, -2.0], dtype=torch.float64)
RATIOS = torch.tensor([0.2, 0.4, -0.3, 0.0, 0.6], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, 1.0, -2.0, -2.0, -2.0], dtype=torch.float64)


def by_mode(mode: str, low: float, high: float) -> tuple[PolicyLoss, Tensor]:
    """The loss, and the gradient of its sum in each log-prob."""
    log_probs = (OLD + RATIOS).requires_grad_(True)
    found = POLICY_LOSSES[mode](
        log_probs, OLD, ADVANTAGES, answers=ANSWERS, clip_low=low, clip_high=high, clip_dual=DUAL
    )
    found.loss.sum().backward()
    return found, log_probs.grad


def test_gspo_has_one_ratio_per_answer_and_a_gradient_per_token() -> None:
    first, second = math.exp(0.3), math.exp(0.1)  # means of the log-ratios
    found, slope = by_mode("gspo", 0.5, 0.5)
    assert found.loss.tolist() == pytest.approx([-first, -first, 2 * second, 2 * second, 2 * second])
    assert slope.tolist() == pytest.approx([-first, -first, 2 * second, 2 * second, 2 * second])
    found, slope = by_mode("gspo", 0.01, 0.2)  # exp(0.3) = 1.35 is cut at 1.2; a negative advantage is cut below only
    assert found.loss.tolist() == pytest.approx([-1.2, -1.2, 2 * second, 2 * second, 2 * second])
    assert slope.tolist() == pytest.approx([0, 0, 2 * second, 2 * second, 2 * second])
    assert found.clipped.tolist() == [1, 1, 0, 0, 0]


def test_cispo_clips_the_weight_and_keeps_every_token() -> None:
    found, slope = by_mode("cispo", 0.2, 0.3)
    weights = [math.exp(0.2), 1.3, 0.8, 1.0, 1.3]
    assert slope.tolist() == pytest.approx([-a * w for a, w in zip(ADVANTAGES.tolist(), weights, strict=True)])
    assert found.clipped.tolist() == [0, 1, 1, 0, 1] and found.clipped_lower.tolist() == [0, 0, 1, 0, 0]


def test_geo_mean_is_the_geometric_mean_of_the_clipped_ratios() -> None:
    found, slope = by_mode("geo_mean", 0.25, 0.3)
    # advantage above 0: 0.4 is cut to 0.3; below 0: -0.3 is raised to -0.25, 0.6 stays (it makes the objective smaller)
    first, second = math.exp((0.2 + 0.3) / 2), math.exp((-0.25 + 0.0 + 0.6) / 3)
    assert found.loss.tolist() == pytest.approx([-first, -first, 2 * second, 2 * second, 2 * second])
    # A token's log-ratio enters the ratio of all tokens of its answer with weight 1 / length, unless it was cut.
    assert slope.tolist() == pytest.approx([-first, 0, 0, 2 * second, 2 * second])
    assert found.clipped.tolist() == [0, 1, 1, 0, 0]


@pytest.mark.parametrize("mode", sorted(POLICY_LOSSES))
def test_every_loss_is_reinforce_at_ratio_one_and_finite_at_any_ratio(mode: str) -> None:
    for ratio in (0.0, 100.0, -100.0):
        log_probs = (OLD + ratio).requires_grad_(True)
        found = POLICY_LOSSES[mode](
            log_probs, OLD, ADVANTAGES, answers=ANSWERS, clip_low=LOW, clip_high=HIGH, clip_dual=DUAL
        )
        found.loss.sum().backward()
        assert torch.isfinite(found.loss).all() and torch.isfinite(log_probs.grad).all(), (mode, ratio)
        if ratio == 0.0:
            assert log_probs.grad.tolist() == pytest.approx((-ADVANTAGES).tolist()), mode
