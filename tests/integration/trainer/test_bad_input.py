"""Bad input at the entry points: one clear error that names file and row or key, exit code 2, nothing half-written."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from in_process import rl_here, sft_here
from PIL import Image
from runs import Data, Launcher, Run, rl_overrides, sft_overrides

Row = dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """What a case may damage: a folder of its own, the good data, a copy of the model is made by those who break it."""

    folder: Path
    data: Data
    model: Path

    def rows(self, name: str, edit: Callable[[int, Row], None]) -> str:
        return self.data.edited(self.folder / "bad.parquet", name, edit)

    def broken_model(self, change: Callable[[Path], object]) -> str:
        copy = self.folder / "model"
        shutil.copytree(self.model, copy)
        change(copy)
        return str(copy)


Case = tuple[Callable[[Inputs], list[str]], tuple[str, ...]]
"""Overrides that bring the fault, and what the error names."""


def at(row: int, change: Callable[[Row], None]) -> Callable[[int, Row], None]:
    def edit(number: int, values: Row) -> None:
        if number == row:
            change(values)

    return edit


def damage_image(values: Row) -> None:
    image = values["images"][0]
    image["bytes"] = image["bytes"][: len(image["bytes"]) // 2]


def thin_image(values: Row) -> None:
    file = io.BytesIO()
    Image.new("RGB", (3, 900)).save(file, "PNG")
    values["images"][0]["bytes"] = file.getvalue()


def second_image(values: Row) -> None:
    values["images"].append(values["images"][0])


def second_placeholder(values: Row) -> None:
    values["prompt"][0]["content"] += " <image>"


def long_prompt(values: Row) -> None:
    values["prompt"][0]["content"] += " and again" * 400


def truncated(inputs: Inputs) -> str:
    target = inputs.folder / "cut.parquet"
    whole = Path(inputs.data.file("fit")).read_bytes()
    target.write_bytes(whole[: len(whole) // 2])
    return str(target)


def empty(inputs: Inputs) -> str:
    target = inputs.folder / "empty.parquet"
    pq.write_table(pq.read_table(inputs.data.file("fit")).slice(0, 0), target)
    return str(target)


def bad_rows(row: int, change: Callable[[Row], None], name: str = "fit") -> Callable[[Inputs], list[str]]:
    return lambda inputs: [f"data.train_files={inputs.rows(name, at(row, change))}"]


def undeclared_label(values: Row) -> None:
    values["reward_model"]["ground_truth"] = "Juggling"


def undeclared_source(values: Row) -> None:
    values["data_source"] = "basic_motion_dataset"


MODEL = "actor_rollout_ref.model.path"

RL: dict[str, Case] = {
    "missing file": (lambda _: ["data.train_files=no/such.parquet"], ("no/such.parquet",)),
    "missing validation file": (lambda _: ["data.val_files=no/such.parquet"], ("no/such.parquet",)),
    "truncated file": (lambda i: [f"data.train_files={truncated(i)}"], ("cut.parquet",)),
    "file without rows": (lambda i: [f"data.train_files={empty(i)}"], ("empty.parquet",)),
    "corrupted image bytes": (bad_rows(3, damage_image), ("bad.parquet", "row 3")),
    "image too thin": (bad_rows(2, thin_image), ("bad.parquet", "row 2")),
    "more images than placeholders": (bad_rows(4, second_image), ("bad.parquet", "row 4", "2", "1")),
    "more placeholders than images": (bad_rows(5, second_placeholder), ("bad.parquet", "row 5", "<image>")),
    "prompt over length": (bad_rows(6, long_prompt), ("bad.parquet", "row 6", "data.max_prompt_length")),
    "undeclared label": (bad_rows(1, undeclared_label), ("row 1", "bad.parquet", "Juggling", "Walking")),
    "undeclared data source": (bad_rows(0, undeclared_source), ("row 0", "basic_motion_dataset")),
    "wrong image column": (lambda _: ["data.image_key=pictures"], ("data.image_key", "pictures")),
    "unreachable model path": (lambda _: [f"{MODEL}=no/such/model"], (MODEL, "no/such/model")),
    "model folder without a config": (
        lambda i: [f"{MODEL}={i.broken_model(lambda f: (f / 'config.json').unlink())}"],
        ("model", "config.json"),
    ),
    "model without a tokenizer": (
        lambda i: [f"{MODEL}={i.broken_model(lambda f: (f / 'tokenizer.json').unlink())}"],
        ("model", "tokenizer"),
    ),
    "unknown key": (lambda _: ["trainer.total_epoch=3"], ("trainer.total_epoch", "trainer.total_epochs")),
    "value of the wrong type": (lambda _: ["trainer.total_epochs=many"], ("trainer.total_epochs", "many")),
    "missing reward file": (lambda _: ["custom_reward_function.path=no/such.py"], ("custom_reward_function.path",)),
    "named checkpoint that is not there": (
        lambda i: [f"trainer.resume_mode={i.folder / 'global_step_7'}"],
        ("global_step_7",),
    ),
}
SFT_MODEL = "model.partial_pretrain"
SFT: dict[str, Case] = {
    "missing file": RL["missing file"],
    "corrupted image bytes": (bad_rows(3, damage_image, "sft_fit"), ("bad.parquet", "row 3")),
    "more images than placeholders": (bad_rows(4, second_image, "sft_fit"), ("bad.parquet", "row 4", "2", "1")),
    "prompt over length": (bad_rows(6, long_prompt, "sft_fit"), ("bad.parquet", "row 6", "data.max_prompt_length")),
    "rows without an answer": (lambda i: [f"data.train_files={i.data.file('fit')}"], ("fit.parquet", "response")),
    "unreachable model path": (lambda _: [f"{SFT_MODEL}=no/such/model"], (SFT_MODEL, "no/such/model")),
    "unknown key": (lambda _: ["optim.learning_rate=3"], ("optim.learning_rate",)),
}


def check(run: Run, named: tuple[str, ...]) -> None:
    assert run.code == 2, f"exit code {run.code}\n{run.out[-2000:]}\n{run.err[-4000:]}"
    errors = [line for line in run.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in run.err, run.err[-4000:]
    message = run.err[run.err.index("error: ") :]
    assert [name for name in named if name not in message] == [], message
    assert not run.folder.exists(), f"half-written: {sorted(run.folder.rglob('*'))}"


def stores(work: Path) -> set[str]:
    """Finished and unfinished files of the image cache."""
    return {str(path) for path in (work / "cache").rglob("*")}


@pytest.mark.parametrize("name", RL)
def test_a_fault_is_one_error_of_the_rl_entry_point_that_names_it(
    name: str, work: Path, data: Data, tiny: Path, tmp_path: Path
) -> None:
    bring, named = RL[name]
    before = stores(work)
    folder = tmp_path / "run"
    check(rl_here(rl_overrides(data, tiny, folder, *bring(Inputs(tmp_path, data, tiny))), folder), named)
    assert {path for path in stores(work) - before if "tmp" in Path(path).name} == set()


@pytest.mark.parametrize("name", SFT)
def test_a_fault_is_one_error_of_the_sft_entry_point_that_names_it(
    name: str, data: Data, tiny: Path, tmp_path: Path
) -> None:
    bring, named = SFT[name]
    folder = tmp_path / "run"
    check(sft_here(sft_overrides(data, tiny, folder, *bring(Inputs(tmp_path, data, tiny))), folder), named)


def test_the_process_ends_with_exit_code_2_and_the_error_on_its_last_line(
    data: Data, tiny: Path, tmp_path: Path, launcher: Launcher
) -> None:
    """The exit path that the runs above share, once as a user sees it."""
    folder = tmp_path / "run"
    bring, named = RL["corrupted image bytes"]
    run = launcher.run("main_ppo", rl_overrides(data, tiny, folder, *bring(Inputs(tmp_path, data, tiny))), folder)
    assert run.code == 2, run.out
    last = run.out.splitlines()[-1]
    assert last.startswith("error: ") and all(name in last for name in named), run.out
    assert not folder.exists()
