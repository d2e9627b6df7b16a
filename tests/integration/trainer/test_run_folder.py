"""The run folder under crashes and rivals: no row is lost, one run at a time, ranks decide together."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from in_process import rl_here
from runs import Data, Launcher, pointer, read_lines, rl_overrides, sft_overrides

from verl.trainer import ray_trainer
from verl.utils.checkpoint.manager import CheckpointManager

EVERY_STEP = ("trainer.total_training_steps=3", "trainer.save_freq=1", "data.train_batch_size=2")


@pytest.mark.parametrize("point", ["flushed", "renamed", "pointer"])
def test_a_run_that_dies_while_it_saves_loses_no_row_and_repeats_none(
    work: Path, data: Data, tiny: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = work / f"dies_{point}"
    overrides = rl_overrides(data, tiny, folder, *EVERY_STEP)
    passed = []

    def die(name: str) -> None:
        passed.append(name)
        if passed.count(point) == 2:
            raise KeyboardInterrupt(f"at {name}")

    with monkeypatch.context() as patch:
        patch.setattr(ray_trainer, "CheckpointManager", functools.partial(CheckpointManager, on_point=die))
        with pytest.raises(KeyboardInterrupt):
            rl_here(overrides, folder)
    saved = pointer(folder)
    assert saved == (2 if point == "pointer" else 1)
    run = rl_here(overrides, folder).ok()
    assert f"resumed {run.checkpoint(saved)}" in run.out
    assert [row["step"] for row in run.rows] == [1, 2, 3]
    assert all(row["timing_s/save_checkpoint"] > 0 for row in run.rows)


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(work: Path, data: Data, tiny: Path) -> None:
    folder = work / "rivals"
    first = CheckpointManager(folder)
    first.lock()
    half = folder / ".tmp-global_step_1"
    half.mkdir()
    before = sorted(path.name for path in folder.iterdir())
    run = rl_here(rl_overrides(data, tiny, folder, *EVERY_STEP), folder)
    assert run.code == 2 and f"error: {folder} is in use by process" in run.err, run.err
    assert "Traceback" not in run.err and sorted(path.name for path in folder.iterdir()) == before
    first.close()
    rl_here(rl_overrides(data, tiny, folder, *EVERY_STEP), folder).ok()
    assert not half.exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.best_metric=val/acc/basic_motion_dataset", "did you mean val/acc/basic_motions_dataset?"),
        ("+actor_rollout_ref.model.override_config.rms_norm_epps=1", "did you mean rms_norm_eps?"),
    ],
)
def test_a_mistake_that_only_a_later_phase_would_meet_is_refused_before_anything_is_written(
    work: Path, data: Data, tiny: Path, override: str, message: str
) -> None:
    folder = work / "not_written"
    run = rl_here(rl_overrides(data, tiny, folder, override), folder)
    assert run.code == 2 and message in run.err and "Traceback" not in run.err, run.err
    assert not folder.exists()


RANKS_DISAGREE = """
import os, pathlib

def compute_score(data_source, solution_str, ground_truth, extra_info):
    with open(pathlib.Path(__file__).with_suffix(".calls"), "a") as file:
        file.write(os.environ["RANK"] + "\\n")
    return {"score": 0.0, "acc": 0.0, "pred": ground_truth if os.environ["RANK"] == "1" else None}
"""
"""On rank 1 every answer is readable, on rank 0 none."""


def test_one_rank_scores_and_all_stop_together(work: Path, data: Data, tiny: Path, launcher: Launcher) -> None:
    """Ranks that decided for themselves would part here: rank 1 leaves the loop, rank 0 waits for it for ever."""
    folder, function = work / "two_ranks_sft", work / "ranks_disagree.py"
    function.write_text(RANKS_DISAGREE)
    rows = data.edited(work / "sft_four.parquet", "sft_fit", lambda number, row: None, rows=4)
    overrides = sft_overrides(
        data,
        tiny,
        folder,
        f"data.train_files={rows}",
        f"data.val_files={rows}",
        "data.train_batch_size=4",
        "trainer.total_training_steps=3",
        "trainer.test_freq=1",
        "trainer.save_freq=-1",
        "trainer.stop_parse_failure=0.5",
        "data.max_response_length=12",
        f"custom_reward_function.path={function}",
    )
    run = launcher.torchrun(2, overrides, folder).ok()
    assert [row["step"] for row in run.rows] == [1, 2, 3]
    assert [row["val/parse_failure"] for row in run.rows] == [1.0] * 3
    assert (run.out + run.err).count("but 4 of 4 supervised answers are longer, up to ") == 1
    assert (run.out + run.err).count("after step 3 without reaching trainer.stop_parse_failure=0.5: 100.0 %") == 1
    calls = function.with_suffix(".calls").read_text().split()
    assert calls == ["0"] * 12, f"4 rows, 3 validations, one rank: {len(calls)} calls by ranks {sorted(set(calls))}"
    assert len(read_lines(folder / "samples" / "val_step_3.jsonl")) == 4
