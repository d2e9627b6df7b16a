"""scripts/environment.sh: words for True and False, the GPUs a process will see. docs/offline.md: its downloads."""

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


OFFLINE = (ROOT / "docs" / "offline.md").read_text(encoding="utf-8")
DOWNLOADS = [line for line in OFFLINE.splitlines() if line.startswith("hf download ")]


@pytest.mark.parametrize("line", DOWNLOADS)
def test_the_download_commands_of_the_documentation_are_understood(line: str, tmp_path: Path) -> None:
    """Everything but the network is reached: hf has read the line and asks the hub for that model."""
    here = [sys.executable, "-m", "huggingface_hub.cli.hf", *line.split()[1:]]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(here, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    model = line.split()[2]
    assert done.returncode != 0 and f"models/{model}/" in done.stderr and "offline mode" in done.stderr, done.stderr


def test_both_models_are_named() -> None:
    assert [line.split()[2] for line in DOWNLOADS] == [
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "langfeng01/TimeMaster-SFT-Qwen2.5-VL-3B-CTU",
    ]
