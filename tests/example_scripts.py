"""The scripts of example/, run with a python3 that only writes down what it would be started with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

FAKE_PYTHON = f"""#!/usr/bin/env bash
[[ $1 != -c ]] || exec {sys.executable} "$@"
for argument in "$@"; do printf "%s\\0" "$argument"; done > "$ARGUMENTS_FILE"
"""


def checkout(folder: Path) -> Path:
    """A copy of what the scripts read, so that `checkpoints/` and `data/` beside them are the test's own."""
    for name in ("example", "scripts"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


def start(script: str, folder: Path, *extra: str, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run a script to its end; `folder` gets the fake python3 and the file `arguments`."""
    folder.mkdir(exist_ok=True)
    fake = folder / "python3"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    # What the tests' own shell may have set must not choose for the scripts.
    ours = ("MODEL_PATH", "EVAL", "PAPER", "MODALITY", "DATA", "JUDGE", "OPENAI_API_KEY", "RAY_ADDRESS", "ENGINE", "TP")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"PATH": f"{folder}:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder), "N_GPUS": "1"}
    env |= {"ARGUMENTS_FILE": str(folder / "arguments"), **environment}
    command = ["bash", str(root / script), *extra]
    return subprocess.run(command, env=env, timeout=60, capture_output=True, text=True)


def overrides_of(script: str, folder: Path, *extra: str, root: Path = ROOT, **environment: str) -> list[str]:
    """What the script would start python with, after its module's name."""
    done = start(script, folder, *extra, root=root, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return arguments_of(folder)


def arguments_of(folder: Path) -> list[str]:
    """What the last start in `folder` wrote down, after the module's name."""
    arguments = (folder / "arguments").read_text().split("\0")[:-1]
    assert arguments[0] == "-m", arguments[:3]
    return arguments[2:]
