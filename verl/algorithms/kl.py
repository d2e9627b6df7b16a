"""Per-token estimators of KL(policy || reference) from log-probs at sampled tokens (Schulman, "Approximating KL
divergence", 2020).

k1 is unbiased but its gradient as a loss has mean zero; k2 = d^2 / 2; k3 = exp(-d) - 1 + d with d = log p - log q.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from verl.config.ppo import KLControlConfig
from verl.protocol import LogProbs

_MAX_LOG_RATIO = 20.0  # clamped *before* exp: after it the value would be finite but its gradient NaN


def k1(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    return log_probs - ref_log_probs


def absolute(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    return (log_probs - ref_log_probs).abs()


def k2(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    return 0.5 * (log_probs - ref_log_probs).square()


def k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    ratio = (ref_log_probs - log_probs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    # Clamped as in the GRPO practice of verl (+-10), which bounds one outlier token's share of the loss.
    return (torch.expm1(ratio) - ratio).clamp(-10.0, 10.0)


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": k1,
    "k1": k1,
    "abs": absolute,
    "mse": k2,
    "k2": k2,
    "low_var_kl": k3,
    "k3": k3,
}


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: str) -> Tensor:
    """(N,) estimates of the chosen kind. Raises ValueError naming the kinds there are."""
    if kind not in ESTIMATORS:
        raise ValueError(f"unknown KL estimator {kind!r}; choose one of {sorted(ESTIMATORS)}")
    return ESTIMATORS[kind](log_probs, ref_log_probs)


def kl_sums(old: Mapping[int, LogProbs], ref: Mapping[int, LogProbs], kind: str) -> dict[int, float]:
    """KL estimate summed over each answer's tokens, by sample index, for a KL in the reward."""
    return {
        index: float(kl_estimate(torch.from_numpy(values), torch.from_numpy(ref[index]), kind).sum())
        for index, values in old.items()
    }


class AdaptiveKL:
    """Coefficient of the KL in the reward: fixed, or steered to a target (arXiv 1909.08593, section 2.2)."""

    def __init__(self, value: float, target: float | None, horizon: int | None) -> None:
        self.value, self.target, self.horizon = value, target, horizon
        self.used = value
        self.last_kl = 0.0

    @classmethod
    def of(cls, config: KLControlConfig) -> AdaptiveKL:
        adaptive = config.type == "adaptive"
        return cls(config.kl_coef, config.target_kl if adaptive else None, config.horizon if adaptive else None)

    def observe(self, sums: Mapping[int, float], tokens: Mapping[int, LogProbs]) -> float:
        """The coefficient for this step; then adapt it to the step's mean KL a token."""
        self.used = self.value
        self.last_kl = float(np.sum(list(sums.values())) / max(1, sum(len(t) for t in tokens.values())))
        if self.target is not None and self.horizon is not None:
            error = float(np.clip(self.last_kl / self.target - 1.0, -0.2, 0.2))
            self.value *= 1.0 + error * len(sums) / self.horizon
        return self.used

    def metrics(self) -> dict[str, float]:
        return {"critic/kl": self.last_kl, "critic/kl_coeff": self.used}
