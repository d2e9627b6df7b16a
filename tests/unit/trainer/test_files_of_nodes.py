"""What all nodes must see alike, and that a checkpoint counts only when the driver sees what every node wrote."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from verl.config import load
from verl.trainer.ppo import cluster
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


def test_model_adapter_images_and_outputs_are_looked_for_on_every_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Any] = []
    monkeypatch.setattr(cluster, "check_shared", lambda nodes, *, outputs, inputs: looked.append((outputs, inputs)))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    key = "actor_rollout_ref.model"
    given = [f"{key}.path={tmp_path}", f"trainer.default_local_dir={tmp_path / 'out'}", "trainer.val_only=True"]
    for more in ([], [f"{key}.lora_adapter_path={tmp_path / 'adapter'}"]):
        cluster.check_nodes(load("ppo_trainer", [*given, *more]), [], [tmp_path / "store"], writes=True)
    (outputs, plain), (_, adapted) = looked
    assert outputs == tmp_path / "out"
    assert plain == {f"{key}.path": tmp_path, "image store 0 (data.image_cache_dir)": tmp_path / "store"}
    assert adapted == plain | {f"{key}.lora_adapter_path": tmp_path / "adapter"}
