"""A reward for random answers: a number from the answer's digest, so that the answers of a group differ."""

from __future__ import annotations

import hashlib
from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    return hashlib.sha256(solution_str.encode()).digest()[0] / 255
