"""ECG (PhysioNet/CinC 2017): the rhythm of five seconds of a single-lead ECG."""

from __future__ import annotations

from verl.utils.reward_score.labels import LabelScorer, ScoreTuple

SCORER = LabelScorer("ecg_dataset", ("normal sinus rhythm", "atrial fibrillation", "other cardiac rhythms", "noise"))


def compute_score(predict_str: str, ground_truth: str) -> ScoreTuple:
    """(reward, format, predicted id, true id) under the published loose rule; an unreadable answer has the id -1.

    Raises ValueError when the ground truth is none of the four classes.
    """
    return SCORER(predict_str, ground_truth)
