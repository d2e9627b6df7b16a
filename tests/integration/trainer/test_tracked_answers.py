"""A run's validation answers with their plots, in the files of wandb (offline) and tensorboard."""

from __future__ import annotations

from pathlib import Path

from in_process import rl_here, sft_here
from runs import Data, environment, rl_overrides, sft_overrides


def test_validation_answers_reach_the_trackers_with_their_plots(work: Path, data: Data, tiny: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = work / "tracked"
    more = ("trainer.val_only=True", "trainer.logger=[console,wandb,tensorboard]", "trainer.log_val_generations=2",
            "trainer.project_name=p", "trainer.experiment_name=e")  # fmt: skip
    with environment(WANDB_MODE="offline", TENSORBOARD_DIR=str(work / "tracked_tb")):
        rl_here(rl_overrides(data, tiny, folder, *more), folder).ok()
    events = EventAccumulator(str(work / "tracked_tb" / "p" / "e")).Reload()
    assert events.Tags()["images"] == ["samples/0", "samples/1"]
    assert "val/accuracy" in events.Tags()["scalars"]
    (run,) = (folder / "eval" / "wandb").glob("offline-run-*")
    assert len(list(run.rglob("*.png"))) == 2


def test_sft_answers_reach_the_trackers_too(work: Path, data: Data, tiny: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = work / "tracked_sft"
    more = ("trainer.logger=[tensorboard]", "trainer.log_val_generations=1", "trainer.total_training_steps=1",
            "trainer.project_name=p", "trainer.experiment_name=s")  # fmt: skip
    with environment(TENSORBOARD_DIR=str(work / "tracked_tb")):
        sft_here(sft_overrides(data, tiny, folder, *more), folder).ok()
    events = EventAccumulator(str(work / "tracked_tb" / "p" / "s")).Reload()
    assert events.Tags()["images"] == ["samples/0"]
