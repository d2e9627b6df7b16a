"""The repository's own rules: sizes, annotations, shell scripts, and what must not stand in a file.

Limits that fail are generous; the budgets are printed beside the counts, so that drift is seen before it fails.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CODE = ("verl", "tests", "example", "scripts", "benchmarks", "setup.py", ".ci/run")
TEXT = (*CODE, "docs", "requirements", "README.md", "pyproject.toml", "requirements_timemaster.txt")

FILE_LIMIT, FILE_BUDGET = 600, 400
FUNCTION_LIMIT, FUNCTION_BUDGET = 90, 45
ANNOTATED_LIMIT = 0.95

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files(places: tuple[str, ...], *suffixes: str) -> list[Path]:
    """Files with one of the suffixes (all files, without any) at or under the places that exist."""
    found = []
    for place in places:
        path = ROOT / place
        found += sorted(path.rglob("*")) if path.is_dir() else [path]
    return [p for p in found if p.is_file() and "__pycache__" not in p.parts and (not suffixes or p.suffix in suffixes)]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def length(function: Function) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def annotated(function: Function) -> bool:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    typed = all(a is None or a.annotation is not None or a.arg in ("self", "cls") for a in named)
    return typed and (function.returns is not None or function.name == "__init__")


def comments(path: Path) -> list[tuple[int, str]]:
    with path.open("rb") as stream:
        return [(t.start[0], t.string) for t in tokenize.tokenize(stream.readline) if t.type == tokenize.COMMENT]


def percentile(values: list[int], share: float) -> int:
    return sorted(values)[int(share * (len(values) - 1))]


def test_files_and_functions_stay_short(capsys: pytest.CaptureFixture[str]) -> None:
    python = files(CODE, ".py")
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python}
    sizes = {
        f"{name(path)}:{function.lineno} {function.name}": length(function)
        for path in python
        if not name(path).startswith("tests/")
        for function in functions(path)
    }
    p90 = percentile(list(lines.values()), 0.9), percentile(list(sizes.values()), 0.9)
    with capsys.disabled():
        print(f"\nfile lines: p90 {p90[0]} (budget {FILE_BUDGET}), max {max(lines.values())} (limit {FILE_LIMIT})")
        print(f"function lines: p90 {p90[1]} (budget {FUNCTION_BUDGET}), max {max(sizes.values())} ({FUNCTION_LIMIT})")
    assert {name(p): n for p, n in lines.items() if n > FILE_LIMIT} == {}
    assert {where: n for where, n in sizes.items() if n > FUNCTION_LIMIT} == {}


def test_functions_are_annotated(capsys: pytest.CaptureFixture[str]) -> None:
    found = [(path, function) for path in files(("verl",), ".py") for function in functions(path)]
    bare = [f"{name(path)}:{function.lineno} {function.name}" for path, function in found if not annotated(function)]
    public = [f for _, f in found if not f.name.startswith("_")]
    documented = sum(ast.get_docstring(f) is not None for f in public) / len(public)
    share = 1 - len(bare) / len(found)
    with capsys.disabled():
        print(f"\nannotated functions: {share:.1%} of {len(found)}; public ones with a docstring: {documented:.0%}")
    assert share >= ANNOTATED_LIMIT, f"{share:.1%} of {len(found)} functions, not annotated: {bare}"


def test_modules_say_what_they_are() -> None:
    silent = [
        name(path)
        for path in files(("verl", "scripts", "benchmarks"), ".py")
        if ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None
    ]
    assert silent == []


def test_no_comment_is_a_note_to_self(capsys: pytest.CaptureFixture[str]) -> None:
    mark = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    found = {path: comments(path) for path in files(CODE, ".py")}
    total = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in found)
    with capsys.disabled():
        print(f"\ncomment lines: {sum(map(len, found.values())) / total:.1%}")
    assert [f"{name(path)}:{n} {text}" for path, notes in found.items() for n, text in notes if mark.search(text)] == []


def test_no_path_of_one_machine() -> None:
    # Tests may name a scratch folder, as an example of a path; nothing may name somebody's home or checkout.
    anywhere, outside_tests = re.compile(r"/(root|work|home|Users)/"), re.compile(r"/(tmp)/")
    found = []
    for path in files(TEXT, ".py", ".sh", ".md", ".yaml", ".toml", ".txt"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if anywhere.search(line) or (outside_tests.search(line) and not name(path).startswith("tests/")):
                found.append(f"{name(path)}:{number} {line.strip()[:100]}")
    assert found == []


SCRIPTS = [path for path in files(CODE) if path.suffix == ".sh" or name(path) == ".ci/run"]


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_shell_scripts_stop_at_the_first_failure(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n"), text[:40]
    assert "set -euo pipefail" in text.splitlines()
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_shellcheck_has_nothing_to_say(path: Path) -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}") or shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed (requirements/dev.txt)")
    done = subprocess.run([program, "-x", str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_ci_and_readme_have_one_test_command() -> None:
    command = "bash tests/run.sh"
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith(command)
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
