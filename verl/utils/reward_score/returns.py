"""What a reward function may return, read into a `verl.protocol.Score` (pure).

| returned | reward | other fields |
|---|---|---|
| int, float, bool, numpy scalar, 0-d array or tensor | the value | none |
| mapping | `["score"]` | the other keys go to `extra`; `pred` is the prediction |
| 4-tuple | `[0]` | (reward, format, predicted id, true id); format 0 means unparsed |
| 5-tuple | `[0]` | as the 4-tuple, fifth: part `extension` |
| other tuple or list | `[0]` | ignored |
| `Score` | as it is | |

Invariants
- None, NaN, infinity and anything else become a failed score whose reason starts with its kind.
- An id outside the classes is "unparsed" (None), never a label.
"""

from __future__ import annotations

import enum
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from verl.protocol import Score


class FailureKind(enum.Enum):
    """Why there is no score; the first word of `Score.reason`."""

    EXCEPTION = "exception"
    """The function raised."""
    TIMEOUT = "timeout"
    """The function took longer than its limit."""
    STARVED = "starved"
    """A plain function did, while another call of its process kept the interpreter. A pool calls it again, alone."""
    NO_VALUE = "none"
    """The function returned None."""
    NOT_FINITE = "not_finite"
    """A number of the returned value is NaN or infinite."""
    BAD_RETURN = "bad_return"
    """The returned value has none of the known shapes."""
    RATE_LIMITED = "rate_limited"
    """A service answered 429 for longer than we were ready to wait."""
    SERVER_ERROR = "server_error"
    """A service answered 5xx, each time it was asked."""
    REFUSED_CONNECTION = "refused_connection"
    """A service could not be reached, or dropped the connection."""
    REJECTED = "rejected"
    """A service refused the request itself (another 4xx): wrong model name, text too long, unknown parameter."""
    MALFORMED = "malformed"
    """A judge's reply is not the JSON object that was asked for."""
    OUT_OF_RANGE = "out_of_range"
    """A judge's reply holds a number outside [0, 1]."""
    AUTH = "auth"
    """A service refused the key, or there is none."""
    BUDGET = "budget"
    """The spending limit is reached: our own, or the quota of the account."""
    OTHER = "other"
    """A reason written by somebody else."""


class ScoringError(Exception):
    """Raised by a reward function that knows why it has no score; becomes `Score.failed` of that kind.

    Example: `raise ScoringError(FailureKind.RATE_LIMITED, "the judge asks to come back in 300 s")`
    """

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[1])


def failed(kind: FailureKind, detail: str) -> Score:
    """A failed score of a kind."""
    return Score.failed(f"{kind.value}: {detail}")


def failure_kind(score: Score) -> FailureKind:
    """The kind of a failed score, read from its reason."""
    assert score.reason is not None, f"this score is ok (total {score.total}), it has no failure kind"
    return kind_of_reason(score.reason)


def kind_of_reason(reason: str) -> FailureKind:
    """The kind that a reason begins with; OTHER where it begins with none."""
    try:
        return FailureKind(reason.partition(":")[0])
    except ValueError:
        return FailureKind.OTHER


def is_fork_tuple(value: object) -> bool:
    """(reward, format, predicted id, true id[, extension score]) with a number as format."""
    return isinstance(value, tuple) and len(value) in (4, 5) and number(value[1]) is not None


def number(value: Any) -> float | None:
    """A single real number (0-d arrays and tensors included) as float, or None; may be NaN or infinite."""
    value = _unboxed(value)
    if not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def to_score(value: Any, *, ground_truth: str, classes: Sequence[str] | None = None) -> Score:
    """Read the value returned for an answer to a row with that ground truth.

    `classes` in id order turn a predicted id into its label. Where they are not known, an id equal to the true one
    becomes the ground truth and any other the id as text.
    """
    if isinstance(value, Score):
        return value
    if value is None:
        return failed(FailureKind.NO_VALUE, "the function returned None")
    if isinstance(value, Mapping):
        return _from_mapping(value, classes)
    if is_fork_tuple(value):
        return _from_fork_tuple(value, ground_truth, classes)
    if isinstance(value, tuple | list):
        if not value:
            return failed(FailureKind.BAD_RETURN, f"empty {type(value).__name__}")
        return _ok(value[0], {}, None)
    return _ok(value, {}, None)


def _from_mapping(value: Mapping[str, Any], classes: Sequence[str] | None) -> Score:
    if "score" not in value:
        return failed(FailureKind.BAD_RETURN, f"a dict without the key 'score' (keys: {sorted(map(str, value))})")
    extra = {str(k): v for k, v in value.items() if k != "score"}
    return _ok(value["score"], {}, _label(value.get("pred"), classes), extra)


def _from_fork_tuple(value: tuple[Any, ...], ground_truth: str, classes: Sequence[str] | None) -> Score:
    total, well_formed, pred_id, label_id = value[:4]
    parts: dict[str, Any] = {"format": well_formed}
    # With format 0 the original fills in the id of some other class.
    prediction = _label(pred_id, classes) if number(well_formed) else None
    right = prediction is not None and prediction == _label(label_id, classes)
    if right and classes is None:
        prediction = ground_truth
    parts["label"] = float(right)
    if len(value) == 5 and value[4] is not None:
        parts["extension"] = value[4]
    return _ok(total, parts, prediction)


def _ok(total: Any, parts: Mapping[str, Any], prediction: str | None, extra: Mapping[str, Any] | None = None) -> Score:
    read: dict[str, float] = {}
    for name, value in {"score": total, **parts}.items():
        if value is None:
            return failed(FailureKind.NO_VALUE, f"{name} is None")
        found = number(value)
        if found is None:
            return failed(FailureKind.BAD_RETURN, f"{name} is no single number but {type(value).__name__}")
        if not math.isfinite(found):
            return failed(FailureKind.NOT_FINITE, f"{name} is {found}")
        read[name] = found
    return Score.ok(read.pop("score"), read, prediction, extra)


def _label(pred: Any, classes: Sequence[str] | None) -> str | None:
    """A prediction as text: ids become labels where the classes are known."""
    pred = _unboxed(pred)
    if pred is None:
        return None
    value = number(pred)
    if value is not None and value.is_integer():
        index = int(value)
        if classes is None:
            return str(index) if index >= 0 else None
        return classes[index] if 0 <= index < len(classes) else None
    return str(pred).strip() or None


def _unboxed(value: Any) -> Any:
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
