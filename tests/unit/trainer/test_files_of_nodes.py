"""A checkpoint counts only when the driver sees what every node wrote."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from verl.trainer.ppo.workers import wait_for_files

WRITTEN = [{"model/rank0.safetensors": 3, "config.json": 2}, {"model/rank1.safetensors": 4}]


def write(folder: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)


def test_files_that_appear_late_are_waited_for(tmp_path: Path) -> None:
    write(tmp_path, WRITTEN[0])
    late = threading.Timer(0.3, write, [tmp_path, WRITTEN[1]])
    late.start()
    wait_for_files(tmp_path, WRITTEN, patience=30)
    late.join()
    assert (tmp_path / "model/rank1.safetensors").stat().st_size == 4


@pytest.mark.parametrize("size", [None, 3])
def test_a_file_that_stays_away_or_short_is_named(tmp_path: Path, size: int | None) -> None:
    write(tmp_path, WRITTEN[0] | ({} if size is None else {"model/rank1.safetensors": size}))
    with pytest.raises(OSError, match=r"does not see \['model/rank1\.safetensors'\], which other nodes wrote"):
        wait_for_files(tmp_path, WRITTEN, patience=0.2)
