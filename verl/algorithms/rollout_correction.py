"""Importance weights for answers drawn from another distribution than the policy that is trained: a sampler with
top-p or top-k, other kernels, or older weights (truncated importance sampling, fengyao.notion.site/off-policy-rl; verl
calls it rollout correction).

With d = log p - log q at every token, p the policy before the step's updates and q the sampler:

| rollout_is | weight of a token |
|---|---|
| token | min(exp(d), threshold) |
| sequence | min(exp(sum of d over its answer), threshold), the same for all its tokens |

`rollout_rs` rejects instead of weighting: a token (token), or all tokens of an answer by its summed (sequence) or mean
(geometric) d, weigh 0 where exp(d) leaves [1 / threshold, threshold]. Denominators of the loss stay as they are.

Invariants
- Equal distributions give weights of exactly 1.
- No weight is above the threshold before normalisation; with `batch_normalize` they have mean 1 over the mini-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from verl.config.ppo import RolloutCorrectionConfig
from verl.protocol import LogProbs

_MAX_LOG_RATIO = 20.0
Table = Mapping[int, LogProbs]
"""Values (R,) by sample index."""


@dataclass(frozen=True)
class Correction:
    """`weights` (R,) of every sample by index, and what is logged about them."""

    weights: dict[int, LogProbs]
    metrics: dict[str, float]


def is_on(config: RolloutCorrectionConfig) -> bool:
    """Whether weights are made from log-probs before the update. In bypass mode the loss's own ratio corrects."""
    return not config.bypass_mode and (config.rollout_is is not None or config.rollout_rs is not None)


def correct(
    mini_batches: Sequence[Sequence[int]], policy: Table, sampler: Table, config: RolloutCorrectionConfig
) -> Correction:
    """Weights of the samples of all mini-batches (lists of sample indices) from both sides' log-probs.

    A sample that is in several mini-batches (`ppo_epochs`) must be in the same company each time, or normalisation
    would be ambiguous; without `rollout_is_batch_normalize` this does not matter.
    """
    weights: dict[int, LogProbs] = {}
    for members in mini_batches:
        made = {i: _weights(policy[i] - sampler[i], config) for i in members}
        if config.rollout_is_batch_normalize and made:
            mean = float(np.concatenate(list(made.values())).mean())
            made = {i: w / max(mean, 1e-8) for i, w in made.items()}
        weights |= {i: w.astype(np.float32) for i, w in made.items()}
    differences = {i: policy[i] - sampler[i] for i in weights}
    return Correction(weights, _metrics(weights, differences, config))


def _ratio(log_ratio: NDArray[np.float32], level: str) -> NDArray[np.float64]:
    """exp of the ratio of each token, or that of its answer at each of its tokens."""
    d = log_ratio.astype(np.float64)
    if level == "sequence":
        d = np.full_like(d, d.sum())
    elif level == "geometric":
        d = np.full_like(d, d.mean())
    return np.exp(d.clip(-_MAX_LOG_RATIO, _MAX_LOG_RATIO))


def _weights(log_ratio: NDArray[np.float32], config: RolloutCorrectionConfig) -> NDArray[np.float64]:
    weights = np.ones(len(log_ratio))
    if config.rollout_is is not None:
        weights = np.minimum(_ratio(log_ratio, config.rollout_is), config.rollout_is_threshold)
    if config.rollout_rs is not None:
        assert config.rollout_rs_threshold is not None, "rollout_rs without rollout_rs_threshold passed the checks"
        ratio = _ratio(log_ratio, config.rollout_rs)
        inside = (ratio >= 1.0 / config.rollout_rs_threshold) & (ratio <= config.rollout_rs_threshold)
        weights = np.where(inside, weights, 0.0)
    return weights


def _metrics(
    weights: Mapping[int, LogProbs], differences: Mapping[int, NDArray[np.float32]], config: RolloutCorrectionConfig
) -> dict[str, float]:
    if not weights:
        return {}
    flat = np.concatenate(list(weights.values())).astype(np.float64)
    found: dict[str, float] = {}
    if config.rollout_is is not None:
        ratio = np.concatenate([_ratio(d, config.rollout_is) for d in differences.values()])
        found = {
            "rollout_corr/rollout_is_mean": float(flat.mean()),
            "rollout_corr/rollout_is_std": float(flat.std()),
            "rollout_corr/rollout_is_min": float(flat.min()),
            "rollout_corr/rollout_is_max": float(flat.max()),
            "rollout_corr/rollout_is_eff_sample_size": float(
                flat.sum() ** 2 / max(np.square(flat).sum() * len(flat), 1e-12)
            ),
            "rollout_corr/rollout_is_ratio_fraction_high": float((ratio > config.rollout_is_threshold).mean()),
        }
    if config.rollout_rs is not None:
        found["rollout_corr/rollout_rs_masked_fraction"] = float((flat == 0.0).mean())
        answers = [bool((w == 0.0).any()) for w in weights.values()]
        found["rollout_corr/rollout_rs_seq_masked_fraction"] = float(np.mean(answers))
    return found
