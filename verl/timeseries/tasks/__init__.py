"""The task registry: by name for the data step, by `data_source` for whoever reads a parquet row."""

from __future__ import annotations

import difflib

from verl.timeseries.task import TaskSpec
from verl.timeseries.tasks import basic_motions, bundled, ctu, ecg, emg, har, rcw, tee

_PUBLISHED = (ctu.TASK, emg.TASK, ecg.TASK, har.TASK, rcw.TASK, tee.TASK)
_TASKS: dict[str, TaskSpec] = {task.name: task for task in (*_PUBLISHED, basic_motions.TASK, *bundled.TASKS)}
_BY_SOURCE: dict[str, TaskSpec] = {task.data_source: task for task in _TASKS.values()}
assert len(_BY_SOURCE) == len(_TASKS), f"{len(_TASKS)} tasks, but {len(_BY_SOURCE)} different data sources"


def task_names() -> tuple[str, ...]:
    """Names that `get_task` knows."""
    return tuple(_TASKS)


def get_task(name: str) -> TaskSpec:
    """The task of that name. Raises ValueError, with the nearest known name, when there is none."""
    if name in _TASKS:
        return _TASKS[name]
    near = difflib.get_close_matches(name.lower(), _TASKS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown task={name!r}; {hint}known: {', '.join(_TASKS)}")


def find_by_data_source(data_source: str) -> TaskSpec | None:
    """The task that writes rows with this `data_source`; None when no task here does."""
    return _BY_SOURCE.get(data_source)
