"""The order of steps of a save: killed anywhere, the last whole checkpoint is found and loads."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from verl.utils.checkpoint.manager import (
    BEST,
    LOCK,
    MANIFEST,
    POINTER,
    Checkpoint,
    CheckpointManager,
    open_checkpoint,
    verify,
)

POINTS = ["begun", "half-written", "written", "flushed", "renamed", "best", "pointer", "deleting", "pruned"]

CHILD = """
import os, signal, sys
from verl.utils.checkpoint.manager import CheckpointManager
root, point, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
def stop(name):
    if name == point:
        os.kill(os.getpid(), signal.SIGKILL)
manager = CheckpointManager(root, keep=1, keep_best="acc", on_point=stop)
manager.lock()
manager.begin(manager.find("auto"))
with manager.saving(step, {"step": step}, {"acc": 0.5 + step / 100}) as checkpoint:
    checkpoint.model.mkdir(parents=True)
    for rank in range(2):
        (checkpoint.model / f"{rank}.safetensors").write_bytes(bytes([step]) * 1000)
        stop("half-written")
"""


def save(manager: CheckpointManager, step: int, **metrics: float) -> None:
    with manager.saving(step, {"step": step}, metrics) as checkpoint:
        checkpoint.model.mkdir(parents=True)
        for rank in range(2):
            (checkpoint.model / f"{rank}.safetensors").write_bytes(bytes([step]) * 1000)


def steps(manager: CheckpointManager) -> list[int]:
    return [checkpoint.step for checkpoint in manager.complete()]


def loads(checkpoint: Checkpoint) -> bool:
    verify(checkpoint)
    files = sorted(checkpoint.model.iterdir())
    same = all(file.read_bytes() == bytes([checkpoint.step]) * 1000 for file in files)
    return len(files) == 2 and same and checkpoint.read_data() == {"step": checkpoint.step}


def killed_save(root: Path, point: str, step: int) -> None:
    command = [sys.executable, "-c", CHILD, str(root), point, str(step)]
    path = os.pathsep.join([str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, f"the child was not stopped at {point}: {done.returncode} {done.stderr}"


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_9_at_any_point_of_a_save_leaves_the_last_complete_checkpoint_loadable(
    tmp_path: Path, point: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(CheckpointManager(tmp_path, keep=1, keep_best="acc"), 10, acc=0.5)
    killed_save(tmp_path, point, 20)
    manager = CheckpointManager(tmp_path, keep=1, keep_best="acc")
    found = manager.find("auto")
    assert found is not None and loads(found)
    assert not caplog.records, "the pointer was wrong"
    assert found.step == (20 if point in ("pointer", "deleting", "pruned") else 10)
    manager.lock()
    manager.begin(found)
    best = manager.best()
    assert best is not None and best.step == found.step and loads(best)
    save(manager, 30, acc=0.45)
    assert steps(manager) == [found.step, 30], "the best one is kept beside the newest"
    aside = {f"{BEST}.old"} if point == "best" else set()
    folders = {f"global_step_{found.step}", "global_step_30"}
    assert {p.name for p in tmp_path.iterdir()} == {POINTER, BEST, LOCK, *folders, *aside}


@pytest.mark.parametrize("point", ["begun", "flushed", "replaced", "renamed", "pointer"])
def test_a_kill_9_while_a_step_is_saved_again_leaves_it_loadable(tmp_path: Path, point: str) -> None:
    save(CheckpointManager(tmp_path), 10)
    killed_save(tmp_path, point, 10)
    manager = CheckpointManager(tmp_path)
    found = manager.latest()
    assert found is not None and found.step == 10 and loads(found)
    save(manager, 10)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["global_step_10"]


def test_the_first_save_killed_leaves_no_checkpoint_and_no_error(tmp_path: Path) -> None:
    killed_save(tmp_path, "flushed", 1)
    assert CheckpointManager(tmp_path).find("auto") is None


def test_the_layout_and_the_pointer(tmp_path: Path) -> None:
    save(CheckpointManager(tmp_path), 7, acc=0.25)
    assert (tmp_path / POINTER).read_text() == "7"
    folder = tmp_path / "global_step_7"
    assert sorted(p.name for p in folder.iterdir()) == ["actor", "data.json", MANIFEST]
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["files"]["actor/model/0.safetensors"] == 1000 and manifest["metrics"] == {"acc": 0.25}


def test_keep_counts_the_newest_and_spares_best_and_latest(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2, keep_best="acc")
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.6), (4, 0.7), (5, 0.8)):
        save(manager, step, acc=accuracy)
    assert steps(manager) == [2, 4, 5]
    best = manager.best()
    assert best is not None and best.step == 2
    save(manager, 6, acc=0.95)
    assert steps(manager) == [5, 6]


def test_keep_counts_the_newest_saves_beside_later_steps_of_a_run_that_was_given_up(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=3, keep_best="acc")
    for step in (100, 200, 250):
        save(manager, step, acc=0.9)
    manager.begin(None)
    left = []
    for step in (10, 20, 30, 40):
        save(manager, step, acc=step / 100)
        left.append(steps(manager))
    assert left == [[10, 200, 250], [10, 20, 250], [10, 20, 30], [20, 30, 40]]
    manager.begin(Checkpoint(30, tmp_path / "global_step_30"))
    save(manager, 35, acc=0.1)
    assert steps(manager) == [30, 35, 40] and manager.latest() == Checkpoint(35, tmp_path / "global_step_35")


def best_after(manager: CheckpointManager, start: int | None) -> int | None:
    manager.begin(None if start is None else Checkpoint(start, manager.root / f"global_step_{start}"))
    best = manager.best()
    return None if best is None else best.step


def test_the_best_is_among_the_checkpoints_that_led_to_the_start(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_best="acc")
    for step, accuracy in ((50, 0.2), (100, 0.99), (200, 0.98)):
        save(manager, step, acc=accuracy)
    assert best_after(manager, None) is None
    for step, accuracy in ((10, 0.3), (20, 0.7), (30, 0.4), (150, 0.8)):
        save(manager, step, acc=accuracy)
    found = {start: best_after(manager, start) for start in (150, 30, 10, 200, None, 150)}
    assert found == {150: 150, 30: 20, 10: 10, 200: 100, None: None}
    other = CheckpointManager(tmp_path / "other", keep_best="acc")
    save(other, 5, acc=1.0)
    other.begin(Checkpoint(150, tmp_path / "global_step_150"))
    assert other.best() is None, "a start in another folder was led to by nothing here"


def test_a_kill_between_best_record_and_pointer_loses_no_earlier_best(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=1, keep_best="acc")
    save(manager, 10, acc=0.65)
    save(manager, 15, acc=0.1)
    killed_save(tmp_path, "best", 20)
    manager.begin(manager.find("auto"))
    save(manager, 25, acc=0.5)
    best = manager.best()
    assert best is not None and best.step == 10 and loads(best)


def test_a_second_run_of_the_same_folder_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    first, second = CheckpointManager(tmp_path), CheckpointManager(tmp_path)
    first.lock()
    with pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on .*trainer\.experiment_name"):
        second.lock()
    first.close()
    second.lock()
    with pytest.raises(ValueError, match="in use by process"):
        first.lock()


def test_before_commit_runs_when_all_is_written_and_nothing_counts_yet(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    save(manager, 1)
    seen = []

    def look() -> None:
        seen.append((steps(manager), (tmp_path / ".tmp-global_step_2" / MANIFEST).is_file()))

    with manager.saving(2, {}, before_commit=look):
        pass
    assert seen == [([1], True)]


def test_without_keep_nothing_is_deleted(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for step in (1, 2, 3):
        save(manager, step)
    assert steps(manager) == [1, 2, 3]


def test_lower_is_better_and_a_save_without_the_metric_keeps_the_best(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=1, keep_best="loss", lower_is_better=True)
    for step, metrics in ((1, {"loss": 2.0}), (2, {"loss": 1.0}), (3, {"loss": 1.0}), (4, {})):
        save(manager, step, **metrics)
    assert steps(manager) == [2, 4]


def test_folders_that_this_class_did_not_write_are_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "global_step_1" / "actor").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    manager = CheckpointManager(tmp_path, keep=1)
    for step in (2, 3):
        save(manager, step)
    assert steps(manager) == [3] and (tmp_path / "global_step_1").is_dir() and (tmp_path / "notes").is_dir()


def test_an_error_inside_a_save_leaves_everything_as_it_was(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=1)
    save(manager, 1)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(RuntimeError), manager.saving(2, {}) as checkpoint:
        (checkpoint.path / "half").write_text("x")
        raise RuntimeError("disk full")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_checkpoint_whose_metric_is_not_finite_is_saved_but_never_the_best(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_best="acc")
    save(manager, 1, acc=0.5)
    save(manager, 2, acc=float("nan"))
    best = manager.best()
    assert steps(manager) == [1, 2] and best is not None and best.step == 1


def test_a_checkpoint_kept_only_as_the_best_goes_when_a_better_one_is_whole(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_best="acc")
    for step, accuracy, only_best in ((1, 0.1, True), (2, 0.2, False), (3, 0.3, True), (4, 0.4, True), (5, 0.0, False)):
        with manager.saving(step, {}, {"acc": accuracy}, only_best=only_best) as checkpoint:
            (checkpoint.path / "weights").write_text("x")
    best = manager.best()
    assert steps(manager) == [2, 4, 5] and best is not None and best.step == 4


@pytest.mark.parametrize("text", ["garbage", "99", "", None])
def test_a_damaged_pointer_names_what_is_there_and_the_newest_is_used(
    tmp_path: Path, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    manager = CheckpointManager(tmp_path)
    for step in (9, 10):
        save(manager, step)
    if text is None:
        (tmp_path / POINTER).unlink()
    else:
        (tmp_path / POINTER).write_text(text)
    with caplog.at_level(logging.ERROR):
        found = manager.find("auto")
    assert found is not None and found.step == 10
    assert "['global_step_9', 'global_step_10']" in caplog.text


def test_a_pointer_without_any_checkpoint_is_an_error(tmp_path: Path) -> None:
    save(CheckpointManager(tmp_path), 5)
    shutil.rmtree(tmp_path / "global_step_5")
    with pytest.raises(ValueError, match=r"says '5', but there is no whole checkpoint"):
        CheckpointManager(tmp_path).latest()


def test_every_resume_mode_finds_its_checkpoint(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "run")
    assert manager.find("auto") is None
    for step in (1, 2):
        save(manager, step)
    first = tmp_path / "run" / "global_step_1"
    wanted = {
        ("disable", None): None,
        ("auto", None): 2,
        ("resume_path", str(first)): 1,
        ("resume_path", str(tmp_path / "run")): 2,
        (str(first), None): 1,
    }
    found = {key: manager.find(*key) for key in wanted}
    assert {key: value and value.step for key, value in found.items()} == wanted
    with pytest.raises(ValueError, match=r"needs trainer\.resume_from_path"):
        manager.find("resume_path")


def test_a_path_without_checkpoint_names_what_is_there(tmp_path: Path) -> None:
    save(CheckpointManager(tmp_path), 3)
    with pytest.raises(ValueError, match=r"global_step_4: no such checkpoint folder.*'global_step_3'"):
        open_checkpoint(tmp_path / "global_step_4")
    (tmp_path / "global_step_5").mkdir()
    with pytest.raises(ValueError, match=r"global_step_5: no manifest.json.*model_merger"):
        open_checkpoint(tmp_path / "global_step_5")


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_damaged_file_is_named_when_the_checkpoint_is_found(tmp_path: Path, damage: str) -> None:
    manager = CheckpointManager(tmp_path)
    save(manager, 1)
    file = tmp_path / "global_step_1" / "actor" / "model" / "1.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"x" * 10)
    with pytest.raises(ValueError, match=r"1\.safetensors: (missing|10 bytes long), but 1000 bytes were saved"):
        manager.find("auto")
