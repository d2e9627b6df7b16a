"""From a time-series archive to plots and parquet files: no torch, no ray.

Reading order: `task.py` (what a task declares), `tasks/ctu.py` (one task), `readers.py`, `plot.py`, `numeric.py`,
`describe.py`, `build.py`, `card.py`. Beside them: `own.py` (CSV folders), `baselines.py`, `tokens.py`, `written.py`.
"""

from verl.timeseries.task import TaskSpec
from verl.timeseries.tasks import find_by_data_source, get_task, task_names

__all__ = ["TaskSpec", "find_by_data_source", "get_task", "task_names"]
