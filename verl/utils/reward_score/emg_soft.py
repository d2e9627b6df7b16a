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
from verl.utils.reward_score.judge import Judge, JudgeConfig, JudgeError, JudgeRequest, Rubric, shared_judge
from verl.utils.reward_score.labels import FORMAT_WEIGHT, LABEL_WEIGHT, LabelScorer
from verl.utils.reward_score.returns import failed
from verl.utils.reward_score.tags import AnswerFormat

SCORER = LabelScorer("emg_dataset", ("Healthy", "Myopathy", "Neuropathy"), extension=True)
SOFT_WEIGHT = 0.5

RUBRIC = Rubric(
    name="emg-extension",
    task=(
        "A model looked at a short needle EMG of the tibialis anterior, reasoned, chose Healthy, Myopathy or "
        "Neuropathy and then wrote suggestions for the clinician in the field extension. You do not see the recording: "
        "take the chosen class as given. Grade the field extension only; reasoning and class are there for context."
    ),
    criteria=(
        ("specificity", "names concrete findings, muscles, nerves, tests, intervals or thresholds; 0 for generalities"),
        ("appropriateness", "sound and safe medical practice for the chosen class"),
        ("relevance", "follows from this signal, this reasoning and this class"),
        ("depth", "explains why, in which order and what each result would change; 0 for a bare list or one line"),
    ),
    stock_phrases=(
        "further tests",
        "clinical history",
        "physical examination",
        "refer to specialist",
        "confirm the diagnosis",
    ),
    stock_field="extension",
    cap=0.4,
)


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
    right; the criteria and whether the cap applied are in `extra`. Without an extension soft is 0, unasked.
    Raises ValueError for a ground truth outside the classes, an unknown format or judge option.
    """
    scorer = dataclasses.replace(SCORER, answer_format=AnswerFormat(answer_format))
    reward, well_formed, pred_id, label_id = scorer(predict_str, ground_truth)
    label = None if pred_id < 0 else scorer.classes[pred_id]
    parts = {"format": float(well_formed), "label": float(pred_id == label_id)}
    if pred_id != label_id or not well_formed:
        return Score.ok(reward, parts, label)
    fields = _fields(scorer, predict_str)
    if not fields["extension"]:
        return Score.ok(LABEL_WEIGHT + FORMAT_WEIGHT, parts | {"soft": 0.0}, label)
    try:
        verdict = await _judge(judge).judge(JudgeRequest(RUBRIC, fields))
    except JudgeError as error:
        return failed(error.kind, str(error))
    extra = {"judge": dict(verdict.criteria), "capped": verdict.capped}
    return Score.ok(reward + soft_weight * verdict.score, parts | {"soft": verdict.score}, label, extra)


def _fields(scorer: LabelScorer, text: str) -> dict[str, str]:
    answer = scorer.read(text)
    return {"reasoning": answer.think or "", "class": answer.label or "", "extension": answer.extension or ""}


def _judge(judge: Mapping[str, Any] | Judge | None) -> Judge:
    if judge is None or isinstance(judge, Mapping):
        return shared_judge(JudgeConfig.from_mapping(judge or {}))
    return judge
