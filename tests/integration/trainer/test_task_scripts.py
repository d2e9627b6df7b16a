"""Every task's scripts: data, one SFT step, one GRPO step from its checkpoint, with a tiny model on a CPU.

The scripts run as they are, but for the python they start: it writes its arguments down, and the run then happens in
this process.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from in_process import rl_here, sft_here
from runs import ROOT, Run, whole_checkpoints
from small_archives import write_har, write_whales

from verl.models.tiny import TinySize, create_tiny_model, texts_of_parquet
from verl.timeseries import build

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


@dataclass(frozen=True)
class Case:
    """A task, a modality, and where its archive comes from."""

    task: str
    modality: str
    source: Callable[[Path], Path] | str
    """Writes a small archive into a folder, or the folder's place among the real archives."""
    options: tuple[str, ...] = ()

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


def _few(rows: int, *options: str) -> tuple[str, ...]:
    return (f"limit={rows}", *options)


CASES = [
    Case("har", "numeric", write_har, _few(12, "numeric.points=16")),
    Case("rcw", "image", write_whales),
    # From here on by hand.
    Case("own", "image", write_pumps, ("csv.name=pumps",)),
    Case("har", "image", write_har, _few(12)),
    Case("tee", "image", "ucr/Lightning7", _few(14)),
    Case("ecg", "image", "cinc2017", _few(16)),
    Case("ctu", "image", "ucr/Computers", _few(10)),
    Case("emg", "image", "physionet_emgdb", _few(12)),
    Case("tee", "numeric", "ucr/Lightning7", _few(14, "numeric.points=40")),
]


def overrides_of(script: str, folder: Path, *extra: str, **environment: str) -> list[str]:
    """What the script would start python with, after its module's name."""
    folder.mkdir(exist_ok=True)
    fake = folder / "python3"
    fake.write_text(
        '#!/usr/bin/env bash\nfor argument in "$@"; do printf "%s\\0" "$argument"; done > "$ARGUMENTS_FILE"\n'
    )
    fake.chmod(0o755)
    written = folder / "arguments"
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder), "N_GPUS": "1"}
    env |= {"ARGUMENTS_FILE": str(written), **environment}
    subprocess.run(["bash", str(ROOT / script), *extra], env=env, check=True, timeout=60, capture_output=True)
    arguments = written.read_text().split("\0")[:-1]
    assert arguments[0] == "-m", arguments[:3]
    return arguments[2:]


def last_model(run: Run) -> str:
    step = int((run.folder / "latest_checkpointed_iteration.txt").read_text())
    return str(run.checkpoint(step) / "actor" / "huggingface")


@pytest.fixture
def train(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Case, int], tuple[Run, Run, Path]]:
    """Builds a task's data, then runs its SFT script and its GRPO script for so many steps each."""

    def run(case: Case, steps: int) -> tuple[Run, Run, Path]:
        if isinstance(case.source, str):
            source: Path = request.getfixturevalue("archives") / case.source
        else:
            source = case.source(tmp_path / "archive")
        data = tmp_path / "data"
        name = "csv" if case.task == "own" else case.task
        arguments = [f"task={name}", f"source={source}", f"modality={case.modality}", f"output={data}", "workers=1"]
        assert build.main([*arguments, *case.options]) == 0
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


@pytest.mark.parametrize("case", [*CASES[:2], *(pytest.param(c, marks=pytest.mark.slow) for c in CASES[2:])], ids=str)
def test_a_task_trains_with_sft_then_grpo_from_its_scripts(
    case: Case, train: Callable[[Case, int], tuple[Run, Run, Path]]
) -> None:
    sft, rl, data = train(case, 1)
    assert [row["training/global_step"] for row in sft.rows if "training/global_step" in row] == [1.0]
    assert list(rl.steps) == [1] and rl.checkpoint(1).is_dir()
    (report,) = rl.report("test")["reports"].values()
    card = json.loads((data / "data_card.json").read_text())
    assert report["n_prompts"] == card["rows"]["test"]


def test_eval_never_guesses_whose_weights_to_score() -> None:
    env = os.environ | {"EVAL": "True", "MODEL_PATH": "", "TIMEMASTER_NO_SETUP": "1"}
    done = subprocess.run(
        ["bash", "example/grpo_trainer/run_tee.sh"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2 and "EVAL=True scores the weights of MODEL_PATH" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_twenty_steps_of_each_stage_from_its_scripts(
    case: Case, train: Callable[[Case, int], tuple[Run, Run, Path]]
) -> None:
    sft, rl, _ = train(case, 20)
    losses = [row["train/loss"] for row in sft.rows if "train/loss" in row]
    assert len(losses) == 20 and losses[-1] < losses[0]
    assert list(rl.steps) == list(range(1, 21)) and whole_checkpoints(rl.folder)
    assert all(np.isfinite(step["actor/grad_norm"]) for step in rl.steps.values())
