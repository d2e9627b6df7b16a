"""Output folders that are whole or not there.

Invariants
- The new folder is written beside its target under a hidden name and renamed; a failure leaves the old one as it was.
- A folder that holds something else than its kind's own entries is not replaced.
- Two writers of one target cannot mix: the second is refused while the first runs.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path, *, own: frozenset[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends without an error.

    `own` are the entries that the target may hold already; anything else there is a ValueError unless `overwrite`.
    A block that fails removes what it wrote. What a killed process left is removed by the next.
    """
    _check_replaceable(target, own, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial"
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{target}: another process is writing it; wait for it, or choose another output="
            ) from None
        try:
            _empty(partial)
            yield partial
            _swap(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _check_replaceable(target: Path, own: frozenset[str], overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"output={target} is not a folder; choose another or remove it")
    if target.is_dir() and not overwrite:
        foreign = sorted(entry.name for entry in target.iterdir() if entry.name not in own)
        if foreign:
            raise ValueError(
                f"output={target} holds what this program did not write ({', '.join(foreign[:4])}); "
                "move it away, choose another output=, or set overwrite=true to delete it"
            )


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _swap(partial: Path, target: Path) -> None:
    """Put `partial` in the place of `target`; on a failure the old target returns."""
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:
        if old.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
