"""RCW (UEA RightWhaleCalls): whether two seconds of sound hold the call of a right whale."""

from __future__ import annotations

from verl.utils.reward_score.labels import LabelScorer, ScoreTuple

SCORER = LabelScorer("rcw_dataset", ("RightWhale", "NoWhale"))


def compute_score(predict_str: str, ground_truth: str) -> ScoreTuple:
    """(reward, format, predicted id, true id) under the published loose rule; an unreadable answer has the id -1.

    Raises ValueError when the ground truth is none of the two classes.
    """
    return SCORER(predict_str, ground_truth)
