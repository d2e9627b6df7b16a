"""Data that crosses a process boundary: small frozen dataclasses, numpy only, picklable.

Legend of the shape letters used here and in `verl.packing`:
P prompt tokens (after image expansion), R response tokens, H and W pixels, n answers of a prompt.

Invariants
- Pixels never travel with a response: a prompt names its images by key.
- Token ids are never made again from text.
- The answers of a prompt share one `Prompt` object.
- A failed score is never a number.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]
LogProbs = NDArray[np.float32]
Grid = tuple[int, int, int]
"""Patches of an image: temporal, down, across."""


class StopReason(enum.Enum):
    """Why the sampler stopped."""

    EOS = "eos"
    """A stop token was drawn; it is the last token of the response."""
    LENGTH = "length"
    """The response reached its limit or the end of the context."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a data set, tokenised once.

    Example: `Prompt(uid="train-17", row=17, data_source="computer_dataset", token_ids=array (P,) int32,
    image_keys=("9f2c..",), image_grids=((1, 16, 42),), ground_truth="Desktop", extra_info={"index": 17})`
    """

    uid: str
    """Stable name of the row; a part of the seed of its sampling noise."""
    row: int
    data_source: str
    token_ids: TokenIds
    """(P,) with every image placeholder expanded to its number of merged patches."""
    image_keys: tuple[str, ...]
    """sha256 of the encoded image, in order of appearance."""
    image_grids: tuple[Grid, ...]
    """(t, h, w) in patches, one per image."""
    ground_truth: str
    extra_info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image as the vision tower will see it: resized, not yet normalised.

    `pixels` is (3, H, W) uint8 with H and W multiples of patch x merge (28); `grid` is (t, h, w) in patches.
    """

    key: str
    pixels: NDArray[np.uint8]
    grid: Grid


@dataclass(frozen=True, slots=True)
class Response:
    """One answer: `token_ids` (R,), `log_probs` (R,) of the sampler's own distribution at those tokens."""

    token_ids: TokenIds
    log_probs: LogProbs
    stop_reason: StopReason


@dataclass(frozen=True, slots=True)
class Score:
    """Either ok (a finite total with named parts) or failed (a reason). Use `Score.ok` and `Score.failed`.

    Example: `Score.ok(1.0, {"label": 1.0, "format": 1.0}, prediction="Desktop")`, `Score.failed("timeout: 10 s")`.
    """

    _total: float | None
    parts: Mapping[str, float]
    prediction: str | None
    """The label read from the answer; None when it could not be parsed."""
    reason: str | None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of a custom function's return value, logged as they are."""

    @classmethod
    def ok(
        cls,
        total: float,
        parts: Mapping[str, float] | None = None,
        prediction: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Score:
        """A valid score. Raises ValueError when a number is not finite: that is a failure, not a score."""
        numbers = {"total": total, **(parts or {})}
        bad = {name: value for name, value in numbers.items() if not math.isfinite(value)}
        if bad:
            raise ValueError(f"a score must be finite, got {bad}")
        return cls(float(total), {k: float(v) for k, v in (parts or {}).items()}, prediction, None, dict(extra or {}))

    @classmethod
    def failed(cls, reason: str) -> Score:
        """A score that could not be computed. It never becomes a number."""
        return cls(None, {}, None, reason, {})

    @property
    def is_ok(self) -> bool:
        return self.reason is None

    @property
    def total(self) -> float:
        """The reward. Raises ValueError on a failed score."""
        if self._total is None:
            raise ValueError(f"a failed score has no total (reason: {self.reason})")
        return self._total


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt with its n answers and their scores: the unit of dispatch, balance and packing."""

    prompt: Prompt
    responses: tuple[Response, ...]
    scores: tuple[Score, ...]

    def __post_init__(self) -> None:
        assert len(self.responses) == len(self.scores), (
            f"{self.prompt.uid}: {len(self.responses)} responses but {len(self.scores)} scores"
        )


@dataclass(frozen=True, slots=True)
class TrainSample:
    """What the actor needs of one answer.

    `index` numbers the answer within the step, so that results computed on any rank find their way back.
    `weights` (R,) already hold the inverse of the *global* denominator of the loss (see `verl.algorithms.aggregation`),
    so that a loss is a plain sum and does not depend on how the mini-batch is cut.
    `old_log_probs` None means "this forward defines them" (ratio 1).
    """

    index: int
    token_ids: TokenIds
    weights: LogProbs
    advantage: float = 0.0
    old_log_probs: LogProbs | None = None
    ref_log_probs: LogProbs | None = None
    rollout_log_probs: LogProbs | None = None
    """The sampler's, where its mismatch with this forward is measured: in the first mini-batch of a step."""
    is_weights: LogProbs | None = None
    """(R,) factors of the policy loss that correct for the sampler (see `verl.algorithms.rollout_correction`)."""


@dataclass(frozen=True, slots=True)
class TrainGroup:
    """A prompt and those of its answers that are in the loss."""

    prompt: Prompt
    samples: tuple[TrainSample, ...]
