"""Every task's scripts: data, one SFT step, one GRPO step from its checkpoint, with a tiny model on a CPU.

The scripts run as they are, but for the python they start: it writes its arguments down, and the run then happens in
this process.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from emgdb_fixture import write_emgdb
from example_scripts import overrides_of
from in_process import rl_here, sft_here
from runs import Run, whole_checkpoints
from small_archives import write_cinc, write_har, write_whales

from verl.models.tiny import TinySize, create_tiny_model, texts_of_parquet
from verl.timeseries import build, get_task, tasks
from verl.timeseries.task import TaskSpec

SIZE = TinySize(
    hidden=32, layers=1, mlp=64, vision_hidden=32, vision_layers=1, vision_mlp=64, max_vocabulary=400, context=2048
)
SMALL_SFT = (
    "data.train_batch_size=4",
    "data.micro_batch_size_per_gpu=4",
    "data.max_response_length=8",
    "data.max_length=1900",
    "data.max_prompt_length=1600",
    "trainer.device=cpu",
    "model.enable_gradient_checkpointing=False",
)
SMALL_RL = (
    "data.train_batch_size=2",
    "data.max_prompt_length=1600",
    "data.max_response_length=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.rollout.n=2",
    "trainer.val_before_train=False",
    "trainer.device=cpu",
    "trainer.logger=[console]",
)
SMALL_PLOT = (
    "style.width=56",
    "style.height=56",
    *(f"style.{side}=4" for side in ("left", "right", "top", "bottom", "gap", "column_gap")),
    "style.ticks=False",
)
"""4 tokens: what a plot shows is the data step's matter, and tested there."""


@dataclass(frozen=True)
class Case:
    """A task, a modality, and where its archive comes from."""

    task: str
    modality: str
    made_up: Callable[[Path], Path]
    """Writes a small archive into a folder."""
    options: tuple[str, ...] = ()
    archive: str | None = None
    """The real one's place among the archives, for the long runs."""

    def __str__(self) -> str:
        return f"{self.task}-{self.modality}"


def write_pumps(folder: Path) -> Path:
    """A data set of one's own: 16 files of two channels, listed in labels.csv."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(16):
        np.savetxt(folder / f"s{i}.csv", rng.normal(size=(30, 2)), delimiter=",", header="x,y", comments="", fmt="%.3f")
    lines = ["file,label", *(f"s{i}.csv,{('ok', 'worn')[i % 2]}" for i in range(16))]
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_ecg(folder: Path) -> Path:
    write_cinc(folder)
    return folder


def write_emg(folder: Path) -> Path:
    """24 windows of the length that `short_emg` declares."""
    write_emgdb(folder, {"emg_healthy": 6 * 300, "emg_myopathy": 9 * 300, "emg_neuropathy": 9 * 300})
    return folder


def short_emg() -> TaskSpec:
    """The reader wants all windows of the published recordings, unless the task declares others."""
    return dataclasses.replace(get_task("emg"), length=300, rows=(18, 6))


def write_ucr(name: str, rows: tuple[int, int], labels: Sequence[int], length: int) -> Callable[[Path], Path]:
    """A writer of an archive of that name and size, with labels in turn."""

    def write(folder: Path) -> Path:
        folder.mkdir(parents=True)
        for number, (split, count) in enumerate(zip(("TRAIN", "TEST"), rows, strict=True)):
            values = np.random.default_rng(number).normal(size=(count, length))
            values = np.column_stack([[labels[row % len(labels)] for row in range(count)], values])
            np.savetxt(folder / f"{name}_{split}.tsv", values, delimiter="\t", fmt="%.3g")
        return folder

    return write


LIGHTNING = write_ucr("Lightning7", (70, 73), range(7), 319)
COMPUTERS = write_ucr("Computers", (250, 250), (1, 2), 720)


def _few(rows: int, *options: str) -> tuple[str, ...]:
    return (f"limit={rows}", *options)


CASES = [
    Case("har", "numeric", write_har, _few(12, "numeric.points=16")),
    Case("har", "image", write_har, _few(12)),
    Case("rcw", "image", write_whales, _few(8)),
    Case("own", "image", write_pumps, ("csv.name=pumps",)),
    Case("tee", "image", LIGHTNING, _few(14), "ucr/Lightning7"),
    Case("tee", "numeric", LIGHTNING, _few(14, "numeric.points=40"), "ucr/Lightning7"),
    Case("ecg", "image", write_ecg, _few(8), "cinc2017"),
    Case("ctu", "image", COMPUTERS, _few(8), "ucr/Computers"),
    Case("emg", "image", write_emg, _few(9), "physionet_emgdb"),
]


def last_model(run: Run) -> str:
    step = int((run.folder / "latest_checkpointed_iteration.txt").read_text())
    return str(run.checkpoint(step) / "actor" / "huggingface")


@pytest.fixture
def train(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Run, Run, Path]]:
    """Builds a task's data, then runs its SFT script and its GRPO script for so many steps each."""

    def run(case: Case, steps: int, *, real: bool = False) -> tuple[Run, Run, Path]:
        if real and case.archive is not None:
            source: Path = request.getfixturevalue("archives") / case.archive
        else:
            source = case.made_up(tmp_path / "archive")
            if case.task == "emg":
                monkeypatch.setitem(tasks._TASKS, "emg", short_emg())
        plot = SMALL_PLOT if case.modality == "image" and not real else ()
        data = tmp_path / "data"
        name = "csv" if case.task == "own" else case.task
        arguments = [f"task={name}", f"source={source}", f"modality={case.modality}", f"output={data}", "workers=1"]
        assert build.main([*arguments, *case.options, *plot]) == 0
        tiny = tmp_path / "tiny"
        create_tiny_model(tiny, texts_of_parquet([data / "sft_fit.parquet"]), size=SIZE, seed=0)
        shared = {"DATA": str(data), "MODALITY": case.modality, "JUDGE": "False", "NAME": "pumps"}

        def started(script: str, small: tuple[str, ...], folder: Path, model: str) -> list[str]:
            extra = (*small, f"trainer.total_training_steps={steps}", f"trainer.default_local_dir={folder}")
            return overrides_of(script, tmp_path / "bin", *extra, MODEL_PATH=model, **shared)

        folders = tmp_path / "sft", tmp_path / "rl"
        sft = sft_here(started(f"example/sft/run_{case.task}_sft.sh", SMALL_SFT, folders[0], str(tiny)), folders[0])
        script = f"example/grpo_trainer/run_{case.task}.sh"
        rl = rl_here(started(script, SMALL_RL, folders[1], last_model(sft.ok())), folders[1])
        return sft, rl.ok(), data

    return run


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_task_trains_with_sft_then_grpo_from_its_scripts(
    case: Case, train: Callable[..., tuple[Run, Run, Path]]
) -> None:
    sft, rl, data = train(case, 1)
    assert [row["training/global_step"] for row in sft.rows if "training/global_step" in row] == [1.0]
    assert list(rl.steps) == [1] and rl.checkpoint(1).is_dir()
    (report,) = rl.report("test")["reports"].values()
    card = json.loads((data / "data_card.json").read_text())
    assert report["n_prompts"] == card["rows"]["test"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_twenty_steps_of_each_stage_from_its_scripts(case: Case, train: Callable[..., tuple[Run, Run, Path]]) -> None:
    sft, rl, _ = train(case, 20, real=True)
    losses = [row["train/loss"] for row in sft.rows if "train/loss" in row]
    assert len(losses) == 20 and losses[-1] < losses[0]
    assert whole_checkpoints(sft.folder) == [20], "saved after each epoch, and only the last stays"
    assert list(rl.steps) == list(range(1, 21)) and whole_checkpoints(rl.folder)
    assert all(np.isfinite(step["actor/grad_norm"]) for step in rl.steps.values())
