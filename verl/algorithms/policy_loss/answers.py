"""Means over the tokens of an answer, for losses whose ratio belongs to the whole answer."""

from __future__ import annotations

import torch
from torch import Tensor


def answer_mean(values: Tensor, answers: Tensor) -> Tensor:
    """(N,) -> (N,): at every token the mean over its answer; `answers` (N,) int64 numbers the answers from 0."""
    sums = torch.zeros_like(values).index_add(0, answers, values)
    counts = torch.zeros_like(values).index_add(0, answers, torch.ones_like(values))
    return (sums / counts.clamp(min=1.0))[answers]
