"""Per-token columns of a packed batch: what the objective needs beside log-probs, in the order of `pack`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from verl.packing.layout import Floats
from verl.protocol import TrainGroup, TrainSample

Array = TypeVar("Array")


@dataclass(frozen=True, slots=True)
class Columns(Generic[Array]):
    """All (N,) fp32 over the response tokens, arrays or tensors; None where the step does not use the column."""

    weights: Array
    advantages: Array
    old_log_probs: Array | None
    ref_log_probs: Array | None
    rollout_log_probs: Array | None
    answers: Array
    """Which answer of the batch a token belongs to, from 0. As fp32, like all columns: they travel in one buffer."""
    is_weights: Array | None = None


def columns(groups: Sequence[TrainGroup]) -> Columns[Floats]:
    """Columns of the groups' samples in packing order. A column is present for all samples or for none."""
    samples = [s for g in groups for s in g.samples]

    def optional(get: Callable[[TrainSample], Floats | None]) -> Floats | None:
        parts = [get(s) for s in samples]
        present = [p for p in parts if p is not None]
        assert len(present) in (0, len(parts)), f"a column is present for {len(present)} of {len(parts)} samples"
        return np.concatenate(present).astype(np.float32) if present else None

    return Columns(
        weights=np.concatenate([s.weights for s in samples]).astype(np.float32),
        advantages=np.concatenate([np.full(len(s.token_ids), s.advantage, np.float32) for s in samples]),
        old_log_probs=optional(lambda s: s.old_log_probs),
        ref_log_probs=optional(lambda s: s.ref_log_probs),
        rollout_log_probs=optional(lambda s: s.rollout_log_probs),
        is_weights=optional(lambda s: s.is_weights),
        answers=np.repeat(np.arange(len(samples), dtype=np.float32), [len(s.token_ids) for s in samples]),
    )
