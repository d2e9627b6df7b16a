"""Parquet files to rows: what the columns hold, checked, before any tokenizer or image is touched.

Columns are those of the original TimeMaster and of verl: `data_source`, `prompt` (list of {role, content}, or plain
text), `images` (list of {bytes, path}, or paths), `reward_model` {style, ground_truth}, `extra_info`; for SFT also a
column of answers.

Invariants
- A row has exactly one `<image>` literal per image, or the error names the row and both counts.
- A uid depends on the file's name and the row's number only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

IMAGE_LITERAL = "<image>"
Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the parquet columns; `response` is read for SFT only."""

    prompt: str = "prompt"
    images: str = "images"
    data_source: str = "data_source"
    reward_model: str = "reward_model"
    extra_info: str = "extra_info"
    response: str | None = None
    scored: bool = True
    """False: nobody scores the answers, so `data_source` and `reward_model` may be absent."""

    @property
    def needs_truth(self) -> bool:
        return self.scored and self.response is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One checked row. `where` begins every error about it; `number` counts from 0 in its file."""

    where: str
    uid: str
    number: int
    messages: tuple[Message, ...]
    images: tuple[bytes | Path, ...]
    data_source: str
    ground_truth: str
    extra_info: Mapping[str, Any]
    response: str | None


def read_rows(files: str | Path | Sequence[str | Path], columns: Columns, *, max_samples: int = -1) -> list[Row]:
    """All rows of the files, in order; only the first `max_samples` when that is positive.

    Raises ValueError naming the file, and the row where there is one.
    """
    paths = _checked_paths([files] if isinstance(files, str | Path) else list(files))
    rows: list[Row] = []
    for path, label in zip(paths, _labels(paths), strict=True):
        table = _read_table(path, columns)
        if not table.num_rows:
            raise ValueError(f"{path}: holds no rows; run the data step (example/data_preprocess) again")
        for number, record in enumerate(table.to_pylist()):
            if 0 < max_samples <= len(rows):
                return rows
            rows.append(_row(record, columns, path=path, label=label, number=number))
    return rows


def _checked_paths(files: Sequence[str | Path]) -> list[Path]:
    if not files:
        raise ValueError("no data file given: set data.train_files / data.val_files")
    for file in files:
        if "://" in str(file):
            raise ValueError(f"{file}: remote data files are not supported; copy the file here and give its path")
    paths = [Path(file).expanduser() for file in files]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: no such data file; run the data step (example/data_preprocess) first")
    return paths


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest tail of each path, without suffix, that tells the files apart; equal paths are refused."""
    parts = [(*path.resolve().parts[:-1], path.stem) for path in paths]
    if len(set(parts)) < len(parts):
        raise ValueError(f"the same data file is given twice: {[str(path) for path in paths]}")
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _read_table(path: Path, columns: Columns) -> pa.Table:
    try:
        present = pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file: {error}") from error
    required = {"data.prompt_key": columns.prompt}
    if columns.response is not None:
        required["data.response_key"] = columns.response
    elif columns.needs_truth:
        required |= {"data.reward_fn_key": columns.data_source, "the reward column": columns.reward_model}
    for key, name in required.items():
        if name not in present:
            raise ValueError(f"{path}: no column {name!r} ({key}); it has {present}")
    optional = (columns.images, columns.data_source, columns.reward_model, columns.extra_info)
    wanted = [*dict.fromkeys([*required.values(), *(name for name in optional if name in present)])]
    try:
        return pq.read_table(path, columns=wanted)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: damaged parquet file: {error}") from error


def _row(record: dict[str, Any], columns: Columns, *, path: Path, label: str, number: int) -> Row:
    where = f"{path} row {number}"
    messages = _messages(record[columns.prompt], where)
    images = _images(record.get(columns.images), path.parent, where)
    literals = sum(message["content"].count(IMAGE_LITERAL) for message in messages)
    if literals != len(images):
        raise ValueError(
            f"{where}: the prompt has {literals} {IMAGE_LITERAL} but column {columns.images!r} has {len(images)} "
            "images; they must agree (data.image_key names the column)"
        )
    response = None
    if columns.response is not None:
        response = record[columns.response]
        if not isinstance(response, str) or not response:
            raise ValueError(f"{where}: column {columns.response!r} must hold the answer as text, got {response!r}")
    return Row(
        where=where,
        uid=f"{label}-{number}",
        number=number,
        messages=messages,
        images=images,
        data_source=_data_source(record.get(columns.data_source), columns, where),
        ground_truth=_ground_truth(record.get(columns.reward_model), columns, where),
        extra_info=record.get(columns.extra_info) or {},
        response=response,
    )


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": "user", "content": value},)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: the prompt must be text or a list of {{role, content}}, got {value!r:.200}")
    messages = []
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or turn.get("content") is None:
            raise ValueError(f"{where}: a turn of the prompt must be {{role, content}}, got {turn!r:.200}")
        messages.append({"role": turn["role"], "content": _text_of(turn["content"], where)})
    return tuple(messages)


def _text_of(content: Any, where: str) -> str:
    """Content as text; parts of the kind {type: text | image} are joined, an image becomes its literal."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            texts.append(IMAGE_LITERAL)
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise ValueError(f"{where}: prompt content must be text or parts of type text and image, got {part!r:.200}")
    return "".join(texts)


def _images(value: Any, folder: Path, where: str) -> tuple[bytes | Path, ...]:
    if value is None:
        return ()
    images: list[bytes | Path] = []
    for image in value if isinstance(value, list) else [value]:
        source = image
        if isinstance(image, dict):
            source = image.get("bytes") or image.get("path")
        if isinstance(source, str) and source:
            images.append(folder / Path(source).expanduser())
        elif isinstance(source, bytes):
            images.append(source)
        else:
            shown = {k: type(v).__name__ for k, v in image.items()} if isinstance(image, dict) else type(image).__name__
            raise ValueError(f"{where}: image {len(images)} must be {{bytes, path}}, bytes or a path, got {shown}")
    return tuple(images)


def _data_source(value: Any, columns: Columns, where: str) -> str:
    if isinstance(value, str) and value:
        return value
    if value is None and not columns.needs_truth:
        return ""
    raise ValueError(f"{where}: column {columns.data_source!r} must name the data source, got {value!r}")


def _ground_truth(value: Any, columns: Columns, where: str) -> str:
    truth = value.get("ground_truth") if isinstance(value, dict) else None
    if truth is None and not columns.needs_truth:
        return ""
    if truth is None:
        raise ValueError(f"{where}: column {columns.reward_model!r} must hold {{ground_truth}}, got {value!r:.200}")
    return truth if isinstance(truth, str) else json.dumps(truth, default=str)
