"""What a run is a continuation of: the content of its model and of its training rows, wherever they lie.

Invariants
- The same folder, moved or reached by another name, has the same digest; other weights or another config have another.
- A checkpoint of another model or other rows is refused with both named, before anything is started or written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl.utils.checkpoint.manager import Checkpoint

Identity = dict[str, dict[str, str]]
"""Config key -> `digest`, which must agree, and `shown`, for people."""

WHOLE_UP_TO = 64 * 2**20
"""Weight files up to so many bytes are read whole, larger ones sampled."""
_BLOCK = 64 * 2**10
_BLOCKS = 64
_WEIGHTS = ("*.safetensors", "*.bin")


def run_identity(
    *, model_key: str, model: str, folder: Path, train_files: str | Sequence[str], rows_digest: str
) -> Identity:
    """Of a run that trains the model `model`, found in `folder`, on rows with `rows_digest`."""
    files = [train_files] if isinstance(train_files, str) else list(train_files)
    return {
        model_key: {"digest": model_digest(folder), "shown": model},
        "data.train_files": {"digest": rows_digest, "shown": ", ".join(files)},
    }


def check_same_run(checkpoint: Checkpoint, mine: Identity) -> None:
    """Raises ValueError naming what differs between the run that wrote the checkpoint and this one."""
    stored = checkpoint.read_data().get("identity")
    anew = "set trainer.resume_mode=disable, or give trainer.experiment_name another value"
    for key, here in mine.items():
        there = stored.get(key) if isinstance(stored, Mapping) else None
        if not isinstance(there, Mapping):
            raise ValueError(
                f"{checkpoint.path} is of an older version, which did not store the digest of {key}: start anew from "
                f"its weights with {next(iter(mine))}={checkpoint.huggingface}, and {anew}"
            )
        if there["digest"] != here["digest"]:
            raise ValueError(f"{checkpoint.path} was made with {_named(key, there)}, this run has {_named(key, here)}: "
                             f"{anew}")  # fmt: skip


def model_digest(folder: str | Path) -> str:
    """sha256 over config.json and every weight file: its name, its size and its content.

    Of a file over `WHOLE_UP_TO` bytes the head, which names every tensor, and blocks spread evenly over it: a training
    step moves nearly every weight.
    """
    total = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for path in sorted(p for pattern in _WEIGHTS for p in Path(folder).glob(pattern)):
        size = path.stat().st_size
        total.update(f"\0{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= WHOLE_UP_TO:
                total.update(file.read())
                continue
            total.update(file.read(16 * _BLOCK))
            for number in range(_BLOCKS):
                file.seek((size - _BLOCK) * number // (_BLOCKS - 1))
                total.update(file.read(_BLOCK))
    return total.hexdigest()


def _named(key: str, one: Mapping[str, Any]) -> str:
    return f"{key}={one['shown']} (content {one['digest'][:12]})"
