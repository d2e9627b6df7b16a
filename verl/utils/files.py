"""Writing files so that a crash at any moment leaves either the old or the new one, never half of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def fsync_path(path: Path) -> None:
    """Flush one file or folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder under `folder`, the folder itself last."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync_path(Path(parent) / name)
        fsync_path(Path(parent))


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` beside `path`, flush it, and rename it into place."""
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    fsync_path(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    """`write_text_atomic` of `value` as json; numpy scalars and tensors are refused by json (TypeError)."""
    write_text_atomic(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def files_in(folder: Path) -> dict[str, int]:
    """All files below a folder: relative path -> bytes."""
    return {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
