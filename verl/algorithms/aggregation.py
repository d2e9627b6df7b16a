"""Per-token weights that turn token losses into one number, with denominators of the whole mini-batch (pure).

Answer i of N has R_i tokens, T is the sum of R_i, and c is the constant `loss_scale_factor`. A token of answer i weighs

| mode | weight |
|---|---|
| token-mean | 1 / T |
| token-sum | 1 |
| seq-mean-token-sum | 1 / N |
| seq-mean-token-mean | 1 / (N R_i) |
| seq-mean-token-sum-norm | 1 / (N c) (Dr. GRPO, arXiv 2503.20783) |

Invariants
- The loss is sum(loss * weight), so it does not depend on how the answers are cut into micro-batches or over ranks.
- The means weigh 1 in total.
- An answer that is not listed (its score failed) is in no denominator.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np

from verl.protocol import LogProbs


class LossAggMode(enum.Enum):
    """Values of `actor.loss_agg_mode`."""

    TOKEN_MEAN = "token-mean"
    """Every token counts alike: a long answer weighs more."""
    TOKEN_SUM = "token-sum"
    """As token-mean without a denominator: the step grows with the number of tokens."""
    SEQ_MEAN_TOKEN_SUM = "seq-mean-token-sum"
    """Mean over answers of their summed token losses."""
    SEQ_MEAN_TOKEN_MEAN = "seq-mean-token-mean"
    """Every answer counts alike (the original GRPO)."""
    SEQ_MEAN_TOKEN_SUM_NORM = "seq-mean-token-sum-norm"
    """As seq-mean-token-sum, divided by the constant `loss_scale_factor`."""


def token_weights(
    lengths: Sequence[int], mode: str | LossAggMode = LossAggMode.TOKEN_MEAN, loss_scale_factor: float | None = None
) -> list[LogProbs]:
    """Weights of each answer's tokens: arrays (R_i,) float32, for *all* kept answers of one mini-batch over all ranks.

    `lengths` are the response lengths R_i in tokens, the end token included. Raises ValueError for an unknown mode and
    for seq-mean-token-sum-norm without a positive `loss_scale_factor`.
    """
    try:
        mode = LossAggMode(mode)
    except ValueError:
        legal = ", ".join(m.value for m in LossAggMode)
        raise ValueError(f"actor.loss_agg_mode={mode} is unknown: use one of {legal}") from None
    sizes = np.asarray(lengths, dtype=np.int64)
    assert np.all(sizes > 0), f"an answer has at least its end token, got lengths {sizes[sizes <= 0].tolist()}"
    return [
        np.full(size, weight, dtype=np.float32)
        for size, weight in zip(sizes, _weights(sizes, mode, loss_scale_factor), strict=True)
    ]


def _weights(sizes: np.ndarray, mode: LossAggMode, loss_scale_factor: float | None) -> np.ndarray:
    answers = np.full(sizes.shape, max(len(sizes), 1), dtype=np.float64)
    match mode:
        case LossAggMode.TOKEN_MEAN:
            denominator = np.full(sizes.shape, max(sizes.sum(), 1), dtype=np.float64)
        case LossAggMode.TOKEN_SUM:
            denominator = np.ones(sizes.shape)
        case LossAggMode.SEQ_MEAN_TOKEN_SUM:
            denominator = answers
        case LossAggMode.SEQ_MEAN_TOKEN_MEAN:
            denominator = answers * sizes
        case LossAggMode.SEQ_MEAN_TOKEN_SUM_NORM:
            if loss_scale_factor is None or not loss_scale_factor > 0:
                raise ValueError(
                    f"actor.loss_agg_mode={mode.value} divides by actor.loss_scale_factor={loss_scale_factor}: "
                    "set it to a positive constant such as data.max_response_length"
                )
            denominator = answers * loss_scale_factor
    return 1.0 / denominator
