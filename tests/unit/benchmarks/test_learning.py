"""The learning benchmark's curves and its tests of them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "learning.py")])
    import learning

    return learning


@pytest.fixture
def learning_rows(learning: Any) -> Any:
    import learning_rows

    return learning_rows


def test_curves_are_kept_by_workload(learning: Any, tmp_path: Path) -> None:
    path = tmp_path / "curves" / "learning.json"
    learning.write_curves({"ctu": {"1": [0.1, 0.2]}}, path, append=True)
    learning.write_curves({"har": {"1": [0.3]}}, path, append=True)
    assert json.loads(path.read_text()) == {"ctu": {"1": [0.1, 0.2]}, "har": {"1": [0.3]}}
    learning.write_curves({"har": {"2": [0.4]}}, path, append=False)
    assert json.loads(path.read_text()) == {"har": {"2": [0.4]}}


def test_mcnemar_counts_what_one_model_alone_gets_right(learning_rows: Any) -> None:
    one = {str(row): row < 8 for row in range(10)}
    other = {str(row): row < 2 for row in range(10)}
    first, second, p = learning_rows.mcnemar(one, other)
    assert (first, second) == (6, 0) and p == pytest.approx(2 * 0.5**6)
    assert learning_rows.mcnemar(one, one) == (0, 0, 1.0)


def test_the_gain_of_a_flat_curve_is_none_and_of_a_rising_one_many_errors(learning_rows: Any) -> None:
    noise = [0.01 * (-1) ** step for step in range(40)]
    assert learning_rows.reward_gain([noise])[0] == pytest.approx(0.0)
    gain, error = learning_rows.reward_gain([[0.02 * step + noise[step] for step in range(40)]] * 3)
    assert gain == pytest.approx(0.6) and gain > 3 * error


def test_a_cold_start_has_its_share_of_every_label_and_the_same_rows_for_a_seed(learning: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from recipe import cold_start

    labels = ["walk"] * 40 + ["run"] * 12 + ["rest"] * 2
    rows = [{"reward_model": {"ground_truth": label}, "number": number} for number, label in enumerate(labels)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sft_fit.parquet")
    assert cold_start(tmp_path, 1.0, 1, tmp_path / "unused") == tmp_path / "sft_fit.parquet"

    def kept(seed: int) -> list[dict[str, Any]]:
        return pq.read_table(cold_start(tmp_path, 0.25, seed, tmp_path / f"{seed}.parquet")).to_pylist()

    found = [row["reward_model"]["ground_truth"] for row in kept(1)]
    assert (found.count("walk"), found.count("run"), found.count("rest")) == (10, 3, 1)
    assert kept(1) == kept(1) != kept(2)


def stages(rl_right: str) -> dict[str, Any]:
    """Of one seed: 4 test rows, of which SFT gets the first two right; `rl_right` has a 1 for each row of GRPO's."""
    right = {str(row): mark == "1" for row, mark in enumerate(rl_right)}
    sft = {
        "sft_acc": 0.5,
        "sft_f1": 0.4,
        "sft_parse_failure": 0.25,
        "sft_right": {"0": True, "1": True, "2": False, "3": False},
    }
    rl = {"rl_acc": sum(right.values()) / 4, "rl_f1": 0.6, "rl_parse_failure": 0.0, "rl_right": right}
    curve = [0.1 + 0.01 * (step % 2) + 0.02 * step for step in range(20)]
    return {"n": 4, "majority": 0.5, **sft, **rl, "prompt_tokens": 300.0, "rewards": curve, "step_seconds": 2.0}


def test_rows_of_a_task_have_means_over_seeds_and_what_grpo_added(learning_rows: Any) -> None:
    found = {1: stages("1110"), 2: stages("1111") | {"prompt_tokens": 302.0}}
    made = {row.row: row for row in learning_rows.rows_of("ctu (image)", found, 7)}
    assert made["rl_acc"].value == pytest.approx(0.875) and made["rl_acc"].mode.startswith("seeds 1: 0.750, 2: 1.000")
    assert made["gain"].value == pytest.approx(0.375)
    assert made["gain"].mode == (
        "seeds 1: +0.250, 2: +0.500; standard error over seeds 0.125; "
        "rows won and lost, 1: 1 and 0 (p 1), 2: 2 and 0 (p 0.5)"
    )
    assert (made["sft_parse_failure"].value, made["sft_parse_failure"].unit) == (0.25, "of the answers")
    assert (made["prompt_tokens"].value, made["prompt_tokens"].unit) == (301.0, "tokens")
    assert made["reward_gain"].value == pytest.approx(0.2) and made["reward_gain"].ratio_to == "standard errors"
    assert {row.workload for row in made.values()} == {"ctu (image)"} and made["sft_f1"].unit == "macro-F1"


@pytest.mark.parametrize(("share", "rl_steps"), [(1.0, 0), (0.25, 0), (1.0, 60), (0.25, 60)])
def test_a_control_has_rows_and_folders_of_its_own(
    learning: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, rl_steps: int
) -> None:
    from recipe import Recipe, Run

    monkeypatch.setattr(learning.rows, "parameters_of", lambda folder: 7)
    recipe = Recipe(
        **{"folder": tmp_path, "data": tmp_path, "hidden": 64, "layers": 2, "modality": "image", "sft_share": share},
        **{"sft_steps": 1, "sft_batch": 8, "rl_steps": rl_steps, "rl_batch": 8, "stop_parse_failure": None},
        **{"device": "cpu", "start": "plots", "rl_lr": 3e-4},
    )
    runs = [Run("ctu", seed, engine) for seed in (1, 2) for engine in (("hf", "vllm") if rl_steps else ("hf",))]
    made, curves = learning.rows_and_curves(
        {run: stages("1110") for run in runs if run != Run("ctu", 2, "vllm")}, recipe
    )
    named = {row.workload for row in made}
    if rl_steps:  # and no comparison of two seeds with one
        taught = "" if share == 1 else ", SFT on 25% of the rows"
        assert named == {f"ctu (image), {engine} engine{taught}" for engine in ("hf", "vllm")} == curves.keys()
        on = "" if share == 1 else "sft_on_25_of_the_rows_"
        assert runs[0].folder(recipe).name == f"ctu_image_hf_engine_{on}seed1"
        slower = replace(recipe, rl_lr=1e-4)
        _, found = learning.rows_and_curves({runs[0]: stages("1110")}, slower)
        assert list(found) == [f"ctu (image), hf engine{taught}, GRPO at 0.0001"]
        assert runs[0].folder(slower).name == f"ctu_image_hf_engine_{on}grpo_at_0_0001_seed1"
    else:
        assert named == {f"ctu (image), SFT alone on {'all rows' if share == 1 else '25% of the rows'}"} and not curves
        on = "all_rows" if share == 1 else "25_of_the_rows"
        assert runs[0].folder(recipe).name == f"ctu_image_sft_alone_on_{on}_seed1"


def test_sft_alone_has_no_rows_of_grpo(learning_rows: Any) -> None:
    alone = {name: value for name, value in stages("1110").items() if name in ("n", "majority") or "sft" in name}
    made = [row.row for row in learning_rows.rows_of("ctu (image), SFT alone", {1: alone}, 7)]
    assert made == ["majority", "sft_acc", "sft_f1", "sft_parse_failure"]


def test_engines_are_compared_over_all_rows_and_seed_by_seed(learning_rows: Any) -> None:
    row = learning_rows.comparison(
        "ctu", {1: stages("1100"), 2: stages("1100")}, {1: stages("1111"), 2: stages("1101")}
    )
    assert (row.value, row.samples) == (pytest.approx(2 * 0.5**3), 8)
    assert row.mode == "right with hf only 0, with vllm only 3, over all seeds; p of each seed 1: 0.5, 2: 1"


@pytest.mark.parametrize(("rows", "batch"), [(500, 128), (57, 56)])
def test_a_task_with_few_rows_trains_on_all_of_them_in_a_step_of_two_updates(
    learning: Any, tmp_path: Path, rows: int, batch: int
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from recipe import Limits, Recipe, Run, rl_command

    from verl.config import load
    from verl.config.plan import batch_plan

    recipe = Recipe(
        **{"folder": tmp_path, "data": tmp_path, "hidden": 64, "layers": 2, "modality": "image", "sft_share": 1.0},
        **{"sft_steps": 1, "sft_batch": 8, "rl_steps": 3, "rl_batch": 128, "stop_parse_failure": None},
        **{"device": "cpu", "start": "plots", "rl_lr": 3e-4},
    )
    run = Run("tee", 1, "hf")
    (run.folder(recipe) / "sft").mkdir(parents=True)
    (run.folder(recipe) / "sft" / "latest_checkpointed_iteration.txt").write_text("1\n")
    (tmp_path / "tee_image").mkdir()
    pq.write_table(pa.table({"number": list(range(rows))}), tmp_path / "tee_image" / "fit.parquet")
    overrides = rl_command(run, recipe, Limits(prompt=32, response=32))[3:]
    plan = batch_plan(load("ppo_trainer", overrides), rows)
    assert (plan.prompts_per_step, plan.optimizer_steps_per_step, plan.total_steps) == (batch, 2, 3)
