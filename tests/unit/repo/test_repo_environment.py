"""scripts/environment.sh: the words for True and False, and the GPUs a process will see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def bash(command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command after the file was sourced, with the tests' interpreter as python3."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euc", f"source {ROOT}/scripts/environment.sh; {command}"],
        env={**{k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}, "PATH": path, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("word", "meaning"),
    [
        ("True", "True"),
        ("true", "True"),
        ("1", "True"),
        ("yes", "True"),
        ("False", "False"),
        ("0", "False"),
        ("", "False"),
    ],
)
def test_every_usual_word_for_true_and_false_means_the_same(word: str, meaning: str) -> None:
    assert bash("flag EVAL; echo $EVAL", EVAL=word).stdout.strip() == meaning


def test_another_word_ends_the_script_instead_of_choosing_a_branch() -> None:
    run = bash("flag EVAL; echo went on", EVAL="ture")
    assert (run.returncode, run.stdout) == (2, "")
    assert "EVAL=ture: use True or False" in run.stderr


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("3", 1), ("0,2,5", 3), ("-1", 0), ("0,-1,2", 1)])
def test_gpus_that_a_process_may_not_see_are_not_counted(visible: str, count: int) -> None:
    assert bash("visible_gpus", CUDA_VISIBLE_DEVICES=visible).stdout.strip() == str(count)
