"""Advantage estimators by `algorithm.adv_estimator`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np

from verl.algorithms.advantage.base import AdvantageEstimator, Advantages
from verl.algorithms.advantage.grpo import grpo_advantage
from verl.algorithms.advantage.reinforce_plus_plus import reinforce_plus_plus_advantages
from verl.algorithms.advantage.rloo import rloo_advantage
from verl.protocol import Score

__all__ = [
    "AdvantageEstimator",
    "Advantages",
    "advantage_metrics",
    "estimate_groups",
    "get_estimator",
    "grpo_advantage",
]

_ESTIMATORS: dict[str, AdvantageEstimator] = {"grpo": grpo_advantage, "rloo": rloo_advantage}
"""Each group by itself."""
_OF_THE_STEP = "reinforce_plus_plus"
_NOT_YET = ("gae", "remax")


def estimate_groups(
    name: str, groups: Sequence[Sequence[Score]], lengths: Sequence[Sequence[int]], *, norm_by_std: bool = True
) -> list[Advantages]:
    """Advantages of all groups of a step by `algorithm.adv_estimator`; `lengths` are the answers' tokens.

    Raises ValueError for an estimator that is unknown or not built yet.
    """
    if name == _OF_THE_STEP:
        return reinforce_plus_plus_advantages(groups, lengths)
    estimate = get_estimator(name)
    return [estimate(scores, norm_by_std=norm_by_std) for scores in groups]


def get_estimator(name: str) -> AdvantageEstimator:
    """The estimator of one group called `name`. Raises ValueError for one that is unknown or not built yet."""
    if name in _ESTIMATORS:
        return _ESTIMATORS[name]
    if name == "gae":
        raise ValueError(
            "algorithm.adv_estimator=gae needs a critic, which there is none of: use algorithm.adv_estimator=grpo"
        )
    built = ", ".join((*_ESTIMATORS, _OF_THE_STEP))
    if name in _NOT_YET:
        raise ValueError(f"algorithm.adv_estimator={name} is not built yet: use one of {built}")
    close = difflib.get_close_matches(name, [*_ESTIMATORS, _OF_THE_STEP, *_NOT_YET], n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ValueError(f"algorithm.adv_estimator={name} is unknown{hint}: use one of {built}")


def advantage_metrics(groups: Sequence[Sequence[Score]], advantages: Sequence[Advantages]) -> dict[str, float]:
    """How much of a step teaches: counts of dropped groups and failed answers, shares of groups by kind.

    `training/groups/{count,dropped,failed_answers}` are counts; `training/groups/{mixed,equal}_share` are shares of the
    kept groups: equal ones (all answers scored alike) carry no policy gradient.
    """
    assert len(groups) == len(advantages), f"{len(groups)} groups but {len(advantages)} advantages"
    kept = [a for a in advantages if not a.dropped]
    equal = sum(not np.any(a.values) for a in kept)
    metrics = {
        "training/groups/count": float(len(groups)),
        "training/groups/dropped": float(len(groups) - len(kept)),
        "training/groups/failed_answers": float(sum(not score.is_ok for group in groups for score in group)),
    }
    if kept:
        metrics["training/groups/equal_share"] = equal / len(kept)
        metrics["training/groups/mixed_share"] = 1 - equal / len(kept)
    return metrics
