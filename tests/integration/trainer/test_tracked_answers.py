"""Metrics by the names that dashboards read, and validation answers with their plots, in the files of trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from in_process import rl_here, sft_here
from runs import Data, Run, environment, rl_overrides, sft_overrides
from tracked import expanded, wandb_history

NAMES: dict[str, list[str]] = yaml.safe_load((Path(__file__).parents[2] / "golden" / "compat_metrics.yaml").read_text())
LOSS, REWARD = "kl_loss", "kl_in_reward"
RUNS = {
    LOSS: ("actor_rollout_ref.actor.use_kl_loss=True", "algorithm.rollout_correction.rollout_is=token"),
    REWARD: ("actor_rollout_ref.actor.use_kl_loss=False", "algorithm.use_kl_in_reward=True"),
}
CONDITIONS = {
    LOSS: ("always", "reference", LOSS, "rollout_correction", "save", "validation"),
    REWARD: ("always", "reference", REWARD, "save", "validation"),
}


@pytest.fixture(scope="module", params=list(RUNS))
def tracked(request: pytest.FixtureRequest, work: Path, data: Data, tiny: Path) -> tuple[str, Run, Path]:
    """Two steps with every tracker that works without a network; (what KL is, the run, tensorboard's folder)."""
    from tensorboard.backend.event_processing import event_accumulator  # noqa: F401  (fails here, not in each test)

    kind, board = request.param, work / "tracked_tb"
    more = ("trainer.logger=[console,file,wandb,tensorboard]", "trainer.log_val_generations=2",
            "trainer.total_training_steps=2", "trainer.test_freq=1", "trainer.save_freq=2",
            "trainer.project_name=p", f"trainer.experiment_name={kind}", *RUNS[kind])  # fmt: skip
    folder = work / f"tracked_{kind}"
    with environment(WANDB_MODE="offline", TENSORBOARD_DIR=str(board)):
        return kind, rl_here(rl_overrides(data, tiny, folder, *more), folder).ok(), board / "p" / kind


def wanted(kind: str) -> list[str]:
    known = {"source": "basic_motions_dataset", "n": "1"}
    return [name for part in CONDITIONS[kind] for line in NAMES[part] for name in expanded(line, **known)]


def assert_numbers(found: Mapping[str, list[Any]], kind: str, where: str) -> None:
    names = wanted(kind)
    assert len(names) > 60
    absent = [name for name in names if name not in found]
    assert absent == [], f"not in {where}: {absent}"
    bad = {name: found[name] for name in names if not all(math.isfinite(float(v)) for v in found[name])}
    assert bad == {}, f"in {where}"


def wandb_folder(run: Run) -> Path:
    (folder,) = (run.folder / "wandb").glob("offline-run-*")
    return folder


def test_wandb_offline_holds_every_metric_by_name(tracked: tuple[str, Run, Path]) -> None:
    kind, run, _ = tracked
    (file,) = wandb_folder(run).glob("*.wandb")
    assert_numbers(wandb_history(file), kind, str(file))


def test_tensorboard_holds_every_metric_by_name(tracked: tuple[str, Run, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kind, _, board = tracked
    events = EventAccumulator(str(board)).Reload()
    found = {name: [e.value for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert_numbers(found, kind, str(board))


def test_the_file_tracker_holds_every_metric_by_name(tracked: tuple[str, Run, Path]) -> None:
    kind, run, _ = tracked
    found: dict[str, list[Any]] = {}
    for row in map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines()):
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    assert_numbers(found, kind, "metrics.jsonl")


def test_wandb_offline_holds_plots_together_with_their_answers(tracked: tuple[str, Run, Path]) -> None:
    _, run, _ = tracked
    folder = wandb_folder(run)
    (file,) = folder.glob("*.wandb")
    history = wandb_history(file)
    validations = 2  # after each step
    files, captions = history["samples_plots.filenames"], history["samples_plots.captions"]
    assert len(files) == len(captions) == len(history["samples.path"]) == validations
    for names, said, table in zip(files, captions, history["samples.path"], strict=True):
        content = json.loads((folder / "files" / table).read_text())
        rows = [dict(zip(content["columns"], line, strict=True)) for line in content["data"]]
        assert len(rows) == len(names) == 2
        for row, name, caption in zip(rows, names, said, strict=True):
            assert (folder / "files" / name).read_bytes().startswith(b"\x89PNG")
            assert row["answer"], row
            assert caption == f"{row['uid']} | label {row['label']} | score {row['score']}\n{row['answer']}"


def test_tensorboard_holds_plots_together_with_their_answers(tracked: tuple[str, Run, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, _, board = tracked
    events = EventAccumulator(str(board)).Reload()
    assert events.Tags()["images"] == ["samples/0", "samples/1"]
    texts = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("samples/0/text_summary")]
    assert all(text.strip() for text in texts)
    assert [e.step for e in events.Images("samples/0")] == [e.step for e in events.Tensors("samples/0/text_summary")]


def test_an_evaluation_tracks_its_answers_too(work: Path, data: Data, tiny: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = work / "tracked_eval"
    more = ("trainer.val_only=True", "trainer.logger=[tensorboard]", "trainer.log_val_generations=2",
            "trainer.project_name=p", "trainer.experiment_name=e")  # fmt: skip
    with environment(TENSORBOARD_DIR=str(work / "tracked_tb")):
        rl_here(rl_overrides(data, tiny, folder, *more), folder).ok()
    events = EventAccumulator(str(work / "tracked_tb" / "p" / "e")).Reload()
    assert events.Tags()["images"] == ["samples/0", "samples/1"]
    assert "val/accuracy" in events.Tags()["scalars"]


def test_sft_answers_reach_the_trackers_too(work: Path, data: Data, tiny: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = work / "tracked_sft"
    more = ("trainer.logger=[tensorboard]", "trainer.log_val_generations=1", "trainer.total_training_steps=1",
            "trainer.project_name=p", "trainer.experiment_name=s")  # fmt: skip
    with environment(TENSORBOARD_DIR=str(work / "tracked_tb")):
        sft_here(sft_overrides(data, tiny, folder, *more), folder).ok()
    events = EventAccumulator(str(work / "tracked_tb" / "p" / "s")).Reload()
    assert events.Tags()["images"] == ["samples/0"]
