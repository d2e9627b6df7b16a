"""Tables of the documents: which rows they take, and that marks and rows cannot be missing in silence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import report

    return report


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict[str, Any]]]:
    return {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")}


def trained(workload: str, sft: float, rl: float) -> list[dict[str, Any]]:
    shared = {"workload": workload, "samples": 250, "parameters": 1_800_000, "mode": "seeds 1: 0.1, 2: 0.3"}
    shared |= {"hardware": "1x NVIDIA H200", "commit": "abc1234"}
    values = {"sft_acc": sft, "rl_acc": rl, "sft_f1": sft, "rl_f1": rl, "prompt_tokens": 328.0}
    values |= {"sft_parse_failure": 0.1, "rl_parse_failure": 0.0}
    made = [shared | {"row": name, "value": value} for name, value in values.items()]
    gain = "seeds 1: +0.1, 2: +0.2; standard error over seeds 0.050; rows won and lost, 1: 9 and 2 (p 0.1)"
    return [
        *made,
        shared | {"row": "gain", "value": rl - sft, "mode": gain},
        shared | {"row": "reward_gain", "value": 0.2, "mode": "last 10 of 60 steps; median step 2.91 s"},
    ]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (12.4297, "s", "12.4 s"),
        (29829.4, "tokens/s", "29,800 tokens/s"),
        (0.04149, "s", "0.041 s"),
        (5.0, "s", "5.00 s"),
    ],
)
def test_quantities_have_three_digits(report: Any, value: float, unit: str, text: str) -> None:
    assert report.quantity(value, unit) == text


def test_a_task_has_a_line_for_each_way_of_training_and_none_for_other_starts(report: Any) -> None:
    rows = trained("ctu (image), hf engine, library start", 0.5, 0.6) + trained("ctu (image), hf engine", 0.7, 0.8)
    rows += trained("ctu (image), hf engine, GRPO at 0.00025", 0.7, 0.71)
    rows += trained("ctu (image), hf engine, SFT on 25% of the rows", 0.6, 0.8)
    rows += trained("ctu (numeric), hf engine", 0.1, 0.2) + trained("ctu (image), vllm engine", 0.1, 0.2)
    for workload in ("ctu (image), SFT alone on 25% of the rows", "tee (image), SFT alone on all rows"):
        rows += [row for row in trained(workload, 0.6, 0.0) if "sft" in row["row"]]
    baselines = [{"row": f"{task} MiniRocket", "value": 0.72} for task in ("ctu", "tee")]
    baselines += [{"row": "ctu majority", "value": 0.5}, {"row": "tee ROCKET", "value": 0.8}]
    lines = report.learning({"learning": rows, "baselines": baselines}).splitlines()[2:]
    shown = [(cells[0], cells[6], cells[7]) for cells in (line.strip("| ").split(" | ") for line in lines)]
    quarter = [("`ctu`", "25%", "no GRPO"), ("`ctu`", "25%", "0.0003")]
    whole = [("`ctu`", "all", "0.0003"), ("`ctu`", "all", "0.00025"), ("`tee`", "all", "no GRPO")]
    assert shown == quarter + whole
    assert "| 0.500 |  |  | 0.720 | 25% | 0.0003 | 0.600 ± 0.031 | 0.800 ± 0.025 | +0.200 ± 0.050 |" in lines[1]
    assert lines[1].endswith("| 10.0% → 0.0% | 0.600 → 0.800 | 1.8 M |")
    assert lines[4].endswith("| 0.800 | 0.720 | all | no GRPO | 0.600 ± 0.031 |  |  | 10.0% | 0.600 | 1.8 M |")


def test_a_line_is_one_run_the_last(report: Any) -> None:
    older = [row | {"hardware": "2 CPU cores"} for row in trained("ctu (image), hf engine", 0.6, 0.9)]
    newer = [row for row in trained("ctu (image), hf engine", 0.7, 0.8) if row["row"] != "prompt_tokens"]
    found = report._by_workload(older + newer)["ctu (image), hf engine"]
    assert "prompt_tokens" not in found and found["rl_acc"]["value"] == 0.8


def test_plots_and_digits_are_compared_only_where_both_were_trained(report: Any) -> None:
    rows = trained("ctu (image), hf engine, SFT on 25% of the rows", 0.7, 0.8) + trained(
        "har (image), hf engine, SFT on 25% of the rows", 0.5, 0.6
    )
    rows += trained("ctu (numeric), hf engine, SFT on 25% of the rows", 0.4, 0.5)
    lines = report.modalities({"learning": rows}).splitlines()[2:]
    assert [line.split(" | ")[:3] for line in lines] == [["| `ctu`", "plot", "328"], ["| `ctu`", "digits", "328"]]
    assert lines[0].endswith("| +0.100 ± 0.050 | 10.0% → 0.0% | 2.91 s |")


def test_a_missing_figure_is_an_error(report: Any, results: dict[str, list[dict[str, Any]]]) -> None:
    with pytest.raises(LookupError, match=r"generation\.json has no row generate_tokens_per_s of CTU-3B"):
        report.at_a_glance(results | {"generation": []})


def test_marks_that_are_not_there_once_are_an_error(report: Any) -> None:
    text = "a <!-- x: made by benchmarks/report.py -->\nold\n<!-- end of x --> z"
    assert report.between(text, "x", "new") == "a <!-- x: made by benchmarks/report.py -->\nnew\n<!-- end of x --> z"
    with pytest.raises(ValueError, match="needs the marks"):
        report.between(text + text, "x", "new")


def test_the_documents_show_the_rows_that_are_there(report: Any, results: dict[str, list[dict[str, Any]]]) -> None:
    results = {name: results[name] for name in sorted(results)}
    readme = (ROOT / "README.md").read_text()
    for name, table in report._TABLES.items():
        assert report.between(readme, name, table(results)) == readme, f"run benchmarks/report.py --write ({name})"
    assert (ROOT / "benchmarks" / "README.md").read_text() == report.all_rows(results)


def test_commands_of_the_rows_name_nothing_of_the_machine_they_ran_on(results: dict[str, list[dict[str, Any]]]) -> None:
    commands = {row["command"] for rows in results.values() for row in rows}
    assert commands and not [c for c in commands if re.search(r"(^|[ =])/(tmp|root|home|work)\b", c)]
