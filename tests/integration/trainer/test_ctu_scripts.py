"""`ctu.sh` and `run_ctu.sh` as a user runs them, on an archive of the same form as Computers and a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from in_process import rl_here
from runs import ROOT, SIZE, Launcher, Run, pointer, read_lines, whole_checkpoints

from verl.models.tiny import create_tiny_model, texts_of_parquet

DATA_SCRIPT, TRAIN_SCRIPT = "example/data_preprocess/ctu.sh", "example/grpo_trainer/run_ctu.sh"
SMALL = [
    "data.train_batch_size=4",
    "data.max_response_length=12",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.rollout.n=2",
    "trainer.total_training_steps=2",
    "trainer.val_before_train=False",
    "trainer.device=cpu",
    "trainer.logger=['console']",
]


def write_computers(folder: Path) -> Path:
    """250 + 250 made-up days of 720 readings, in the two .ts files of the Computers archive."""
    folder.mkdir(parents=True)
    head = "@problemName Computers\n@timeStamps false\n@univariate true\n@equalLength true\n@seriesLength 720\n"
    for number, split in enumerate(("TRAIN", "TEST")):
        days = np.random.default_rng(number).normal(size=(250, 720)).cumsum(axis=1).round(3)
        rows = (f"{','.join(map(str, day.tolist()))}:{1 + row % 2}\n" for row, day in enumerate(days))
        (folder / f"Computers_{split}.ts").write_text(f"{head}@classLabel true 1 2\n@data\n{''.join(rows)}")
    return folder


@pytest.fixture(scope="module")
def ctu(work: Path, launcher: Launcher) -> Path:
    """The folder that `ctu.sh` writes, under a name with a space; 16 rows of each split."""
    source, output = write_computers(work / "my archive" / "Computers"), work / "my data" / "ctu"
    launcher.script(DATA_SCRIPT, ["--source", str(source), f"output={output}", "limit=16"], work / "ctu_sh").ok()
    return output


@pytest.fixture(scope="module")
def model(work: Path, ctu: Path) -> Path:
    create_tiny_model(work / "ctu_tiny", texts_of_parquet([ctu / "sft_fit.parquet"]), size=SIZE, seed=0)
    return work / "ctu_tiny"


@pytest.fixture(scope="module")
def trained(work: Path, ctu: Path, model: Path, launcher: Launcher) -> Run:
    """Two steps on two FSDP ranks, into a folder whose name has a space."""
    folder = work / "my runs" / "first"
    folder.parent.mkdir()
    overrides = [*SMALL, f"trainer.default_local_dir={folder}", "trainer.experiment_name=two words"]
    run = launcher.script(TRAIN_SCRIPT, overrides, folder, MODEL_PATH=str(model), DATA=str(ctu), N_GPUS="2")
    return run.ok()


def rows_of(path: Path) -> int:
    return pq.read_metadata(path).num_rows


def test_ctu_sh_writes_stratified_tables_and_no_label_into_a_name(ctu: Path) -> None:
    counts = {path.stem: rows_of(path) for path in ctu.glob("*.parquet")}
    assert counts == {"train": 16, "test": 16, "fit": 13, "val": 3, "sft_fit": 13, "sft_val": 3}
    labels = Counter(row["ground_truth"] for row in pq.read_table(ctu / "train.parquet")["reward_model"].to_pylist())
    assert labels == {"Desktop": 8, "Laptop": 8}
    named = [path for path in ctu.rglob("*") if any(label in path.name.lower() for label in ("desktop", "laptop"))]
    assert named == []


def test_run_ctu_sh_trains_on_two_ranks_and_reports_test_once(trained: Run, ctu: Path) -> None:
    assert "no GPU here: hf engine on CPU, 2 processes" in trained.out
    assert list(trained.steps) == [1, 2] and whole_checkpoints(trained.folder) == [2]
    config = yaml.safe_load((trained.folder / "config.yaml").read_text())
    files = [config["data"][f"{name}_files"] for name in ("train", "val", "test")]
    assert files == [[str(ctu / f"{name}.parquet")] for name in ("fit", "val", "test")]
    assert config["trainer"]["experiment_name"] == "two words" and config["trainer"]["n_gpus_per_node"] == 2
    tests = [row for row in trained.rows if "test/accuracy" in row]
    assert len(tests) == 1 and trained.report("test")["weights"] == "global_step_2"


def test_eval_scores_the_named_model_and_never_a_checkpoint_that_lies_about(
    work: Path, ctu: Path, trained: Run, launcher: Launcher
) -> None:
    weights = trained.checkpoint(2) / "actor" / "huggingface"
    folder = work / "my runs" / "with decoy"
    shutil.copytree(trained.checkpoint(2), folder / "global_step_9")
    (folder / "latest_checkpointed_iteration.txt").write_text("9")
    for file in (folder / "global_step_9").rglob("*.safetensors"):
        file.write_bytes(b"whoever opens this fails")
    overrides = ["data.max_response_length=12", "trainer.device=cpu", "trainer.logger=['console']"]
    overrides += [f"trainer.default_local_dir={folder}", f"trainer.validation_data_dir={folder / 'answers'}"]
    settings = {"EVAL": "True", "MODEL_PATH": str(weights), "DATA": str(ctu), "N_GPUS": "1"}
    run = launcher.script(TRAIN_SCRIPT, overrides, folder, **settings).ok()
    assert f"with the weights of {weights};" in run.out and "resumed" not in run.out
    (report,) = (json.loads(path.read_text()) for path in (folder / "eval" / "reports").glob("*.json"))
    assert report["weights"] == str(weights)
    (answers,) = (folder / "answers").glob("*.jsonl")
    assert len(read_lines(answers)) == rows_of(ctu / "test.parquet"), "EVAL scores the test split"
    assert pointer(folder) == 9 and not list(folder.glob("global_step_*/manifest.json.*"))


def overrides_of(arguments: list[str], folder: Path, **env: str) -> list[str]:
    """What `run_ctu.sh` passes to the trainer, told by a python3 that only writes its arguments down."""
    folder.mkdir()
    listed = folder / "arguments.json"
    python = folder / "python3"
    code = f"import json, sys; json.dump(sys.argv[1:], open({str(listed)!r}, 'w'))"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
    python.chmod(0o755)
    settings = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": "set", **env}
    subprocess.run(["bash", TRAIN_SCRIPT, *arguments], cwd=ROOT, env=settings, check=True, timeout=60)
    module, *overrides = json.loads(listed.read_text())[1:]
    assert module == "verl.trainer.main_ppo"
    return overrides


def test_paper_true_is_the_published_protocol(work: Path, ctu: Path, model: Path) -> None:
    """All rows, validation on test, and no checkpoint chosen by it (invariant 11)."""
    folder = work / "paper run"
    extra = [*SMALL, "trainer.total_training_steps=1", "trainer.test_freq=1", f"trainer.default_local_dir={folder}"]
    settings = {"PAPER": "True", "MODEL_PATH": str(model), "DATA": str(ctu), "N_GPUS": "1"}
    run = rl_here(overrides_of(extra, work / "paper_arguments", **settings), folder).ok()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"]["train_files"] == [str(ctu / "train.parquet")]
    assert config["data"]["val_files"] == [str(ctu / "test.parquet")] and config["data"]["test_files"] is None
    assert config["trainer"]["keep_best"] is False and not (folder / "best_checkpoint.json").exists()
    assert "val/accuracy" in run.steps[1]


def test_overrides_with_spaces_arrive_as_written_and_the_last_one_wins(tmp_path: Path) -> None:
    given = ["data.train_files=['my data/a b.parquet']", "trainer.experiment_name=two words", "trainer.nnodes=1"]
    found = overrides_of([*given, "trainer.experiment_name=last one"], tmp_path / "fake", MODEL_PATH="my models/tiny 1")
    assert found[-4:] == [*given, "trainer.experiment_name=last one"]
    assert "actor_rollout_ref.model.path=my models/tiny 1" in found


@pytest.mark.slow
def test_the_readmes_ctu_commands_run_as_written(archives: Path, tmp_path: Path) -> None:
    """The block of three steps on two ranks and its evaluation, in a copy of the tracked files."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "--output checkpoints/tiny-ctu" in block)
    copy = tmp_path / "clone"
    for file in subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split():
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, copy / file)
    (copy / ".venv").symlink_to(sys.prefix)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHONPATH")}
    env |= {"TIMEMASTER_NO_SETUP": "1", "TIMEMASTER_STACK": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    data = f"bash {DATA_SCRIPT} --source {archives / 'ucr' / 'Computers'}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{data}\n{block}"], cwd=copy, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = copy / "checkpoints" / "TimeMaster_CTU" / "tiny"
    assert pointer(run) == 3 and whole_checkpoints(run) == [3]
    (report,) = (json.loads(path.read_text()) for path in (run / "eval" / "reports").glob("*.json"))
    (found,) = report["reports"].values()
    assert found["n_prompts"] == 250 and report["weights"].endswith("global_step_3/actor/huggingface")
