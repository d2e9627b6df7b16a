"""Rewards by data source.

A source's classes come from its own module here (`ctu.py`) or, when it has none, from its task in
`verl.timeseries.tasks`, which also declares the parts of the reward, or from its rows (`extra_info.classes`, which the
data step writes for a data set without a task). Anything else needs `custom_reward_function.path`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from typing import Any

from verl.utils.reward_score.labels import LabelScorer, ScoreTuple
from verl.utils.reward_score.parts import PUBLISHED, RewardPart
from verl.utils.reward_score.tags import AnswerFormat

_MODULES = {
    "computer_dataset": "ctu",
    "emg_dataset": "emg",
    "ecg_dataset": "ecg",
    "har_dataset": "har",
    "rcw_dataset": "rcw",
    "lightning_dataset": "tee",
}


def get_scorer(data_source: str, format: str | AnswerFormat = AnswerFormat.LOOSE) -> LabelScorer:
    """The scorer of a data source: `scorer(predict_str, ground_truth) -> (reward, format, predicted id, true id)`.

    Raises ValueError for an unknown format and for a data source that nothing scores.
    """
    try:
        rule = AnswerFormat(format)
    except ValueError:
        legal = ", ".join(rule.value for rule in AnswerFormat)
        raise ValueError(f"unknown answer format {format!r}: use one of {legal}") from None
    scorer = _find(data_source, rule)
    if scorer is None:
        raise ValueError(_not_registered(data_source))
    return scorer


def declared_parts(data_source: str) -> tuple[RewardPart, ...]:
    """The parts that the task of a data source declares; the published ones where no task does."""
    # Late, so that scoring a registered source by its rule loads none of the readers.
    from verl.timeseries.tasks import find_by_data_source

    task = find_by_data_source(data_source)
    return PUBLISHED if task is None else task.reward


_from_rows: dict[str, tuple[str, ...]] = {}


def declare_from_row(data_source: str, extra_info: Mapping[str, Any]) -> None:
    """Take the classes of a data source from a row's `extra_info.classes`; nothing happens where there are none.

    Raises ValueError when another row of the source named others, or a task declares the source.
    """
    classes = extra_info.get("classes")
    if classes is None or _from_rows.get(data_source) == tuple(classes):
        return
    before = _from_rows.get(data_source) or known_classes(data_source)
    if before is not None:
        raise ValueError(
            f"data_source {data_source!r} has the classes {', '.join(before)}, but a row names {', '.join(classes)}: "
            "build the data with another csv.name"
        )
    _from_rows[data_source] = tuple(classes)
    _find.cache_clear()


def declaration(data_source: str) -> dict[str, Any]:
    """What rows declared of a data source, as their `extra_info`: for `declare_from_row` in another process."""
    classes = _from_rows.get(data_source)
    return {} if classes is None else {"classes": classes}


def known_classes(data_source: str) -> tuple[str, ...] | None:
    """Labels of a data source in id order, or None when no task declares it."""
    scorer = _find(data_source, AnswerFormat.LOOSE)
    return None if scorer is None else scorer.classes


def _default_compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any] | None = None
) -> ScoreTuple:
    """The original's dispatcher: (reward, valid, predicted id, true id).

    Raises ValueError as `get_scorer` does, and for a ground truth that is not a label of the task.
    """
    return get_scorer(data_source)(solution_str, ground_truth)


@functools.cache
def _find(data_source: str, rule: AnswerFormat) -> LabelScorer | None:
    if data_source in _MODULES:
        module = importlib.import_module(f"{__name__}.{_MODULES[data_source]}")
        return dataclasses.replace(module.SCORER, answer_format=rule)
    from verl.timeseries.tasks import find_by_data_source

    task = find_by_data_source(data_source)
    if task is None and data_source in _from_rows:
        return LabelScorer(data_source, _from_rows[data_source], rule)
    if task is None:
        return None
    return LabelScorer(data_source, task.classes, rule, extension=task.asks_extension)


def _not_registered(data_source: str) -> str:
    return (
        f"data_source {data_source!r} is not registered: set custom_reward_function.path to a python file with "
        "compute_score(data_source, solution_str, ground_truth, extra_info), or declare a task with its classes in "
        "verl/timeseries/tasks"
    )
