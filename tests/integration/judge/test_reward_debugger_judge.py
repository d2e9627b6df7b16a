"""The reward debugger with a judge: its criteria and its failures are shown, and a second run asks nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judge_server import JudgeServer, Plan, completion, error, verdict

from verl.utils.reward_score.__main__ import main

ANSWER = "<think>long units</think><class>Neuropathy</class><extension>{}</extension>"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    texts = ("Sample soleus.", "Refer to specialist.", "Broken.")
    lines = [{"answer": ANSWER.format(text), "ground_truth": "Neuropathy"} for text in texts]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_criteria_caps_and_failures_are_shown_and_a_second_run_is_served_from_the_cache(
    server: JudgeServer, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    server.plan = lambda seen: error(400) if b"Broken" in seen.raw else Plan(completion(verdict(0.5, depth=0.9)))
    judge = {"base_url": server.url, "model": "stub", "api_key_env": "JUDGE_KEY", "cache_path": f"{tmp_path}/j.sqlite"}
    arguments = ["--task", "emg", "--file", str(file), *(f"--judge.{key}={value}" for key, value in judge.items())]
    assert main([*arguments, "--judge.max_retries", "0"]) == 0
    out = capsys.readouterr().out
    assert "0: soft: specificity 0.5, appropriateness 0.5, relevance 0.5, depth 0.9\n" in out
    assert "1: soft: specificity 0.5, appropriateness 0.5, relevance 0.5, depth 0.9 (capped: stock phrase)\n" in out
    assert "2: failed: rejected: " in out and "2 of 3 scored, mean 1.25" in out
    assert server.seen[0].headers["authorization"] == "Bearer sk-secret" and "sk-secret" not in out
    asked = len(server.seen)
    assert main([*arguments, "--judge.max_calls=0"]) == 0
    assert "2: failed: budget: " in capsys.readouterr().out and len(server.seen) == asked


def test_an_unknown_judge_option_is_an_error_with_a_suggestion(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--task", "emg", "--file", str(file), "--judge.modle=x"]) == 2
    assert "unknown judge option 'modle': did you mean 'model'" in capsys.readouterr().err
