"""HAR (UCI HAR): what a person does, from body acceleration."""

from __future__ import annotations

from verl.utils.reward_score.labels import LabelScorer, ScoreTuple

SCORER = LabelScorer(
    "har_dataset", ("WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS", "SITTING", "STANDING", "LAYING")
)


def compute_score(predict_str: str, ground_truth: str) -> ScoreTuple:
    """(reward, format, predicted id, true id) under the published loose rule; an unreadable answer has the id -1.

    Raises ValueError when the ground truth is none of the six classes.
    """
    return SCORER(predict_str, ground_truth)
