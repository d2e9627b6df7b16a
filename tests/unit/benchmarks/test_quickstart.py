"""The claims that the quickstart benchmark fails at, what it reuses, and the quickstart's last line."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return load("benchmarks/quickstart.py")


@pytest.mark.parametrize(
    ("changes", "rows", "missed"),
    [
        ({}, 160, None),
        ({"rl_acc": [0.35, 0.55, 0.35]}, 160, "less than 0.10 above sft_acc 0.300"),
        ({"rl_acc": [0.45, 0.45, 0.9]}, 160, "less than 0.25 above majority 0.250"),
        ({"rl_shuffled_acc": [0.26, 0.26, 0.26]}, 160, "rl_shuffled_acc 0.260 is not within 0.036 of sft_acc 0.300"),
        ({"rl_shuffled_acc": [0.34, 0.34, 0.34]}, 160, "rl_shuffled_acc 0.340 is not within 0.036"),
        ({}, 149, "149 test rows, 150 are needed"),
    ],
)
def test_a_claim_that_does_not_hold_is_named(
    quickstart: ModuleType, changes: dict[str, list[float]], rows: int, missed: str | None
) -> None:
    accuracy = {"sft_acc": [0.3] * 3, "rl_acc": [0.4, 0.6, 0.7], "rl_shuffled_acc": [0.27] * 3} | changes
    found = quickstart.missed(accuracy, 0.25, rows)
    assert found == [] if missed is None else missed in "\n".join(found)


def test_a_result_is_read_only_where_tree_and_settings_made_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quickstart: ModuleType
) -> None:
    import stored

    trees, calls = iter(["a", "a", "a", "b", "b"]), []
    monkeypatch.setattr(stored, "tree", lambda: next(trees))

    def run(seed: int) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            calls.append(seed)
            return {"run": len(calls)}

        return stored.stored(tmp_path / "result.json", {"seed": seed}, work)

    assert [run(1), run(1), run(2), run(2), run(2)] == [{"run": n} for n in (1, 1, 2, 3, 3)]


def test_the_last_line_of_the_quickstart_is_the_promised_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = {"macro_f1": 0.70512, "parse_failure_rate": 0.00625}
    report = {"n_prompts": 40, "majority_share": 0.25, "classification": classes}
    for name, accuracy in (("sft", 0.2875), ("rl", 0.71875), ("shuffled", 0.26)):
        (tmp_path / name / "reports").mkdir(parents=True)
        reports = {"reports": {"basic_motions_dataset": report | {"accuracy": accuracy}}}
        (tmp_path / name / "reports" / "test.json").write_text(json.dumps(reports))
    lines = [{"timing_s/step": 2.5}, {"timing_s/step": 3.1}, {"test/accuracy": 0.7}]
    (tmp_path / "rl" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = load("example/quickstart_summary.py")
    told = ["--data", "BasicMotions", "--sft", str(tmp_path / "sft"), "--rl", str(tmp_path / "rl"), "--seconds", "298"]
    monkeypatch.setattr(sys, "argv", ["x", *told, "--rl-shuffled", str(tmp_path / "shuffled")])
    summary.main()
    assert capsys.readouterr().out.splitlines() == [
        "control: rl_shuffled_acc=0.260",
        "quickstart: data=BasicMotions test_n=40 majority=0.250 sft_acc=0.287 rl_acc=0.719 rl_f1=0.705 "
        "parse_fail=0.006 rl_steps=2 seconds=298",
    ]
    monkeypatch.setattr(sys, "argv", ["x", "--rl-seconds", str(tmp_path / "rl")])
    summary.main()
    assert capsys.readouterr().out == "6\n"
