"""Invariants of the KL estimators: closed forms, and finite gradients however far the policies are apart."""

from __future__ import annotations

import math

import pytest
import torch

from verl.algorithms.kl import ESTIMATORS, kl_estimate


@pytest.mark.parametrize("kind", sorted(ESTIMATORS))
@pytest.mark.parametrize("difference", [200.0, 1e4, -200.0, -1e4])
def test_a_huge_log_ratio_has_a_finite_value_and_gradient(kind: str, difference: float) -> None:
    log_probs = torch.tensor([-1.0 + difference], requires_grad=True)
    value = kl_estimate(log_probs, torch.tensor([-1.0]), kind)
    value.sum().backward()
    assert value.isfinite().all() and log_probs.grad.isfinite().all(), f"{value.item()}, {log_probs.grad.item()}"


@pytest.mark.parametrize("d", [-2.0, -0.5, 0.0, 1e-3, 0.7, 3.0])
def test_values_and_gradients_equal_the_closed_forms(d: float) -> None:
    k3, k3_slope = math.exp(-d) - 1 + d, 1 - math.exp(-d)
    closed = {
        "k1": (d, 1.0),
        "kl": (d, 1.0),
        "abs": (abs(d), math.copysign(1.0, d) if d else 0.0),
        "k2": (d * d / 2, d),
        "mse": (d * d / 2, d),
        "k3": (k3, k3_slope),
        "low_var_kl": (k3, k3_slope),
    }
    assert closed.keys() == ESTIMATORS.keys()
    for kind, (value, slope) in closed.items():
        log_probs = torch.tensor([-4.0 + d], dtype=torch.float64, requires_grad=True)
        found = kl_estimate(log_probs, torch.tensor([-4.0], dtype=torch.float64), kind)
        found.sum().backward()
        assert (found.item(), log_probs.grad.item()) == pytest.approx((value, slope), abs=1e-9), kind


def test_k1_k3_are_unbiased_and_k2_nearly_so_on_near_policies() -> None:
    logits = torch.tensor([0.2, -0.4, 1.0, 0.0], dtype=torch.float64)
    p, q = logits.log_softmax(0), (logits + torch.tensor([0.1, -0.1, 0.05, 0.0])).log_softmax(0)
    exact = (p.exp() * (p - q)).sum().item()
    for kind, tolerance in {"k1": 1e-12, "k3": 1e-12, "k2": 0.05 * exact}.items():
        assert (p.exp() * kl_estimate(p, q, kind)).sum().item() == pytest.approx(exact, abs=tolerance), kind


def test_one_outlier_token_of_k3_is_bounded() -> None:
    assert kl_estimate(torch.tensor([-50.0]), torch.tensor([-1.0]), "k3").item() == 10.0


def test_an_unknown_kind_is_an_error_that_lists_the_kinds() -> None:
    with pytest.raises(ValueError, match=r"'full'; choose one of \['abs', 'k1', 'k2', 'k3', 'kl', 'low_var_kl', 'mse'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "full")
