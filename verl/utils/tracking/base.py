"""What a tracker takes, and what every back end does with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from verl.config.secrets import mask_text

Scalar = float | int | str | bool | None
Metrics = Mapping[str, Scalar]


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer for a person to look at. Example: `Sample("val-3", "Which ..", "<think>..", "Desktop", 1.0)`."""

    uid: str
    prompt: str
    answer: str
    label: str
    """The ground truth."""
    score: float | None
    """None: scoring failed."""
    image: bytes | None = None
    """The encoded plot (PNG or JPEG)."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What back ends want to know about the run."""

    run_dir: Path
    project: str
    experiment: str
    config: Mapping[str, Any]
    """Secrets already masked."""
    total_steps: int | None
    resume_step: int
    """The run continues after this step; 0: it starts anew."""


class Backend(Protocol):
    """One place that metrics go to. Any method may raise; the `Tracker` keeps that from the run."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None: ...

    def close(self) -> None: ...


class BackendUnavailable(Exception):
    """The back end cannot work here; the message says why and what would change that."""


def to_scalar(value: Any) -> Scalar:
    """A number, bool or text as plain python; numpy and torch scalars through `item()`. Raises TypeError otherwise."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return mask_text(value)
    raise TypeError(f"a metric is a number or a text, not {type(value).__name__}")


def finite(metrics: Metrics) -> dict[str, float]:
    """The metrics a chart can show."""
    numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, bool | int | float)}
    return {k: v for k, v in numbers.items() if math.isfinite(v)}
