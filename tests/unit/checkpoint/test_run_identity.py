"""A checkpoint belongs to a model's content and to rows, not to a path."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from verl.utils.checkpoint import identity
from verl.utils.checkpoint.identity import check_same_run, model_digest, run_identity
from verl.utils.checkpoint.manager import Checkpoint, CheckpointManager


def write_model(folder: Path, seed: int = 0, size: int = 1000) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    save_file({"w": np.random.default_rng(seed).random(size, np.float32)}, folder / "model.safetensors")
    return folder


def of(folder: Path, rows: str = "rows") -> identity.Identity:
    return run_identity(model_key="m.path", model=str(folder), folder=folder, train_files="a.parquet", rows_digest=rows)


def saved(root: Path, mine: object) -> Checkpoint:
    with CheckpointManager(root).saving(1, {"identity": mine}):
        pass
    return Checkpoint(1, root / "global_step_1")


@pytest.mark.parametrize("size", [1000, 1_000_000], ids=["read whole", "sampled"])
def test_a_moved_model_is_the_same_and_a_retrained_one_is_not(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "WHOLE_UP_TO", 100_000)
    here = write_model(tmp_path / "a", size=size)
    moved = shutil.copytree(here, tmp_path / "elsewhere" / "b")
    checkpoint = saved(tmp_path / "run", of(here))
    check_same_run(checkpoint, of(moved))
    shutil.rmtree(here)
    retrained = write_model(here, seed=1, size=size)
    assert model_digest(retrained) != model_digest(moved)
    with pytest.raises(ValueError, match=rf"made with m\.path={here} .*this run has m\.path={here} .*=disable"):
        check_same_run(checkpoint, of(retrained))


def test_a_changed_config_or_other_rows_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a")
    checkpoint = saved(tmp_path / "run", of(folder))
    with pytest.raises(ValueError, match=r"made with data\.train_files=a\.parquet"):
        check_same_run(checkpoint, of(folder, "others"))
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl", "rope_theta": 1}')
    with pytest.raises(ValueError, match=r"made with m\.path="):
        check_same_run(checkpoint, of(folder))


@pytest.mark.parametrize("old", [{"m.path": "/models/a", "data.train_files (digest)": "rows"}, None])
def test_a_checkpoint_that_stored_a_path_says_how_to_go_on(tmp_path: Path, old: object) -> None:
    checkpoint = saved(tmp_path / "run", old)
    message = rf"older version.*m\.path={checkpoint.huggingface}.*trainer\.resume_mode=disable"
    with pytest.raises(ValueError, match=message):
        check_same_run(checkpoint, of(write_model(tmp_path / "a")))
