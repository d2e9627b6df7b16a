"""EMG (PhysioNet emgdb): Healthy, Myopathy or Neuropathy, by class and format alone; `emg_soft.py` adds the judge."""

from __future__ import annotations

from verl.utils.reward_score.labels import LabelScorer, ScoreTuple

SCORER = LabelScorer("emg_dataset", ("Healthy", "Myopathy", "Neuropathy"), extension=True)


def compute_score(predict_str: str, ground_truth: str) -> ScoreTuple:
    """(reward, format, predicted id, true id) under the published loose rule; an unreadable answer has the id -1.

    Raises ValueError when the ground truth is none of the three classes.
    """
    return SCORER(predict_str, ground_truth)
