"""Parquet tables from the Arrow folder of the data step.

    python3 -m verl.timeseries.from_arrow task=ctu folder=data/ctu_image

Invariant: on an untouched output of `verl.timeseries.build` every file keeps its bytes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl.timeseries.readers import SPLITS
from verl.timeseries.split import cut_val
from verl.timeseries.task import TaskSpec
from verl.timeseries.tasks import get_task

_COLUMNS = {"data_source", "prompt", "images", "ability", "reward_model", "extra_info"}


def write_tables(folder: Path, task: TaskSpec, *, seed: int = 1) -> dict[str, int]:
    """Write `{train,test,fit,val}.parquet` beside the Arrow splits; rows of each. `seed` cuts train into fit and val.

    Raises ValueError when the folder is not one that the data step wrote for this task.
    """
    from verl.timeseries.tables import to_table, write_parquet

    card = folder / "data_card.json"
    kind = json.loads(card.read_text(encoding="utf-8"))["group_kind"] if card.is_file() else "row"
    if kind != "row":
        raise ValueError(
            f"{folder}: fit and val of task {task.name} are cut by {kind}, which the Arrow folders do not hold; run "
            "python3 -m verl.timeseries.build, which writes these tables too"
        )
    rows = {split: _read(folder, split, task) for split in SPLITS}
    labels = [row["reward_model"]["ground_truth"] for row in rows["train"]]
    val, fit = cut_val(task, labels, None, seed)
    tables = {**rows, "fit": [rows["train"][i] for i in fit], "val": [rows["train"][i] for i in val]}
    for name, of_table in tables.items():
        aside = folder / f".{name}.parquet.tmp"
        write_parquet(to_table(of_table), aside)
        os.replace(aside, folder / f"{name}.parquet")
    return {name: len(of_table) for name, of_table in tables.items()}


def _read(folder: Path, split: str, task: TaskSpec) -> list[dict[str, Any]]:
    from datasets import Dataset

    if not (folder / split / "state.json").is_file():
        raise ValueError(f"{folder}: no Arrow folder {split!r}; run create_data/image_processing/ctu.py first")
    data = Dataset.load_from_disk(str(folder / split))
    missing = sorted(_COLUMNS - set(data.column_names))
    if missing:
        raise ValueError(f"{folder / split}: no columns {missing}; run create_data/image_processing/ctu.py anew")
    # Straight from Arrow: reading through the library would decode the pictures.
    rows: list[dict[str, Any]] = data.data.table.to_pylist()
    found = sorted({row["data_source"] for row in rows})
    if found != [task.data_source]:
        raise ValueError(f"{folder / split}: data_source {found}, but task {task.name} has {task.data_source!r}")
    return rows


def main(args: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    given = dict(arg.partition("=")[::2] for arg in (sys.argv[1:] if args is None else args))
    try:
        unknown = sorted(set(given) - {"task", "folder", "seed"})
        if unknown or not {"task", "folder"} <= set(given):
            raise ValueError(f"write task=NAME folder=DIR [seed=1]; got {' '.join(given) or 'nothing'}")
        folder = Path(given["folder"]).expanduser()
        counts = write_tables(folder, get_task(given["task"]), seed=int(given.get("seed", "1")))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {folder}: {', '.join(f'{name} {count}' for name, count in counts.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
