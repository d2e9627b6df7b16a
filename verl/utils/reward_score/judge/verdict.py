"""The strict reader of a judge's reply (pure).

Invariants
- Only a JSON object with exactly the asked keys, each a number in [0, 1], is a verdict.
- Everything else is an error, never a number: prose around it, missing, surplus or repeated keys, strings, booleans.
"""

from __future__ import annotations

import json
from typing import Any

from verl.utils.reward_score.judge.errors import JudgeError
from verl.utils.reward_score.returns import FailureKind


def parse_verdict(text: str, keys: tuple[str, ...]) -> dict[str, float]:
    """Read one reply. Raises JudgeError (malformed, out_of_range)."""
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise _malformed("is not one JSON object") from None
    if not isinstance(found, dict):
        raise _malformed("is not one JSON object")
    if set(found) != set(keys):
        raise _malformed(f"does not have exactly the keys {', '.join(keys)}")
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in found.values()):
        raise _malformed("holds a value that is no number")
    if not all(0 <= value <= 1 for value in found.values()):
        raise JudgeError(FailureKind.OUT_OF_RANGE, "the judge's reply holds a number outside [0, 1]")
    return {key: float(found[key]) for key in keys}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("repeated key")
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _malformed(what: str) -> JudgeError:
    return JudgeError(FailureKind.MALFORMED, f"the judge's reply {what}")
