"""Rows of the data step and how they are stored: parquet files and `datasets.save_to_disk` folders.

Columns: data_source, prompt, images, ability, reward_model, extra_info (the names that GRPO trainers of the verl family
read), plus `response` in the supervised files; the numeric modality has no `images`. Written so that the same rows give
the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl.timeseries.readers import Series
from verl.timeseries.task import TaskSpec

if TYPE_CHECKING:
    from datasets import Features

Row = dict[str, Any]


def make_row(task: TaskSpec, *, split: str, index: int, label: str, shown: bytes | Series) -> Row:
    """One row; `index` is the row's number in the archive's split. `shown` is a PNG, or the series for digits."""
    picture = isinstance(shown, bytes)
    messages = task.messages() if isinstance(shown, bytes) else task.messages(shown)
    question = task.full_question if isinstance(shown, bytes) else task.numeric_question(shown.shape[1])
    return {
        "data_source": task.data_source,
        "prompt": messages,
        **({"images": [{"bytes": shown, "path": None}]} if picture else {}),
        "ability": "time series",
        "reward_model": {"style": "rule", "ground_truth": label},
        "extra_info": {
            "split": split,
            "index": index,
            "answer": label,
            "question": question,
            **({} if task.declared else {"classes": list(task.classes)}),
        },
    }


def _features(*, images: bool, classes: bool, response: bool) -> Features:
    from datasets import Features, Image, List, Value

    text = Value("string")
    columns: dict[str, Any] = {
        "data_source": text,
        "prompt": List({"role": text, "content": text}),
        **({"images": List(Image())} if images else {}),
        "ability": text,
        "reward_model": {"style": text, "ground_truth": text},
        "extra_info": {
            "split": text,
            "index": Value("int64"),
            "answer": text,
            "question": text,
            **({"classes": List(text)} if classes else {}),
        },
    }
    if response:
        columns["response"] = text
    return Features(columns)


def to_table(rows: Sequence[Row]) -> pa.Table:
    """Arrow table with Hugging Face's feature metadata, so that `images` decodes to pictures when loaded."""
    return pa.Table.from_pylist(list(rows), schema=_features_of(rows[0]).arrow_schema)


def _features_of(row: Row) -> Features:
    return _features(images="images" in row, classes="classes" in row["extra_info"], response="response" in row)


def write_parquet(table: pa.Table, path: Path) -> None:
    """One parquet file. PNG bytes do not shrink again, so small row groups cost nothing and keep reading cheap."""
    pq.write_table(table, path, row_group_size=100, compression="snappy")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of `datasets`, unless it was on for someone else before."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


def save_to_disk(tables: Mapping[str, pa.Table], folder: Path) -> None:
    """A `DatasetDict` folder: one Arrow sub-folder per split and `dataset_dict.json`.

    The fingerprint is a digest of the rows: the library's own depends on the moment.
    """
    from datasets import Dataset, DatasetDict, DatasetInfo

    splits = {}
    for name, table in tables.items():
        content = hashlib.sha256()
        for batch in table.to_batches(max_chunksize=100):
            content.update(json.dumps(batch.to_pylist(), sort_keys=True, default=bytes.hex).encode())
        info = DatasetInfo(features=_features_of(table.slice(0, 1).to_pylist()[0]))
        splits[name] = Dataset(table, info=info, fingerprint=content.hexdigest()[:16])
    with _quiet():
        DatasetDict(splits).save_to_disk(str(folder))
