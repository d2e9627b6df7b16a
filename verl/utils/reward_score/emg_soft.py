"""EMG with the soft part of the published reward (TimeMaster, arXiv 2506.13705): a judge reads the `<extension>`.

total = 0.9 * hard + 0.1 * format + 0.5 * soft, soft only where class and format are right.
The judge sees reasoning, class and extension: not the plot, not the truth. The rubric's wording is ours.

Use it with `custom_reward_function.path=verl/utils/reward_score/emg_soft.py` and the judge's options in
`custom_reward_function.reward_kwargs.judge` (see `JudgeConfig`).

Invariants
- The judge is asked for right, well-formed answers with an extension only.
- A right answer that could not be judged is a failed score, never a lower one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from verl.protocol import Score
from verl.timeseries.tasks.emg import RUBRIC, TASK
from verl.utils.reward_score.composite import Composite
from verl.utils.reward_score.emg import SCORER
from verl.utils.reward_score.judge import Judge, JudgeConfig, shared_judge
from verl.utils.reward_score.parts import PartKind
from verl.utils.reward_score.tags import AnswerFormat

__all__ = ["RUBRIC", "SCORER", "SOFT_WEIGHT", "compute_score"]

SOFT_WEIGHT = next(part.weight for part in TASK.reward if part.kind is PartKind.SOFT)


async def compute_score(
    predict_str: str,
    ground_truth: str,
    *,
    judge: Mapping[str, Any] | Judge | None = None,
    answer_format: str = AnswerFormat.LOOSE.value,
    soft_weight: float = SOFT_WEIGHT,
) -> Score:
    """The three-part reward, or a failed score with the judge's reason.

    `judge` holds options of `JudgeConfig`, or is a judge. Parts: format, label, and soft where class and format are
    right; `extra` holds the criteria (`soft/depth`) and whether the cap applied (`soft/capped`). Without an extension
    soft is 0, unasked.
    Raises ValueError for a ground truth outside the classes, an unknown format or judge option.
    """
    scorer = dataclasses.replace(SCORER, answer_format=AnswerFormat(answer_format))
    parts = [
        dataclasses.replace(part, weight=soft_weight) if part.kind is PartKind.SOFT else part for part in TASK.reward
    ]
    return await Composite(scorer, parts, judge=_judge(judge)).score(predict_str, ground_truth, {})


def _judge(judge: Mapping[str, Any] | Judge | None) -> Judge:
    if judge is None or isinstance(judge, Mapping):
        return shared_judge(JudgeConfig.from_mapping(judge or {}))
    return judge
