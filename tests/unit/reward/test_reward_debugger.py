"""`python3 -m verl.utils.reward_score`: every part of every answer, and why; mistakes of the user are named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from verl.utils.reward_score.__main__ import main

ROOT = Path(__file__).resolve().parents[3]
LINES: list[dict[str, Any]] = [
    {
        "answer": "<think>large units</think><class>Neuropathy</class><extension>Sample soleus.</extension>",
        "ground_truth": "Neuropathy",
        "tokens": 30,
    },
    {"response": "<think>small</think><class>myopathy</class>[red]x", "ground_truth": "Neuropathy", "tokens": 90},
    {"predict_str": "Healthy", "ground_truth": "Healthy", "tokens": 120},
]
GROUP = {
    "uid": "train-7",
    "ground_truth": "Myopathy",
    "answers": [
        {"text": "<class>Myopathy</class>", "tokens": 5, "score": 1.0},
        {"text": "<class>Healthy</class>", "tokens": 5},
    ],
}
"""A line as a run writes it to samples/."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "answers.jsonl", [json.dumps(line) for line in LINES])


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def cells(out: str) -> dict[str, list[str]]:
    """Rows of the printed table by their number."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in rows}


def test_the_command_prints_parts_totals_and_reasons(file: Path) -> None:
    command = [sys.executable, "-m", "verl.utils.reward_score", "--task", "emg", "--file", str(file), "--no-judge"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    assert cells(done.stdout) == {
        "0": ["Neuropathy", "Neuropathy", "1", "1", "1"],
        "1": ["Neuropathy", "Myopathy", "1", "0", "0.1"],
        "2": ["Healthy", "", "0", "0", "0"],
    }
    assert re.findall(r"^\d+: .*", done.stdout, re.M) == [
        "1: label: Myopathy said",
        "2: format: no legal label in a <class> tag; label: nothing legal said",
    ]
    assert "3 of 3 scored, mean 0.3667" in done.stdout
    assert "without its part soft" in done.stderr


def test_the_format_and_the_parts_can_be_chosen(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    length = "{length: {weight: 0.5, buffer: 20, max_tokens: 100}, label: {weight: 2}}"
    assert main(["--task", "emg", "--file", str(file), "--no-judge", "--format", "strict", "--parts", length]) == 0
    out = capsys.readouterr().out
    assert cells(out) == {
        "0": ["Neuropathy", "Neuropathy", "1", "1", "0", "2.1"],
        "1": ["Neuropathy", "", "0", "0", "-0.5", "-0.25"],
        "2": ["Healthy", "", "0", "0", "-1", "-0.5"],
    }
    assert (
        "1: format: 0 <extension> and 0 </extension>, expected one each; label: nothing legal said; length: 90" in out
    )


def test_the_lines_of_a_runs_samples_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "step_000001.jsonl", [json.dumps(GROUP)])
    assert main(["--task", "emg", "--file", str(file), "--no-judge"]) == 0
    assert {number: row[-1] for number, row in cells(capsys.readouterr().out).items()} == {"0": "1", "1": "0.1"}


def test_an_answer_that_could_not_be_scored_is_failed_and_enters_no_mean(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("def compute_score(solution_str):\n    return 1 / ('large' in solution_str)\n")
    part = f"{{mine: {{kind: custom, path: {tmp_path}/mine.py}}}}"
    assert main(["--task", "emg", "--file", str(file), "--no-judge", "--parts", part]) == 0
    out = capsys.readouterr().out
    assert [row[-1] for row in cells(out).values()] == ["2", "failed", "failed"]
    assert "1: failed: exception: ZeroDivisionError: division by zero" in out and "1 of 3 scored, mean 2\n" in out


MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown task": (["--task", "egm"], "unknown task='egm'; did you mean 'emg'"),
    "another task's labels": (["--task", "ctu"], "row 0 .*'Neuropathy' is not a label of computer_dataset"),
    "judge options without a judge": (["--judge.model=x"], "--judge options have no effect: emg asks no judge here"),
    "unknown option": (["--jugde.model=x"], "unknown option --jugde.model"),
    "option without a value": (["--judge.model"], "--judge.model needs a value"),
    "parts that are no mapping": (["--parts", "3"], "--parts 3: give parts by name"),
    "parts that are no yaml": (["--parts", "{a: ["], "while parsing"),
    "unknown part": (["--parts", "{labl: {weight: 1}}"], "reward.parts.labl.kind='labl'"),
    "a length without its limit": (["--parts", "{length: {buffer: 9}}"], "reward.parts.length needs max_tokens"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_an_error_that_names_it(file: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = MISTAKES[name]
    assert main(["--task", "emg", "--file", str(file), "--no-judge", *arguments]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err) and "error: " in captured.err and not captured.out


FILES: dict[str, tuple[str, str]] = {
    "not json": ("{'answer': 1}", "line 2: not json"),
    "no object": ("[1]", "line 2: expected an object with a text ground_truth"),
    "no truth": ('{"answer": "x"}', "line 2: expected an object with a text ground_truth"),
    "no answer": ('{"ground_truth": "Healthy"}', "line 2: no answer; give one of answer, response"),
    "unknown truth": ('{"answer": "x", "ground_truth": "Sick"}', "row 1 .*'Sick' is not a label of emg_dataset"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_line_that_cannot_be_read_is_an_error_naming_it(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text, message = FILES[name]
    file = write(tmp_path / "a.jsonl", [json.dumps(LINES[0]), text])
    assert main(["--task", "emg", "--file", str(file), "--no-judge"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_files_that_are_absent_empty_or_no_text_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, message in {"absent": "No such file", "empty": "holds no answer", "binary": "not utf-8 text"}.items():
        assert main(["--task", "emg", "--file", str(tmp_path / name), "--no-judge"]) == 2
        assert message in capsys.readouterr().err, name


def test_a_length_part_needs_the_answers_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.jsonl", [json.dumps(LINES[0]), '{"answer": "x", "ground_truth": "Healthy"}'])
    parts = ["--parts", "{length: {buffer: 9, max_tokens: 99}}"]
    assert main(["--task", "emg", "--file", str(file), "--no-judge", *parts]) == 2
    assert "answer 1 has no tokens, which a length part needs" in capsys.readouterr().err
