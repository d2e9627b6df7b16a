"""Invariants of `verl.timeseries.tokens`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from verl.timeseries import get_task
from verl.timeseries.build import BuildConfig, build
from verl.timeseries.tokens import VISION_MARKS, main, numeric_prompts, token_row


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Numeric GunPoint, bundled with sktime."""
    folder = tmp_path_factory.mktemp("data")
    build(BuildConfig(task="gun_point", modality="numeric", output=str(folder / "gun_point_numeric"), limit=8))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import model_fixtures
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_fixtures.write_tiny(tmp_path_factory.mktemp("model") / "tiny"))


def test_counts_are_those_of_the_dataset_that_trains(data: Path, tokenizer: Any) -> None:
    from verl.utils.dataset.prompts import render

    task = get_task("gun_point")

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    row = token_row(task, data, count, rows=8)
    assert row.rows == 8 and row.numeric is not None and row.image is not None
    prompts = numeric_prompts(data / "gun_point_numeric", 8)
    lengths = [count(prompt) for prompt in prompts]
    assert row.numeric == (sum(lengths) / 8, max(lengths))
    # The rendered prompt, its one image token expanded, without what an empty turn has.
    frame = count(render([{"role": "user", "content": ""}], tokenizer, {}))
    whole = count(render(task.messages(), tokenizer, {}))
    assert abs(whole - 1 + task.plot.vision_tokens - frame - row.image) <= VISION_MARKS


def test_without_a_tokenizer_the_table_says_so_and_counts_characters(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("verl.timeseries.tokens.LOCAL", ("no/such-model",))
    assert main(["--data", str(data), "--tasks", "gun_point", "ctu"]) == 0
    shown = capsys.readouterr().out
    assert "numeric prompt, characters" in shown and "no tokenizer at hand" in shown
    assert "| ctu | 168 |  | not built |" in shown


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tokenizer", str(tmp_path), "--tasks", "ctu"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --tokenizer {tmp_path}: no tokenizer there")
