"""CTU (UCR Computers): desktop or laptop, from a day of electricity use."""

from __future__ import annotations

from verl.utils.reward_score.labels import LabelScorer, ScoreTuple

SCORER = LabelScorer("computer_dataset", ("Desktop", "Laptop"))


def compute_score(predict_str: str, ground_truth: str) -> ScoreTuple:
    """(reward, format, predicted id, true id) under the published loose rule; an unreadable answer has the id -1.

    Raises ValueError when the ground truth is neither `Desktop` nor `Laptop`.
    """
    return SCORER(predict_str, ground_truth)
