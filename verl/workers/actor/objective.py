"""What is minimised, per token. Weights already hold the global denominators, so a loss is a plain weighted sum.

Metric sums add up over micro-batches and ranks. `*_max` are combined by maximum instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from verl.algorithms.kl import kl_estimate
from verl.algorithms.policy_loss import POLICY_LOSSES
from verl.models.log_probs import TokenStats
from verl.packing.columns import Columns

Metrics = dict[str, Tensor]


class Objective(Protocol):
    """A loss over response tokens. `share` is 1 / (response tokens of the whole mini-batch), for metric means."""

    needs_entropy_grad: bool
    metric_names: tuple[str, ...]

    def __call__(self, stats: TokenStats, columns: Columns[Any], share: float) -> tuple[Tensor, Metrics]: ...


def merge_metrics(parts: list[Mapping[str, float]]) -> dict[str, float]:
    """Sum over micro-batches or ranks; names ending in `_max` by maximum."""
    merged: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            if name not in merged:
                merged[name] = value
            else:
                merged[name] = max(merged[name], value) if name.endswith("_max") else merged[name] + value
    return merged


def merge_on_device(parts: Sequence[Metrics]) -> Metrics:
    """As `merge_metrics`, in fp64, without reading a value back to the host."""
    by_name: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, value in part.items():
            by_name.setdefault(name, []).append(value.double())
    return {
        name: torch.stack(values).amax() if name.endswith("_max") else torch.stack(values).sum()
        for name, values in by_name.items()
    }


@dataclass(frozen=True, kw_only=True)
class SFTObjective:
    """Negative log-likelihood of the given answers."""

    needs_entropy_grad: bool = False
    metric_names: tuple[str, ...] = ("loss", "entropy")

    def __call__(self, stats: TokenStats, columns: Columns[Any], share: float) -> tuple[Tensor, Metrics]:
        weights = torch.as_tensor(columns.weights, device=stats.log_probs.device)
        loss = -(weights * stats.log_probs).sum()
        return loss, {"loss": loss.detach(), "entropy": stats.entropy.detach().sum() * share}


@dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """Clipped policy gradient, optional KL to the reference, optional entropy bonus."""

    loss_mode: str
    clip_low: float
    clip_high: float
    clip_dual: float
    kl_coef: float
    """0 switches the KL term off."""
    kl_kind: str
    entropy_coef: float
    loss_options: Mapping[str, float | None] = field(default_factory=dict)
    """Further arguments of the loss."""

    @property
    def needs_entropy_grad(self) -> bool:
        return self.entropy_coef != 0.0

    @property
    def metric_names(self) -> tuple[str, ...]:
        names = ("pg_loss", "pg_clipfrac", "pg_clipfrac_lower", "ppo_kl", "entropy", "entropy_loss")
        return names + (("kl_loss",) if self.kl_coef else ())

    def __call__(self, stats: TokenStats, columns: Columns[Any], share: float) -> tuple[Tensor, Metrics]:
        device = stats.log_probs.device

        def tensor(x: object) -> Tensor:
            return torch.as_tensor(x, device=device)

        weights = tensor(columns.weights)
        old = stats.log_probs.detach() if columns.old_log_probs is None else tensor(columns.old_log_probs)
        policy = POLICY_LOSSES[self.loss_mode](
            stats.log_probs,
            old,
            tensor(columns.advantages),
            answers=tensor(columns.answers).long(),
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            clip_dual=self.clip_dual,
            **self.loss_options,
        )
        per_token = policy.loss if columns.is_weights is None else policy.loss * tensor(columns.is_weights)
        pg_loss = (weights * per_token).sum()
        entropy = (weights * stats.entropy).sum()
        loss = pg_loss
        metrics = {
            "pg_loss": pg_loss.detach(),
            "pg_clipfrac": policy.clipped.sum() * share,
            "pg_clipfrac_lower": policy.clipped_lower.sum() * share,
            "ppo_kl": -policy.log_ratio.sum() * share,
            "entropy": stats.entropy.detach().sum() * share,
            "entropy_loss": entropy.detach(),
        }
        if self.entropy_coef:
            loss = loss - self.entropy_coef * entropy
        if self.kl_coef:
            assert columns.ref_log_probs is not None, "the KL term needs reference log-probs"
            kl = (weights * kl_estimate(stats.log_probs, tensor(columns.ref_log_probs), self.kl_kind)).sum()
            loss = loss + self.kl_coef * kl
            metrics["kl_loss"] = kl.detach()
        if columns.rollout_log_probs is not None:
            metrics |= _sampler_mismatch(stats.log_probs.detach(), tensor(columns.rollout_log_probs), share)
        return loss, metrics


def _sampler_mismatch(log_probs: Tensor, rollout: Tensor, share: float) -> Metrics:
    """How far the sampler's probabilities of its own tokens lie from the trainer's, before any update."""
    p, q = log_probs.double().exp(), rollout.double().exp()
    difference = (p - q).abs()
    log_ratio = log_probs - rollout
    return {
        "rollout_p_sum": p.sum(),
        "rollout_q_sum": q.sum(),
        "rollout_pp_sum": p.square().sum(),
        "rollout_qq_sum": q.square().sum(),
        "rollout_pq_sum": (p * q).sum(),
        "rollout_probs_diff_sum": difference.sum(),
        "rollout_probs_diff_squares": difference.square().sum(),
        "rollout_probs_diff_max": difference.max(),
        "rollout_kl_sum": -log_ratio.sum(),
        "rollout_k3_sum": (log_ratio.clamp(-20, 20).exp() - 1 - log_ratio).sum(),
        "rollout_tokens": log_probs.new_full((), float(len(log_probs))),
    }
