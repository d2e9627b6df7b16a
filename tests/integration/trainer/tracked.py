"""Reads what trackers have left on disk."""

from __future__ import annotations

import itertools
import json
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32768


def expanded(name: str, **known: str) -> list[str]:
    """`a/{b,c}` -> `a/b`, `a/c`; a single word in braces is one of `known`."""
    parts = re.split(r"\{([^}]*)\}", name)
    choices = [[p] if i % 2 == 0 else p.split(",") if "," in p else [known[p]] for i, p in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _wandb_records(path: Path) -> Iterator[bytes]:
    """Records of a `.wandb` file: LevelDB's log format behind a header of 7 bytes. wandb 0.31 brings no reader."""
    data, whole = path.read_bytes(), b""
    assert data[:4] == b":W&B", f"{path} is no wandb file: {data[:7]!r}"
    at = 7
    while at < len(data):  # a record that is being written ends the loop
        if _BLOCK - at % _BLOCK < 7:
            at += _BLOCK - at % _BLOCK  # the rest of a block holds no header
            continue
        if len(data) - at < 7:
            return
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        at += 7
        if len(data) - at < size:
            return
        whole += data[at : at + size]
        at += size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def wandb_history(path: Path) -> dict[str, list[Any]]:
    """Every key that a run has logged, with its values in order.

    wandb's own process may still be writing for a moment when the run has ended; the run's exit is its last word.
    """
    from wandb.proto import wandb_internal_pb2 as proto

    records: list[Any] = []
    end = time.monotonic() + 60
    while not any(record.WhichOneof("record_type") == "exit" for record in records):
        assert time.monotonic() < end, f"{path} has no end after 60 s, only {len(records)} records"
        time.sleep(0.1)
        records = [proto.Record.FromString(data) for data in _wandb_records(path)]
    found: dict[str, list[Any]] = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                key = item.key or ".".join(item.nested_key)
                found.setdefault(key, []).append(json.loads(item.value_json))
    return found
