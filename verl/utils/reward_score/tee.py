"""TEE (UCR Lightning7): which kind of lightning event."""

from __future__ import annotations

from verl.utils.reward_score.labels import LabelScorer, ScoreTuple

SCORER = LabelScorer(
    "lightning_dataset",
    (
        "CG Positive",
        "IR Negative",
        "Subsequent Return Stroke",
        "Impulsive",
        "Impulsive Pair",
        "Gradual Intra-Cloud",
        "Off-record",
    ),
)


def compute_score(predict_str: str, ground_truth: str) -> ScoreTuple:
    """(reward, format, predicted id, true id) under the published loose rule; an unreadable answer has the id -1.

    Raises ValueError when the ground truth is none of the seven classes.
    """
    return SCORER(predict_str, ground_truth)
